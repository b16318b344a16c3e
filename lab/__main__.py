"""`python -m lab -- COMMAND`: runs a command as root in the lab VM."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lab.kernel import VERSIONS, LabError
from lab.vm import Lab, run

FAILED = 125
DESCRIPTION = """\
Run a command as root in the lab VM: a throw-away machine that has a real kernel with an IOMMU,
devices to hand over, and this machine's files. What the command writes is thrown away too, except
in shared directories."""
EPILOG = """\
The exit status is the command's; 125 when the lab itself failed. Example:
python -m lab -- .venv/bin/pytest tests/lab -k sriov"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    usual = Lab()
    parser = argparse.ArgumentParser(prog="lab", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--kernel",
        choices=VERSIONS,
        default=usual.version,
        help="of Linux; 6.12 has iommufd (default: %(default)s)",
    )
    parser.add_argument(
        "--share",
        action="append",
        type=Path,
        metavar="DIRECTORY",
        help=f"what the command may write to, at the same path (default: {usual.shares[0]})",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=usual.timeout_s,
        metavar="SECONDS",
        help="end the lab after so many seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--no-remapping",
        action="store_true",
        help="an IOMMU that does not remap interrupts: VFIO refuses it unless it is allowed",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show what the kernel says, on stderr"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    said = parser.parse_args(arguments)
    lab = Lab(
        version=said.kernel,
        shares=tuple(path.resolve() for path in said.share or usual.shares),
        timeout_s=said.timeout,
        remapping=not said.no_remapping,
        verbose=said.verbose,
    )
    try:
        return run(lab, said.command)
    except BrokenPipeError:
        # Nobody reads any more. Python flushes at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (LabError, OSError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return FAILED


def _exit(number: int, _frame: object) -> NoReturn:
    """Leaves by an exception, so that QEMU is ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for ending in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, _exit)
    sys.exit(main())
