"""Kata's saved state: what is read of it, and what is said of one that makes no sense."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.kata import DISK_ID, block, device, vfio, write_sandbox
from vmplug.errors import SpecError
from vmplug.host.kind import Identity
from vmplug.manager.kata.saved_state import (
    KataDevice,
    KataHold,
    decode_devices,
    decode_holds,
    read_kata,
)

NODE = f"drive-{DISK_ID}"


def decoded(saved: dict[str, Any]) -> KataDevice:
    (found,) = decode_devices(json.dumps({"Devices": [saved]}).encode(), "persist.json")
    return found


def test_a_disk_goes_by_its_number_and_has_two_names_in_qemu() -> None:
    found = decoded(block("/dev/sda", number="8:0", driver="virtio-blk", ReadOnly=True))
    assert found == KataDevice(
        id=DISK_ID,
        kind="block",
        identity=Identity.parse("block:8:0"),
        host_path="/dev/sda",
        attach_count=1,
        read_only=True,
        options={"block-driver": "virtio-blk"},
        fronts=(f"virtio-{NODE}",),
        parts=(f"virtio-{NODE}", NODE),
    )


def test_a_regular_file_goes_by_its_path() -> None:
    assert decoded(block("/srv/a.img")).identity == Identity.parse("file:/srv/a.img")


@pytest.mark.parametrize(
    "saved",
    [block("/p", Pmem=True, NvdimmID="1"), block("/p", driver="nvdimm", NvdimmID="1")],
    ids=["pmem", "driver"],
)
def test_persistent_memory_has_other_names(saved: dict[str, Any]) -> None:
    found = decoded(saved)
    assert found.fronts == (f"nvdimm{NODE}",)
    assert found.parts == (f"nvdimm{NODE}", f"nvdimmbackmem{NODE}")
    assert found.nvdimm_id == 1


def test_a_group_has_a_name_for_each_function() -> None:
    members = [vfio("vfio-a0", BDF="0000:3b:00.0", HostPath="/dev/vfio/1")]
    members.append(vfio("vfio-a1", BDF="0000:3b:00.1"))
    found = decoded(device("vfio", VFIODevs=members))
    assert (str(found.identity), found.host_path) == ("vfio:0000:3b:00.0", "/dev/vfio/1")
    assert found.fronts == ("vfio-a0", "vfio-a1")
    assert found.functions == ("0000:3b:00.0", "0000:3b:00.1")


def test_a_mediated_device_goes_by_its_uuid() -> None:
    uuid = "f79944e4-5a3d-11e8-99ce-479cbab002e4"
    member = vfio("vfio-a0", BDF="00:02.0", Type=2)
    member["SysfsDev"] = f"/sys/devices/pci0000:00/0000:00:02.0/{uuid}"
    assert decoded(device("vfio", VFIODevs=[member])).identity == Identity.of_vfio(uuid)


@pytest.mark.parametrize(
    ("kind", "number", "identity", "parts"),
    [
        ("vhost-user-blk-pci", (241, 0), "block:241:0", ("virtio-blk-a", "blk-a")),
        ("vhost-user-blk-pci", (-1, 0), "socket:/vu/s", ("virtio-blk-a", "blk-a")),
        ("vhost-user-scsi-pci", (242, 1), "block:242:1", ("scsi-blk-a", "char-blk-a")),
    ],
)
def test_a_vhost_user_device_has_its_connection_too(
    kind: str, number: tuple[int, int], identity: str, parts: tuple[str, ...]
) -> None:
    attributes = {"DevID": "blk-a", "SocketPath": "/vu/s", "Type": kind, "PCIPath": {}}
    major, minor = number
    found = decoded(device(kind, "b", VhostUserDev=attributes, Major=major, Minor=minor))
    assert (str(found.identity), found.host_path, found.parts) == (identity, "/vu/s", parts)


@pytest.mark.parametrize(
    ("saved", "identity"),
    [
        (device("generic"), "char:4:2"),
        (device("generic", "p", Major=-1), None),
        (device("block", "b"), None),
        (device("virtio-net-pci"), None),
        (device("of-tomorrow"), None),
    ],
)
def test_a_device_without_objects_in_qemu_has_no_names(
    saved: dict[str, Any], identity: str | None
) -> None:
    found = decoded(saved)
    assert found.identity == (Identity.parse(identity) if identity else None)
    assert (found.fronts, found.parts) == ((), ())


def test_a_sandbox_is_read_with_its_containers(tmp_path: Path) -> None:
    holds = {"c2": [(DISK_ID, "/dev/xvdb")], "c1": [(DISK_ID, "/dev/xvda"), ("other", "")]}
    state = write_sandbox(tmp_path / "5a1f", block("/a"), device("generic"), holds=holds)
    for source in (state, state.parent):
        found = read_kata(str(source))
        assert found.sandbox == "5a1f"
        assert [d.kind for d in found.devices] == ["block", "generic"]
        assert found.holds == (
            KataHold(device=DISK_ID, container="c1", container_path="/dev/xvda"),
            KataHold(device="other", container="c1", container_path=""),
            KataHold(device=DISK_ID, container="c2", container_path="/dev/xvdb"),
        )


@pytest.mark.parametrize("text", ["{}", '{"Devices": null}', '{"Devices": [], "Novelty": [1]}'])
def test_a_sandbox_may_have_no_devices(text: str) -> None:
    assert decode_devices(text.encode(), "persist.json") == ()
    assert decode_holds(text.encode(), "c1", "persist.json") == []


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"AttachCount": -1}, "$.Devices[0].AttachCount", ">= 0"),
        ({"AttachCount": "1"}, "$.Devices[0].AttachCount", "Expected `int`"),
        ({"Type": None}, "$.Devices[0].Type", "Expected `str`"),
        ({"DriverOptions": {"a": 1}}, "$.Devices[0].DriverOptions[...]", "Expected `str`"),
        ({"BlockDrive": {"ID": "x"}}, "$.Devices[0].BlockDrive", "required field `File`"),
        ({"BlockDrive": {"ID": "x", "File": "a"}}, "$.Devices[0].BlockDrive.File", "absolute"),
        ({"BlockDrive": {"ID": "x", "File": "/a\0"}}, "$.Devices[0].BlockDrive.File", "absolute"),
        ({"BlockDrive": {"ID": "", "File": "/a"}}, "$.Devices[0].BlockDrive.ID", "not a name"),
        ({"BlockDrive": {"ID": "a b", "File": "/a"}}, "$.Devices[0].BlockDrive.ID", "not a name"),
        (
            {"BlockDrive": {"ID": "vmplug-1", "File": "/"}},
            "$.Devices[0].BlockDrive.ID",
            "not a name",
        ),
        (
            {"Type": "vfio", "VFIODevs": [{"ID": "rp0"}]},
            "$.Devices[0].VFIODevs[0].ID",
            "not a name",
        ),
    ],
)
def test_a_malformed_device_is_told_with_its_place(
    change: dict[str, Any], where: str, what: str
) -> None:
    with pytest.raises(SpecError) as caught:
        decoded({**block("/a"), **change})
    assert caught.value.where == f"persist.json: {where}"
    assert what in caught.value.message


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b'{"Devices": 1}', b"[" * 9999]
)
def test_a_malformed_state_is_an_error(data: bytes) -> None:
    with pytest.raises(SpecError) as caught:
        decode_devices(data, "persist.json")
    assert caught.value.where.startswith("persist.json: $")


@pytest.mark.parametrize("source", ["5a1f-unknown", "/nowhere/persist.json", "/a\0b"])
def test_a_sandbox_that_is_not_there_is_told(source: str) -> None:
    with pytest.raises(SpecError, match="cannot be read") as caught:
        read_kata(source)
    assert caught.value.hint
