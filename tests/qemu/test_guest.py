"""The tiny guest answers truly: what it says is compared with what was plugged and what QEMU says.

Everything here is plugged by hand, with no part of the product.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from guest import console as console_module
from guest.console import GuestConsole, GuestDisk, GuestError, GuestTimeoutError

from tests.support.disks import disk_image, loop_device, qcow2_image
from tests.support.vm import GuestVm, pci_bridge, root_ports, scsi_controller, start_vm

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture(scope="module")
def q35(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    devices = [*root_ports(2), *scsi_controller()]
    with start_vm(tmp_path_factory.mktemp("q35"), devices=devices) as vm:
        yield vm


@pytest.fixture(scope="module")
def pc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with start_vm(tmp_path_factory.mktemp("pc"), machine="pc", devices=pci_bridge()) as vm:
        yield vm


@contextmanager
def plugged(
    vm: GuestVm, blockdev: Mapping[str, object], device: Mapping[str, object]
) -> Iterator[GuestDisk]:
    """A disk `disk0` on a block node `node0`, as the guest sees it; gone again at the end."""
    qmp = vm.oracle
    with ExitStack() as undo:
        qmp.execute("blockdev-add", {"node-name": "node0", **blockdev})
        undo.callback(qmp.execute, "blockdev-del", {"node-name": "node0"})
        qmp.execute("device_add", {"id": "disk0", "drive": "node0", **device})
        undo.callback(vm.console.wait_for_disks, 0)
        undo.callback(qmp.wait_event, "DEVICE_DELETED", device="disk0")
        undo.callback(qmp.execute, "device_del", id="disk0")
        (disk,) = vm.console.wait_for_disks(1)
        yield disk


def on_root_port(**properties: object) -> dict[str, object]:
    return {"driver": "virtio-blk-pci", "bus": "rp1", "addr": "0x0", **properties}


def on_scsi(scsi_id: int, lun: int, **properties: object) -> dict[str, object]:
    address = {"channel": 0, "scsi-id": scsi_id, "lun": lun}
    return {"driver": "scsi-hd", "bus": "scsi0.0", **address, **properties}


def raw_file(path: Path, **options: object) -> dict[str, object]:
    return {"driver": "file", "filename": str(path), **options}


def path_in_qemu(vm: GuestVm, qdev_id: str) -> str:
    """Slots from the root bus down to a device, out of QEMU's own tree."""

    def find(devices: list[dict[str, Any]]) -> list[int]:
        for device in devices:
            below = find(device.get("pci_bridge", {}).get("devices", []))
            if below or device["qdev_id"] == qdev_id:
                return [device["slot"], *below]
        return []

    (root_bus,) = vm.oracle.execute("query-pci")
    return "/".join(f"{slot:02x}" for slot in find(root_bus["devices"]))


def image_in_qemu(vm: GuestVm) -> dict[str, Any]:
    (drive,) = vm.oracle.execute("query-block")
    inserted: dict[str, Any] = drive["inserted"]
    return inserted


def property_in_qemu(vm: GuestVm, name: str) -> object:
    return vm.oracle.execute("qom-get", path="/machine/peripheral/disk0", property=name)


def test_virtio_disk_on_a_root_port(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 16, "first-disk")
    with plugged(q35, raw_file(image), on_root_port(serial="S-1 ä,b=c%20")) as disk:
        assert disk.name == "vda"
        assert disk.marker == "first-disk"
        assert disk.size_bytes == 16 * MIB == image_in_qemu(q35)["image"]["virtual-size"]
        assert not disk.read_only
        assert disk.serial == "S-1 ä,b=c%20" == property_in_qemu(q35, "serial")
        assert disk.write_cache == "write back"
        assert disk.pci_path == "11/00" == path_in_qemu(q35, "disk0")
        assert disk.scsi_address is None


def test_properties_that_forbid_are_seen(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "read-only")
    strict = on_root_port(**{"write-cache": "off", "discard": False})
    with plugged(q35, raw_file(image, **{"read-only": True}), strict) as disk:
        assert disk.read_only
        assert image_in_qemu(q35)["ro"]
        assert disk.serial == ""
        assert disk.write_cache == "write through"
        assert disk.discard_max_bytes == 0
        with pytest.raises(GuestError, match="dd:"):
            q35.console.write("vda", 0, b"must not arrive")
    assert image.read_bytes().startswith(b"read-only.")


