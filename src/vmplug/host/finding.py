"""Findings: reasons not to hand a device over; and the requested access to a device."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec
from msgspec.structs import replace


class Code(StrEnum):
    """Findings, as stable words for programs and for `--allow`."""

    MOUNTED_ON_HOST = "mounted-on-host"
    HAS_HOLDERS = "has-holders"
    IS_SWAP = "is-swap"
    IS_EXPORTED = "is-exported"
    OPEN_EXCLUSIVELY = "open-exclusively"
    IMAGE_LOCKED = "image-locked"
    IN_USE_BY_VM = "in-use-by-vm"
    GIVEN_TO_POD = "given-to-pod"
    REPLACED = "replaced"
    UNIDENTIFIED = "unidentified"
    READ_ONLY_DEVICE = "read-only-device"
    NO_MEDIUM = "no-medium"
    NOT_A_DISK = "not-a-disk"
    ZONED = "zoned"
    HAS_INTEGRITY = "has-integrity"
    SECTOR_SIZE = "sector-size"
    SIZE_ZERO = "size-zero"
    NOT_IN_SYSFS = "not-in-sysfs"
    WRONG_NODE = "wrong-node"
    HAS_BACKING_FILE = "has-backing-file"
    FORMAT_NOT_STATED = "format-not-stated"
    NOT_THAT_FORMAT = "not-that-format"
    UNUSABLE_IMAGE = "unusable-image"
    ODD_SIZE = "odd-size"
    NO_AIO_CONTEXT = "no-aio-context"
    NO_DIRECT_IO = "no-direct-io"
    NO_PFN_SIGNATURE = "no-pfn-signature"
    NVDIMM_SIZE = "nvdimm-size"
    SPARSE_NVDIMM = "sparse-nvdimm"
    NO_BACKEND = "no-backend"
    BACKEND_BUSY = "backend-busy"
    BACKEND_SILENT = "backend-silent"
    WRONG_BACKEND = "wrong-backend"
    TOO_MANY_QUEUES = "too-many-queues"
    CANNOT_BE_READ_ONLY = "cannot-be-read-only"
    NOT_RANDOM = "not-random"
    NO_IOMMU = "no-iommu"
    NO_INTERRUPT_REMAPPING = "no-interrupt-remapping"
    ACS_OVERRIDE = "acs-override"
    NO_IOMMUFD = "no-iommufd"
    NO_NODE = "no-node"
    GROUP_NOT_VIABLE = "group-not-viable"
    MEMBER_IN_USE = "member-in-use"
    MACHINE_PART = "machine-part"
    NOT_BOUND = "not-bound"
    NETWORK_IN_USE = "network-in-use"
    BOOT_CONSOLE = "boot-console"
    OPEN_BY_PROCESS = "open-by-process"
    UNKNOWN_USE = "unknown-use"
    HAS_VIRTUAL_FUNCTIONS = "has-virtual-functions"
    NO_RESET = "no-reset"
    NO_RESPONSE = "no-response"
    BAR_UNASSIGNED = "bar-unassigned"
    VFIO_REFUSES = "vfio-refuses"
    RESERVED_MEMORY = "reserved-memory"
    PHYSFN_WITH_VFIO = "physfn-with-vfio"
    MEMLOCK_LIMIT = "memlock-limit"
    NO_PORT = "no-port"
    NO_ADDRESS_SPACE = "no-address-space"
    CANNOT_PLUG = "cannot-plug"
    SPLIT_GROUP = "split-group"
    PLUGGED_OTHERWISE = "plugged-otherwise"
    TAG_TAKEN = "tag-taken"
    NO_SUCH_DEVICE = "no-such-device"
    UNREADABLE = "unreadable"
    NOT_ALLOWED = "not-allowed"


NEVER_ALLOWED = frozenset(
    {
        Code.BACKEND_SILENT,
        Code.CANNOT_PLUG,
        Code.GROUP_NOT_VIABLE,
        Code.PHYSFN_WITH_VFIO,
        Code.NO_BACKEND,
        Code.NO_INTERRUPT_REMAPPING,
        Code.NO_IOMMU,
        Code.NO_IOMMUFD,
        Code.NO_NODE,
        Code.NO_PORT,
        Code.NO_RESPONSE,
        Code.NO_SUCH_DEVICE,
        Code.NOT_ALLOWED,
        Code.NOT_BOUND,
        Code.NOT_RANDOM,
        Code.NOT_THAT_FORMAT,
        Code.ODD_SIZE,
        Code.OPEN_BY_PROCESS,
        Code.PLUGGED_OTHERWISE,
        Code.REPLACED,
        Code.SIZE_ZERO,
        Code.SPLIT_GROUP,
        Code.TAG_TAKEN,
        Code.TOO_MANY_QUEUES,
        Code.UNIDENTIFIED,
        Code.UNREADABLE,
        Code.WRONG_BACKEND,
        Code.WRONG_NODE,
    }
)
"""Findings that `--allow` cannot overrule."""


class Severity(StrEnum):
    """Whether a finding stops `attach`."""

    ERROR = "error"
    WARNING = "warning"


USES = frozenset(
    {
        Code.BACKEND_BUSY,
        Code.BOOT_CONSOLE,
        Code.GIVEN_TO_POD,
        Code.HAS_HOLDERS,
        Code.HAS_VIRTUAL_FUNCTIONS,
        Code.IMAGE_LOCKED,
        Code.IN_USE_BY_VM,
        Code.IS_EXPORTED,
        Code.IS_SWAP,
        Code.MACHINE_PART,
        Code.MEMBER_IN_USE,
        Code.MOUNTED_ON_HOST,
        Code.NETWORK_IN_USE,
        Code.OPEN_BY_PROCESS,
        Code.OPEN_EXCLUSIVELY,
        Code.UNKNOWN_USE,
    }
)
"""Findings that are uses: each has `used_by`. All others are about the device itself."""


class UsedBy(msgspec.Struct, frozen=True, kw_only=True):
    """The user of a device and what it uses, of a finding that is a use.

    `on` is the part that is in use: a node, the address of a function, the name of an interface,
    a path, or the text of an `Identity`. `where` is a mount point, a node, a namespace; None where
    there is no such place. `how` is what shows it.
    """

    on: str
    who: str
    where: str | None = None
    how: str


class Finding(msgspec.Struct, frozen=True):
    """One reason not to hand a device over, and the remedy; `used_by` is set for a use."""

    code: Code
    message: str
    hint: str
    severity: Severity = Severity.ERROR
    used_by: UsedBy | None = None


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """The requested access: only for reading; shared with other writers."""

    read_only: bool
    share_rw: bool = False


def allow(findings: Iterable[Finding], codes: frozenset[Code]) -> list[Finding]:
    """The findings, with those that the operator allows as warnings."""
    return [
        replace(finding, severity=Severity.WARNING)
        if finding.code in codes - NEVER_ALLOWED
        else finding
        for finding in findings
    ]
