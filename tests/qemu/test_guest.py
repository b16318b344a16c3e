"""The tiny guest answers truly: what it says is compared with what was plugged and what QEMU says.

Everything here is plugged by hand, with no part of the product.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from guest import console as console_module
from guest.console import (
    GuestConsole,
    GuestDisk,
    GuestError,
    GuestNic,
    GuestPmem,
    GuestTimeoutError,
)

from tests.cli.world import loops_below
from tests.support.daemons import virtiofsd
from tests.support.disks import PFN_DATA_OFFSET, dax_image, disk_image, loop_device, qcow2_image
from tests.support.vm import (
    GuestVm,
    pci_bridge,
    root_ports,
    scsi_controller,
    shared_memory,
    start_vm,
)

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture(scope="module")
def q35(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with start_vm(
        tmp_path_factory.mktemp("q35"),
        machine="q35,nvdimm=on",
        memory="256M,slots=2,maxmem=1G",
        devices=[*root_ports(2), *scsi_controller()],
        extra=shared_memory(256),
    ) as vm:
        yield vm


@pytest.fixture(scope="module")
def pc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestVm]:
    with start_vm(tmp_path_factory.mktemp("pc"), machine="pc", devices=pci_bridge()) as vm:
        yield vm


@pytest.fixture(scope="module")
def shared_by_9p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, shared_by_9p: Path) -> Iterator[GuestVm]:
    share = f"local,id=share,path={shared_by_9p},security_model=none,multidevs=remap"
    device = {"driver": "virtio-9p-pci", "bus": "pcie.0", "fsdev": "share", "mount_tag": "tag"}
    with start_vm(
        tmp_path_factory.mktemp("full"),
        flavour="full",
        devices=[device, *root_ports(2)],
        extra=["-fsdev", share],
    ) as vm:
        yield vm


@contextmanager
def plugged(
    vm: GuestVm, blockdev: Mapping[str, object], device: Mapping[str, object]
) -> Iterator[GuestDisk]:
    """A disk `disk0` on a block node `node0`, as the guest sees it; gone again at the end."""
    with ExitStack() as undo:
        vm.oracle.execute("blockdev-add", {"node-name": "node0", **blockdev})
        undo.callback(vm.oracle.execute, "blockdev-del", {"node-name": "node0"})
        undo.callback(vm.console.wait_for_disks, 0)
        undo.enter_context(plugged_device(vm, {"id": "disk0", "drive": "node0", **device}))
        (disk,) = vm.console.wait_for_disks(1)
        yield disk


@contextmanager
def plugged_device(vm: GuestVm, device: Mapping[str, object]) -> Iterator[None]:
    vm.oracle.execute("device_add", device)
    try:
        yield
    finally:
        vm.oracle.execute("device_del", id=device["id"])
        vm.oracle.wait_event("DEVICE_DELETED", device=device["id"])


def plug_nvdimm(vm: GuestVm, qdev_id: str, image: Path, *, read_only: bool = False) -> None:
    """Stays until the VM ends: QEMU cannot unplug it."""
    memory_id = f"{qdev_id}-memory"
    memory = {"mem-path": str(image), "size": image.stat().st_size, "share": True}
    backend = {"qom-type": "memory-backend-file", "id": memory_id, "readonly": read_only}
    vm.oracle.execute("object-add", {**backend, **memory})
    vm.oracle.execute(
        "device_add", driver="nvdimm", id=qdev_id, memdev=memory_id, unarmed=read_only
    )


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
    assert loops_below(tmp_path) == frozenset()


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
        q35.console.run("sleep 1; echo late", timeout_s=0.02)
    assert q35.console.run("echo in step") == "in step"


def test_waiting_for_disks_that_do_not_come(q35: GuestVm) -> None:
    start = time.monotonic()
    with pytest.raises(GuestTimeoutError, match=r"no 2 disks in the guest after 0\.3 s: none"):
        q35.console.wait_for_disks(2, timeout_s=0.3)
    assert time.monotonic() - start >= 0.3


def test_what_ends_in_the_background_takes_nothing_of_a_line(q35: GuestVm) -> None:
    text = "0123456789abcdef" * 128
    jobs = "until [ -e /tmp/end ]; do (usleep 1000 &); usleep 1000; done"
    q35.console.run(f"rm -f /tmp/end; ({jobs}) >/dev/null 2>&1 &")
    for _ in range(5):
        assert q35.console.run(f"echo {text}") == text
    q35.console.run(": >/tmp/end")


def test_waiting_sees_a_disk_that_comes_later(q35: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "later")
    job = "wait_for_disks 1 6000 >/tmp/new; mv /tmp/new /tmp/seen"
    q35.console.run(f"rm -f /tmp/seen; ({job}) >/dev/null 2>&1 &")
    with plugged(q35, raw_file(image), on_root_port()):
        assert "name=vda" in q35.console.run(
            "until cat /tmp/seen 2>/dev/null; do usleep 10000; done"
        )


def test_waiting_for_a_condition(q35: GuestVm) -> None:
    q35.console.run("rm -f /tmp/flag; (usleep 300000; echo >/tmp/flag) >/dev/null 2>&1 &")
    q35.console.wait_until("[ -e /tmp/flag ]")
    with pytest.raises(GuestTimeoutError, match=r"no success of 'echo \$x; false'.* 0\.1 s: none"):
        q35.console.wait_until("echo $x; false", timeout_s=0.1)


def test_persistent_memory(q35: GuestVm, tmp_path: Path) -> None:
    plain = disk_image(tmp_path / "plain.img", 16, "plain memory")
    with_header = dax_image(tmp_path / "dax.img", 16)
    text = b"written past the page cache " * 1000
    console = q35.console

    console.load_modules("nfit", "nd_pmem")
    plug_nvdimm(q35, "nvdimm0", plain, read_only=True)
    expected = GuestPmem(
        name="pmem0", size_bytes=16 * MIB, read_only=True, dax=False, marker="plain memory"
    )
    assert console.wait_for_pmems(1) == [expected]
    plug_nvdimm(q35, "nvdimm1", with_header)
    first, second = console.wait_for_pmems(2)
    assert first == expected
    size = 16 * MIB - PFN_DATA_OFFSET
    assert second == GuestPmem(name="pmem1", size_bytes=size, read_only=False, dax=True, marker="")
    assert [memory["data"]["id"] for memory in q35.oracle.execute("query-memory-devices")] == [
        "nvdimm0",
        "nvdimm1",
    ]

    directory = console.mount("ext4", "/dev/pmem1", "dax")
    assert "dax=always" in console.run(f"grep {directory} /proc/mounts")
    console.write_file(f"{directory}/file", text)
    assert console.read_file(f"{directory}/file") == text
    console.unmount(directory)
    reader = ["debugfs", "-R", "cat file", f"{with_header}?offset={PFN_DATA_OFFSET}"]
    assert subprocess.check_output(reader, stderr=subprocess.DEVNULL) == text


def test_random_numbers(q35: GuestVm) -> None:
    console = q35.console
    device = {"driver": "virtio-rng-pci", "id": "rng0", "rng": "urandom", "bus": "rp0"}
    console.load_modules("virtio-rng")
    source = {"qom-type": "rng-random", "id": "urandom", "filename": "/dev/urandom"}
    q35.oracle.execute("object-add", source)
    with plugged_device(q35, {**device, "addr": "0x0"}):
        console.wait_until("grep virtio_rng /sys/class/misc/hw_random/rng_available")
        numbers = console.run("head -c 32 /dev/hwrng | base64")
        assert numbers != console.run("head -c 32 /dev/hwrng | base64")
    console.wait_until("! grep virtio_rng /sys/class/misc/hw_random/rng_available")
    q35.oracle.execute("object-del", id="urandom")


def test_network_card(q35: GuestVm) -> None:
    console, qmp = q35.console, q35.oracle
    mac = "52:54:00:12:34:56"
    console.load_modules("virtio_net")
    assert console.wait_for_nics(0) == []
    qmp.execute("netdev_add", type="user", id="net0")
    device = {"driver": "virtio-net-pci", "id": "nic0", "netdev": "net0", "mac": mac}
    with plugged_device(q35, {**device, "bus": "rp0", "addr": "0x0"}):
        (down,) = console.wait_for_nics(1)
        assert down == GuestNic(
            name="eth0", mac=mac, mtu=1500, has_carrier=False, pci_path="10/00"
        )
        assert down.pci_path == path_in_qemu(q35, "nic0")
        console.run("ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up")
        console.wait_until("nics | grep carrier=1")
        assert "1 packets received" in console.run("ping -c 1 -W 60 10.0.2.2")
        qmp.execute("set_link", name="nic0", up=False)
        console.wait_until("nics | grep carrier=0")
    assert console.wait_for_nics(0) == []
    qmp.execute("netdev_del", id="net0")


def test_waiting_for_network_cards_that_do_not_come(q35: GuestVm) -> None:
    with pytest.raises(GuestTimeoutError, match=r"no 1 network cards .* after 0\.1 s: none"):
        q35.console.wait_for_nics(1, timeout_s=0.1)


@pytest.mark.root
def test_shared_directory(q35: GuestVm, tmp_path: Path) -> None:
    console, qmp = q35.console, q35.oracle
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "from-host").write_bytes(b"host")
    device = {"driver": "vhost-user-fs-pci", "id": "fs0", "chardev": "fs", "tag": "a tag"}
    with virtiofsd(shared) as daemon:
        address = {"type": "unix", "data": {"path": str(daemon.socket_path)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        qmp.execute("chardev-add", id="fs", backend=backend)
        with plugged_device(q35, {**device, "bus": "rp0", "addr": "0x0"}):
            console.load_modules("virtiofs")
            console.wait_until("ls /sys/bus/virtio/drivers/virtiofs/virtio*")
            directory = console.mount("virtiofs", "a tag")
            assert console.read_file(f"{directory}/from-host") == b"host"
            console.write_file(f"{directory}/from-guest", b"guest")
            console.unmount(directory)
        qmp.execute("chardev-remove", id="fs")
    assert (shared / "from-guest").read_bytes() == b"guest"


def test_9p_in_the_full_guest(full: GuestVm, shared_by_9p: Path) -> None:
    (shared_by_9p / "from-host").write_bytes(b"host")
    directory = full.console.mount("9p", "tag", "trans=virtio,version=9p2000.L")
    assert full.console.read_file(f"{directory}/from-host") == b"host"
    full.console.write_file(f"{directory}/from-guest", b"guest")
    full.console.unmount(directory)
    assert (shared_by_9p / "from-guest").read_bytes() == b"guest"


def test_file_system_in_the_full_guest(full: GuestVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 4, "")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with plugged(full, raw_file(image), on_root_port()):
        directory = full.console.mount("ext4", "/dev/vda")
        full.console.write_file(f"{directory}/file", b"text")
        full.console.unmount(directory)
    assert subprocess.check_output(["debugfs", "-R", "cat file", str(image)]) == b"text"


def test_unknown_file_system(q35: GuestVm) -> None:
    with pytest.raises(GuestError, match="mount:"):
        q35.console.mount("9p", "tag", "trans=virtio")


def test_microvm(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "on-mmio")
    node = {"node-name": "node0", **raw_file(image)}
    with start_vm(
        tmp_path,
        machine="microvm,acpi=on",
        devices=[{"driver": "virtio-blk-device", "id": "disk0", "drive": "node0"}],
        extra=["-blockdev", json.dumps(node)],
    ) as vm:
        (disk,) = vm.console.wait_for_disks(1)
        assert (disk.name, disk.marker, disk.size_bytes) == ("vda", "on-mmio", 2 * MIB)
        assert disk.pci_path == ""
        bus = property_in_qemu(vm, "parent_bus")
        assert "virtio-mmio-bus" in str(bus)
        vm.console.write("vda", 512, b"from the guest")
    assert image.read_bytes()[512:526] == b"from the guest"


@pytest.mark.skipif(
    shutil.which("qemu-system-s390x") is None,
    reason="no qemu-system-s390x: install that package",
)
def test_machine_of_another_architecture(tmp_path: Path) -> None:
    with start_vm(
        tmp_path,
        qemu="qemu-system-s390x",
        machine="s390-ccw-virtio",
        guest=False,
        paused=True,
    ) as vm:
        assert vm.oracle.execute("query-target") == {"arch": "s390x"}


def test_who_connects_later_is_answered(pc: GuestVm) -> None:
    pc.console.run("true")
    pc.release_console()
    with GuestConsole.connect(pc.console_path) as second:
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
            GuestConsole.connect(vm.console_path)