def test_disk_behind_a_bridge(pc: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "behind-bridge")
    behind = {"driver": "virtio-blk-pci", "bus": "br0", "addr": "0x3"}
    with plugged(pc, raw_file(image), behind) as disk:
        assert disk.marker == "behind-bridge"
        assert disk.size_bytes == 2 * MIB
        assert disk.pci_path == "10/03" == path_in_qemu(pc, "disk0")


@pytest.mark.parametrize(("scsi_id", "lun"), [(0, 3), (7, 255), (2, 300)])
def test_scsi_disk(q35: GuestVm, tmp_path: Path, scsi_id: int, lun: int) -> None:
    image = disk_image(tmp_path / "a.img", 4, "scsi")
    with plugged(q35, raw_file(image), on_scsi(scsi_id, lun, serial="SCSI-1")) as disk:
        assert disk.name.startswith("sd")
        assert disk.marker == "scsi"
        assert disk.size_bytes == 4 * MIB
        assert disk.serial == "SCSI-1"
        assert disk.scsi_address == f"{scsi_id}:{lun}"
        assert property_in_qemu(q35, "scsi-id") == scsi_id
        assert property_in_qemu(q35, "lun") == lun
        assert disk.pci_path == "08" == path_in_qemu(q35, "scsi0")


def test_qcow2_disk(q35: GuestVm, tmp_path: Path) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 8, "inside-qcow2")
    with plugged(q35, {"driver": "qcow2", "file": raw_file(image)}, on_root_port()) as disk:
        assert (disk.marker, disk.size_bytes) == ("inside-qcow2", 8 * MIB)


@pytest.mark.root
def test_loop_device_with_a_window(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 4, "outside")
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(b"inside.")
    with loop_device(image, read_only=True, offset=MIB, size_limit=2 * MIB) as node:
        blockdev = {"driver": "host_device", "filename": str(node), "read-only": True}
        with plugged(q35, blockdev, on_root_port()) as disk:
            assert (disk.marker, disk.size_bytes) == ("inside", 2 * MIB)
            assert disk.read_only
    assert str(node) not in subprocess.check_output(["losetup", "--all"], text=True)


def test_what_the_guest_writes_is_on_the_host(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "to-be-written")
    data = os.urandom(20_001)
    with plugged(q35, raw_file(image), on_root_port()):
        q35.console.write("vda", 777, data)

        assert image.read_bytes()[777 : 777 + len(data)] == data
        assert q35.console.read("vda", 777, len(data)) == data


def test_what_the_host_writes_is_read_past_the_cache(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "before")
    with plugged(q35, raw_file(image), on_root_port()):
        assert q35.console.read("vda", 0, 6) == b"before"
        disk_image(image, 1, "afterwards")

        assert q35.console.read("vda", 0, 10) == b"afterwards"


def test_reading_past_the_end_is_an_error(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "short")
    with (
        plugged(q35, raw_file(image), on_root_port()),
        pytest.raises(GuestError, match="only 10 of 20 bytes"),
    ):
        q35.console.read("vda", MIB - 10, 20)


def test_discard_reaches_the_host(q35: GuestVm, tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"x" * MIB)
    with plugged(q35, raw_file(image, discard="unmap"), on_root_port()) as disk:
        assert disk.discard_max_bytes > 0
        q35.console.run("blkdiscard -o 65536 -l 131072 /dev/vda")
    assert image.read_bytes().count(b"\0") == 131072


@pytest.mark.parametrize("name", ["vdz", "nothing/../null", "$(reboot)"])
def test_no_such_disk(q35: GuestVm, name: str) -> None:
    with pytest.raises(GuestError, match="no such disk") as caught:
        q35.console.write(name, 0, b"nowhere")
    assert caught.value.rc == 19


@pytest.mark.parametrize(
    ("line", "rc", "output"),
    [
        ("false", 1, ""),
        ("echo one; echo two >&2; exit 3", 3, "one\ntwo"),
        ("printf 'no newline'; (exit 4)", 4, "no newline"),
    ],
)
def test_failing_line(q35: GuestVm, line: str, rc: int, output: str) -> None:
    with pytest.raises(GuestError) as caught:
        q35.console.run(line)
    assert (caught.value.line, caught.value.rc, caught.value.output) == (line, rc, output)


