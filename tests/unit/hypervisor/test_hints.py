"""What to do about QEMU's refusals, in the words that each QEMU has for them."""

import pytest

from vmplug.drivers.ports import Command
from vmplug.hypervisor.qmp.monitor import _HINTS, command_error

REFUSALS = [
    ("vmplug bind", "group 26 is not viable"),
    ("vmplug bind", "VFIO group is not viable"),
    ("does not remap interrupts", "Failed to set iommu for container: Operation not permitted"),
    ("detach that one", "lun already used by 'vmplug-0123456789abcdef'"),
    ("vfio_iommu_type1", "No available IOMMU models"),
    ("another process has the group open", "failed to open /dev/vfio/26: Device or resource busy"),
    (
        "another process has the group open",
        "Could not open '/dev/vfio/26': Device or resource busy",
    ),
    (
        "another process has the group open",
        "vfio VFIO_FD9: error bind device fd=9 to iommufd=8: Device or resource busy",
    ),
    ("already in this VM", "device is already attached"),
    ("without a vIOMMU", "group 26 used in multiple address spaces"),
    (
        "LimitMEMLOCK",
        "Region pc.ram: vfio_dma_map(0x55, 0x0, 0x80000, 0x7f) = -12 (Cannot allocate memory)",
    ),
    (
        "LimitMEMLOCK",
        "Region mem: vfio_container_dma_map(0x55, 0x0, 0x80, 0x7) = -12 (Cannot allocate memory)",
    ),
    ("caching-mode=on", "We need to set caching-mode=on"),
    (
        "caching-mode=on",
        "Device assignment is not allowed without enabling caching-mode=on for Intel IOMMU.",
    ),
    ("another process has the disk open", 'Failed to get "write" lock'),
    ("another process has the disk open", 'Failed to get shared "write" lock'),
    (
        "vmplug reconcile",
        "slot 0 function 0 not available for nvme, in use by pci-testdev,id=vmplug-a1",
    ),
    ("vmplug reconcile", "Duplicate device ID 'vmplug-a1'"),
    ("vmplug reconcile", "Duplicate nodes with node-name='vmplug-a1'"),
    (
        "try again",
        "slot 0 function 0 not available for nvme, in use by pci-testdev,id=stranger",
    ),
    ("allow QEMU's user", "Could not open '/dev/sdb': Permission denied"),
    (
        "start the backend",
        "Failed to add chardev 'c0': Failed to connect to '/s': Connection refused",
    ),
    ("DAX", "Property 'vhost-user-fs-pci.cache-size' not found"),
    (
        "only their VF token",
        "vfio 0000:09:00.1: error getting device from group 30: Permission denied",
    ),
    ("cannot map more memory regions", "a used vhost backend has no free memory slots left"),
    (
        "cannot map more memory regions",
        "a used vhost backend has not enough free memory slots left",
    ),
    (
        "cannot map all of the VM's memory",
        "vhost backend memory slots limit is less than current number of present memory slots",
    ),
    (
        "cannot map all of the VM's memory",
        "used (9) vhost backend memory slots exceed the device limit (8).",
    ),
    (
        "cannot map all of the VM's memory",
        "vhost backend memory slots limit (8) is less than current number of used (9)",
    ),
    (
        "maxmem",
        "not enough space, currently 0x0 in use of total space for memory devices 0x0",
    ),
    ("root ports", "Bus 'pcie.0' does not support hotplugging"),
]
"""A piece of each hint with a refusal that it is for; of QEMU 7.2 first, then of 10 and 11."""


@pytest.mark.parametrize(("remedy", "words"), REFUSALS)
def test_a_refusal_has_its_remedy(remedy: str, words: str) -> None:
    hint = command_error(Command("device_add", {}), "GenericError", words).hint
    assert remedy in (hint or "")


def test_every_hint_is_for_words_that_a_qemu_says() -> None:
    said = [words for _, words in REFUSALS]
    assert [piece for piece, _ in _HINTS if not any(piece in words for words in said)] == []


def test_other_words_have_no_hint() -> None:
    error = command_error(Command("device_add", {}), "GenericError", "Property 'x' not found")
    assert error.hint is None


def test_a_qemu_that_lacks_a_command_is_too_old() -> None:
    error = command_error(Command("query-chardev", {}), "CommandNotFound", "it is not known")
    assert error.hint == "this QEMU is too old: vmplug needs 7.2 or later"
