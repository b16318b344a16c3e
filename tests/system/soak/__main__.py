"""Attach and detach ten thousand times, and tell what has grown."""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.system.soak.cycles import Run, soak_disks, soak_guest
from tests.system.soak.figures import grown, is_whole, table

GUEST_SHARE = 20
"""A guest takes twice the time of a paused VM to let go; it gets one of so many cycles."""


def main() -> int:
    """1 when something has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.soak", description=__doc__)
    parser.add_argument("--cycles", type=int, default=10_000)
    cycles = parser.parse_args().cycles
    problems = []
    for title, soak, count in (
        ("SCSI disks", soak_disks, cycles),
        ("PCI, booted guest", soak_guest, cycles // GUEST_SHARE),
    ):
        with tempfile.TemporaryDirectory(prefix="vmplug-soak-") as directory:
            run = soak(Path(directory), count, partial(print, f"{title}:", flush=True))
            if not is_whole(Path(directory) / "state"):
                problems.append(f"{title}: the journal is damaged")
        show(title, run)
        problems += [
            f"{title}: {name} has grown from {was} to {now}"
            for name, (was, now) in grown(run.warm, run.end).items()
        ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


def show(title: str, run: Run) -> None:
    """One table."""
    print(*table(title, {"after warm-up": run.warm, "at the end": run.end}), sep="\n")
    each = run.seconds / run.cycles * 1000
    print(f"{run.cycles} cycles in {run.seconds:.0f} s, {each:.1f} ms each", flush=True)


if __name__ == "__main__":
    sys.exit(main())