def test_nonsense_leaves_the_guest_alive(q35: GuestVm) -> None:
    with pytest.raises(GuestError, match="syntax error"):
        q35.console.run("if ( ;")
    with pytest.raises(ValueError, match="not one line"):
        q35.console.run("echo one\necho two")
    assert q35.console.run("") == ""
    assert q35.console.run("echo 'Grüße  \\n'") == "Grüße  \\n"


def test_long_line_arrives_whole(q35: GuestVm) -> None:
    text = "0123456789abcdef" * ((console_module.LINE_BYTES_MAX - 16) // 16)
    assert q35.console.run(f"echo {text}") == text
    with pytest.raises(ValueError, match="not one line"):
        q35.console.run(f"echo {text} {text}")


def test_late_answer_is_not_taken_for_the_next(q35: GuestVm) -> None:
    with pytest.raises(GuestTimeoutError):
        q35.console.run("sleep 0.5; echo late", timeout_s=0.1)
    assert q35.console.run("echo in step") == "in step"


def test_waiting_for_disks_that_do_not_come(q35: GuestVm) -> None:
    start = time.monotonic()
    with pytest.raises(GuestTimeoutError, match=r"no 2 disks in the guest after 0\.3 s: none"):
        q35.console.wait_for_disks(2, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - start < 5


def test_waiting_sees_a_disk_that_comes_later(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "later")
    q35.console.run("(wait_for_disks 1 500 >/tmp/new; mv /tmp/new /tmp/seen) >/dev/null 2>&1 &")
    with plugged(q35, raw_file(image), on_root_port()):
        assert "name=vda" in q35.console.run(
            "until cat /tmp/seen 2>/dev/null; do usleep 10000; done"
        )


def test_who_connects_later_is_answered(pc: GuestVm) -> None:
    pc.console.run("true")
    pc.release_console()
    with GuestConsole.connect(pc.console_path, 10) as second:
        assert second.run("echo second") == "second"
    assert pc.console.run("echo third") == "third"


def test_console_from_a_terminal(pc: GuestVm) -> None:
    pc.console.run("true")
    pc.release_console()
    command = [sys.executable, "guest/console.py", str(pc.console_path)]
    answers = [
        subprocess.run([*command, line], capture_output=True, text=True, check=False)
        for line in ("disks", "echo 1; exit 7")
    ]
    assert [(a.returncode, a.stdout, a.stderr) for a in answers] == [(0, "", ""), (7, "1\n", "")]


@pytest.mark.parametrize("count", [2, 15, 16, 32])
def test_root_ports_fit(tmp_path: Path, count: int) -> None:
    with start_vm(tmp_path, devices=root_ports(count), guest=False, paused=True) as vm:
        (root_bus,) = vm.oracle.execute("query-pci")
        ports = {device["qdev_id"] for device in root_bus["devices"]}
        assert ports >= {f"rp{index}" for index in range(count)}


def test_vm_that_does_not_start_says_why(tmp_path: Path) -> None:
    nonsense = {"driver": "no-such-device"}
    with (
        pytest.raises(RuntimeError, match="'no-such-device' is not a valid device model name"),
        start_vm(tmp_path, devices=[nonsense], guest=False),
    ):
        pytest.fail("QEMU took nonsense")


def test_vm_ends_with_its_block(tmp_path: Path) -> None:
    with start_vm(tmp_path, guest=False, paused=True) as vm:
        assert Path(f"/proc/{vm.pid}/exe").resolve().name == "qemu-system-x86_64"
    assert not Path(f"/proc/{vm.pid}").exists()
    assert not vm.qmp_path.parent.exists()


def test_connections_end_with_qemu(tmp_path: Path) -> None:
    with start_vm(tmp_path, guest=False, paused=True) as vm:
        vm.kill()
        with pytest.raises(ConnectionError):
            vm.oracle.execute("query-status")
        with pytest.raises(ConnectionError):
            GuestConsole.connect(vm.console_path, 5)
