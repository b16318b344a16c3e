"""Print the table; exit status 1 when a target is missed."""

import sys

from bench import attach, check, inventory, journal, lookup, start


def main() -> int:
    """Measure every row, printing each as soon as it is known."""
    print(f"{'ratio':>6} {'target':>6}  {'ours':>10} {'other':>10}  what")
    missed = 0
    for module in (lookup, inventory, start, check, attach, journal):
        for row in module.rows():
            mark = " " if row.is_met else "!"
            print(
                f"{row.ratio:6.2f} {row.target:6.2f}{mark} {row.ours_us:7.1f} us"
                f" {row.other_us:7.1f} us  {row.name}",
                flush=True,
            )
            missed += not row.is_met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
