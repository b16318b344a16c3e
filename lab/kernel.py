"""What lab/build.sh has built: the lab's kernels, and its first programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Version = Literal["6.1", "6.12"]
VERSIONS: tuple[Version, ...] = get_args(Version)

BUILT = Path(__file__).parents[1] / "build" / "lab"
BUSYBOX = BUILT / "busybox"


class LabError(Exception):
    """The lab itself failed, and not what runs in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that QEMU can boot, and the directory of its modules, lib/modules/RELEASE."""

    vmlinux: Path
    modules: Path


def first_built() -> Version:
    """The oldest of the kernels that have been built; the oldest of all when none has."""
    return next((version for version in VERSIONS if (BUILT / version).exists()), VERSIONS[0])


def find_kernel(version: Version) -> Kernel:
    """What has been built of a kernel. Raises LabError."""
    tree = BUILT / version
    indices = list(tree.glob("lib/modules/*/modules.dep.bin"))
    vmlinux = tree / "vmlinux"
    if len(indices) != 1 or not vmlinux.exists() or not BUSYBOX.exists():
        raise LabError(f"{tree} has no kernel; build it with: make lab")
    return Kernel(vmlinux=vmlinux, modules=indices[0].parent)
