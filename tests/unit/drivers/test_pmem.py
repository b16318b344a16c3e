"""NVDIMMs: which files become one, what speaks against it, which options mean something."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.drivers.test_free_places import Q35
from vmplug.devnum import DevNum
from vmplug.drivers.block import OPTIONS, BlockDiskDriver
from vmplug.drivers.place import GuestAddress, MemorySlot
from vmplug.drivers.plug import BlockDrive, DiskFrontend, guest_address
from vmplug.drivers.pmem import NVDIMM_ALIGN_BYTES, NVDIMM_OPTIONS, check_nvdimm, is_pmem
from vmplug.drivers.ports import NewPlug
from vmplug.errors import SpecError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.pmem import PfnInfo
from vmplug.host.finding import NEVER_ALLOWED, Code, Severity, allow
from vmplug.host.kind import FoundBy

ID = "0123456789abcdef"
MIB = 1 << 20
PFN = PfnInfo(2 * MIB)
NVDIMM = {"block-driver": "nvdimm"}

PLAIN = DiskFile(host_path="/srv/a.img", size_bytes=64 * MIB, direct_io=True)
DAX = PLAIN._replace(pfn=PFN)
BEHIND_LOOP = DAX._replace(found_by=FoundBy.BACKING_FILE)
DISK = BlockDevice(
    devnum=DevNum(259, 0),
    device_node="/dev/pmem0",
    found_by=FoundBy.SYSFS,
    size_bytes=64 * MIB,
)


@pytest.mark.parametrize(
    ("device", "driver"),
    [
        (PLAIN, None),
        (DAX, None),  # a guest can write the block
        (DAX._replace(pfn=PfnInfo(None)), None),
        (BEHIND_LOOP, DiskFrontend.NVDIMM),
        (PLAIN._replace(found_by=FoundBy.BACKING_FILE), DiskFrontend.NVDIMM),
        (DISK, None),
    ],
)
def test_a_file_is_an_nvdimm_when_the_host_says_so_whatever_is_in_it(
    device: BlockDevice | DiskFile, driver: DiskFrontend | None
) -> None:
    assert BlockDiskDriver().driver_of(device) is driver
    if isinstance(device, DiskFile):
        assert is_pmem(device) is (driver is DiskFrontend.NVDIMM)


@pytest.mark.parametrize("driver", [d for d in DiskFrontend if d is not DiskFrontend.NVDIMM])
def test_what_was_said_counts_more(driver: DiskFrontend) -> None:
    options = BlockDiskDriver.parse({"block-driver": str(driver)})
    assert options.driver_of(DAX) is options.driver_of(BEHIND_LOOP) is driver
    assert BlockDiskDriver.parse(NVDIMM).driver_of(PLAIN) is DiskFrontend.NVDIMM
    assert BlockDiskDriver.parse(NVDIMM).driver_of(DISK) is DiskFrontend.NVDIMM


@pytest.mark.parametrize(
    ("device", "format_", "codes"),
    [
        (DAX, None, []),
        (DAX, "raw", []),
        (DAX, "qcow2", [Code.NOT_THAT_FORMAT]),
        (PLAIN, None, [Code.NO_PFN_SIGNATURE]),
        (DISK, None, []),
        (DISK, "qcow2", [Code.NOT_THAT_FORMAT]),
        (DAX._replace(size_bytes=3 * MIB), None, [Code.NVDIMM_SIZE]),
        (DISK._replace(size_bytes=64 * MIB + 512), None, [Code.NVDIMM_SIZE]),
        (DISK._replace(size_bytes=None), None, []),
        (DAX._replace(size_bytes=0), None, []),  # which is refused as empty
        (
            PLAIN._replace(size_bytes=MIB),
            "qcow2",
            [Code.NOT_THAT_FORMAT, Code.NVDIMM_SIZE, Code.NO_PFN_SIGNATURE],
        ),
    ],
)
def test_an_nvdimm_is_checked_for_what_the_guest_would_see(
    device: BlockDevice | DiskFile, format_: str | None, codes: list[Code]
) -> None:
    findings = list(check_nvdimm(device, format_))
    assert [finding.code for finding in findings] == codes
    assert all(device.host_path in finding.message for finding in findings)
    assert all(finding.hint for finding in findings)


@given(st.integers(1, 1 << 40))
def test_sizes_are_multiples_of_two_mib(size_bytes: int) -> None:
    findings = list(check_nvdimm(DAX._replace(size_bytes=size_bytes), None))
    assert bool(findings) is bool(size_bytes % NVDIMM_ALIGN_BYTES)
    assert all(f"has {size_bytes} bytes" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("unallocated", "free", "severity"),
    [
        (MIB, 0, Severity.ERROR),
        (MIB, MIB - 1, Severity.ERROR),
        (MIB, MIB, Severity.WARNING),
        (MIB, 1 << 40, Severity.WARNING),
    ],
)
def test_a_sparse_file_may_end_the_vm(unallocated: int, free: int, severity: Severity) -> None:
    sparse = DAX._replace(unallocated_bytes=unallocated, free_bytes=free)
    (finding,) = check_nvdimm(sparse, None)
    assert (finding.code, finding.severity) == (Code.SPARSE_NVDIMM, severity)
    assert finding.hint == f"fallocate --length {64 * MIB} /srv/a.img"
    assert list(check_nvdimm(sparse, None, read_only=True)) == []
    assert list(check_nvdimm(DAX, None)) == []


def test_a_file_without_the_block_is_only_warned_of() -> None:
    (finding,) = check_nvdimm(PLAIN, None)
    assert finding.severity is Severity.WARNING
    assert "NVDIMM_PFN_INFO" in finding.message


def test_an_image_that_cannot_be_an_nvdimm_is_converted_whatever_was_asked_for() -> None:
    image = DAX._replace(looks_like="qcow2")
    (unstated,) = check_nvdimm(image, None)
    (stated,) = check_nvdimm(image, "qcow2")
    assert (unstated.code, stated.code) == (Code.FORMAT_NOT_STATED, Code.NOT_THAT_FORMAT)
    for finding in (unstated, stated):
        assert "convert it (qemu-img convert -f qcow2 -O raw OLD NEW)" in finding.hint
        assert "format=qcow2" not in finding.hint


def test_a_wrong_size_can_be_allowed_and_a_wrong_format_cannot() -> None:
    findings = list(check_nvdimm(DAX._replace(size_bytes=MIB), "qcow2"))
    allowed = allow(findings, frozenset(Code))
    assert {finding.code: finding.severity for finding in allowed} == {
        Code.NOT_THAT_FORMAT: Severity.ERROR,
        Code.NVDIMM_SIZE: Severity.WARNING,
    }
    assert Code.NOT_THAT_FORMAT in NEVER_ALLOWED


def test_the_driver_checks_a_file_by_what_it_will_be() -> None:
    odd = DAX._replace(size_bytes=3 * MIB)
    as_memory = BlockDiskDriver.parse(NVDIMM)
    assert [f.code for f in as_memory.check(odd, read_only=False)] == [Code.NVDIMM_SIZE]
    assert list(BlockDiskDriver().check(odd, read_only=False)) == []


# Options


@pytest.mark.parametrize("key", sorted(NVDIMM_OPTIONS))
def test_the_options_of_an_nvdimm_are_options_of_a_disk(key: str) -> None:
    assert key in OPTIONS


@pytest.mark.parametrize(
    ("key", "said"),
    [("cache", "none"), ("serial", "x"), ("iops-read", "5"), ("discard", "unmap")],
)
def test_options_that_mean_nothing_are_refused_also_when_nobody_said_nvdimm(
    key: str, said: str
) -> None:
    options = BlockDiskDriver.parse({key: said})
    place = options.choose_place(BEHIND_LOOP, Q35, ())
    assert isinstance(place, MemorySlot)
    with pytest.raises(SpecError, match="does not apply to an NVDIMM") as caught:
        options.plan(NewPlug(id=ID, device=BEHIND_LOOP, read_only=False), place, Q35)
    assert caught.value.where == f"option {key}"
    assert caught.value.hint


def test_an_iothread_is_refused_in_a_file_that_is_to_be_an_nvdimm() -> None:
    options = BlockDiskDriver.parse({"iothread": "on"})
    assert options.driver_of(BEHIND_LOOP) is DiskFrontend.NVDIMM
    new = NewPlug(id=ID, device=BEHIND_LOOP, read_only=False)
    with pytest.raises(SpecError, match="does not apply to an NVDIMM") as caught:
        options.plan(new, MemorySlot(slot=0, index=0), Q35)
    assert caught.value.where == "option iothread"


# The plug


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("options", [{}, NVDIMM, {"format": "raw", "fstype": "ext4"}])
def test_an_nvdimm_is_planned_with_the_size_of_its_file(
    options: dict[str, str], *, read_only: bool
) -> None:
    driver = BlockDiskDriver.parse(options)
    place = driver.choose_place(BEHIND_LOOP, Q35, ("memory/0",))
    planned = driver.plan(NewPlug(id=ID, device=BEHIND_LOOP, read_only=read_only), place, Q35)
    assert isinstance(planned, BlockDrive)
    assert (planned.driver, planned.file, planned.size_bytes, planned.read_only) == (
        DiskFrontend.NVDIMM,
        "/srv/a.img",
        64 * MIB,
        read_only,
    )
    assert guest_address(planned, place) == GuestAddress(nvdimm_id=1, nvdimm_handle=2)
