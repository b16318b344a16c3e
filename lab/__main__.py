"""`python -m lab -- COMMAND`: run a command as root in the lab VM; its status is ours."""

import argparse
import signal
import sys
from pathlib import Path

from lab.vm import KERNELS, LAB_FAILED, Lab, run


def main() -> int:
    """The status of the command, or 125 when the lab itself failed."""
    usual = Lab()
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description="Run a command as root in the lab VM: this machine's files, of which nothing "
        "is written, below a real kernel with a real IOMMU and devices to hand over.",
        epilog="python -m lab -- .venv/bin/pytest tests/lab -k sriov",
    )
    parser.add_argument("--kernel", choices=KERNELS, default=usual.kernel, help="6.12 has iommufd")
    parser.add_argument("--share", type=Path, default=usual.share, help="what may be written to")
    parser.add_argument("--timeout", type=float, default=usual.timeout_s, metavar="SECONDS")
    parser.add_argument(
        "--no-remapping", action="store_true", help="an IOMMU that does not remap interrupts"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the kernel's messages")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    said = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that QEMU ends
    lab = Lab(
        kernel=said.kernel,
        share=said.share.resolve(),
        timeout_s=said.timeout,
        remapping=not said.no_remapping,
        verbose=said.verbose,
    )
    try:
        return run(lab, said.command)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"lab: {error}", file=sys.stderr)
        return LAB_FAILED


if __name__ == "__main__":
    sys.exit(main())
