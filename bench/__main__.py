"""Print the table; exit status 1 when a target is missed, unless each row ran only once."""

import sys

from bench import (
    attach,
    cdi,
    check,
    crowded,
    inventory,
    journal,
    kubernetes,
    lookup,
    loop,
    many,
    start,
    turns,
)
from bench.timing import IS_QUICK


def main() -> int:
    """Measure every row, printing each as soon as it is known."""
    print(f"{'ratio':>6} {'target':>6}  {'ours':>12} {'other':>12}  what")
    missed = 0
    pure = (lookup, many, inventory, cdi, kubernetes, start)
    for module in (*pure, check, crowded, attach, turns, journal, loop):
        for row in module.rows():
            mark = " " if row.is_met else "!"
            print(
                f"{row.ratio:6.2f} {row.target:6.2f}{mark} {row.ours_us:9.1f} us"
                f" {row.other_us:9.1f} us  {row.name}",
                flush=True,
            )
            missed += not row.is_met
    return 1 if missed and not IS_QUICK else 0


if __name__ == "__main__":
    sys.exit(main())
