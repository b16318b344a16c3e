"""Every kind of block device that a host may have, as a device to hand over.

The real drivers make them; lsblk and ioctls say what vmplug should have read, a real QEMU takes
some of them.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import topology
from tests.cli.command import Vmplug
from tests.lab.blocks import (
    HOST,
    MIB,
    as_lsblk_says,
    code,
    facts,
    facts_of_lsblk,
    findings,
    is_free,
    kernel_name,
    load,
    load_with,
    looped,
    mapped,
    mounted,
    null_disk,
    number,
    obey,
    picture,
    refusal,
    run,
    scsi_disks,
    settle,
    swapped_to,
    udev,
    zram,
)
from tests.support.checking import READING, WRITING, want
from tests.support.disks import disk_image
from tests.support.lab import OuterQemu, wait_until
from tests.support.vm import GuestVm, root_ports, start_vm
from vmplug import Code, DeviceManager, Qemu, VfioInfo, find_requests
from vmplug.host.file_id import file_id, has_open
from vmplug.manager.examine import examine
from vmplug.oci.spec import parse_config

RAM_DISK = Path("/dev/ram0")
VIRTIO_DISK = Path("/dev/vda")
CHECK_REFUSES = 4
DISC = {"driver": "null-co", "node-name": "disc", "size": MIB, "read-only": True}


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    load_with("null_blk", nr_devices=0)
    load_with("zram", num_devices=1)
    load_with("nbd", nbds_max=1)
    load_with("brd", rd_nr=1, rd_size=8192)
    load("loop", "sd_mod", "sr_mod", "dm-mod", "dm-multipath", "dm-round-robin", "virtio_scsi")


@pytest.fixture
def luns() -> Iterator[list[Path]]:
    with scsi_disks() as disks:
        yield disks


def namespace(serial: str) -> Path:
    """The disk of an NVMe controller of the lab, once the kernel has found it."""

    def disks() -> list[Path]:
        return [
            path.parent.parent
            for path in Path("/sys/block").glob("nvme*/device/serial")
            if path.read_text().strip() == serial and (path.parent.parent / "dev").exists()
        ]

    wait_until(lambda: bool(disks()), f"disk of {serial}")
    (found,) = disks()
    return Path("/dev", found.name)


def vmplug(*words: str | Path) -> tuple[int, Any]:
    """A command's exit status, and its answer in JSON."""
    done = Vmplug(Path("/run/vmplug"))(*words, "--json")
    return done.status, json.loads(done.stdout or done.stderr)


def on_the_command_line(*nodes: Path) -> list[str]:
    """`vmplug check` of many devices at once."""
    return ["check", *(word for node in nodes for word in ("-d", f"b:{number(node)}:{node}"))]


# All at once


@contextmanager
def everything(directory: Path) -> Iterator[dict[str, Path]]:
    """A device of each kind, beside those that the lab has."""
    with ExitStack() as stack:
        image = disk_image(directory / "a.img", 8, "x")
        luns = stack.enter_context(scsi_disks(sector_size=4096, removable=1))
        null = stack.enter_context(null_disk("lab1"))
        yield {
            "SCSI": luns[0],
            "another LUN": luns[1],
            "another target": luns[2],
            "null": null,
            "zram": stack.enter_context(zram()),
            "ram": RAM_DISK,
            "virtio": VIRTIO_DISK,
            "NVMe": namespace(topology.NVME_SERIAL),
            "NVMe, one way of several": namespace(topology.SRIOV_SERIAL),
            "loop": stack.enter_context(looped(image, "--sizelimit=1M", "--sector-size=2048")),
            "loop, read-only": stack.enter_context(looped(null, "--read-only")),
            "mapped": stack.enter_context(mapped("lab", f"0 2048 linear {luns[3]} 0")),
        }


def test_every_kind_of_device_is_known_as_the_kernel_and_lsblk_know_it(tmp_path: Path) -> None:
    with everything(tmp_path) as devices:
        told = facts_of_lsblk()
        told |= facts_of_lsblk(RAM_DISK)  # it must be asked for by its name
        for kind, node in devices.items():
            known = facts(node)
            assert known == told[kernel_name(node)], kind
            options = ("--getsize64", "--getss", "--getro")
            answers = run("blockdev", *options, node).split()
            assert answers == [
                str(known.size_bytes),
                str(known.sector_bytes),
                str(int(bool(known.read_only))),
            ], kind
        scsi, loop = facts(devices["SCSI"]), facts(devices["loop"])
        assert (scsi.size_bytes, scsi.sector_bytes, scsi.removable) == (16 * MIB, 4096, True)
        assert (loop.size_bytes, loop.sector_bytes, loop.removable) == (MIB, 2048, False)


def test_the_command_line_says_of_all_what_speaks_against_them_and_changes_nothing() -> None:
    with (
        zram() as memory,
        null_disk("laba") as disk,
        looped(disk, "--read-only") as loop,
        swapped_to(memory),
    ):
        before = picture(Path("/dev"))
        asked = on_the_command_line(memory, disk, loop, RAM_DISK, VIRTIO_DISK)
        status, answer = vmplug(*asked)
        assert picture(Path("/dev")) == before
        told = {(problem["container_path"], problem["code"]) for problem in answer["problems"]}
        assert (status, answer["ok"]) == (CHECK_REFUSES, False)
        assert told == {
            (str(memory), "is-swap"),
            (str(disk), "has-holders"),
            (str(loop), "read-only-device"),
            (str(loop), "in-use-by-vm"),  # by the VM that is to have the disk
        }


# SCSI


def test_a_disk_made_read_only_is_for_readers_until_it_is_made_writable(luns: list[Path]) -> None:
    disk, *others = luns
    run("blockdev", "--setro", disk)
    finding = refusal(disk)
    assert finding.code is Code.READ_ONLY_DEVICE
    assert is_free(disk, wish=READING)
    assert is_free(*others)
    assert as_lsblk_says(*luns)
    obey(finding)
    assert is_free(disk)


def test_a_disk_that_protects_itself_stays_for_readers() -> None:
    with scsi_disks(wp=1) as luns:
        finding = refusal(luns[0])
        assert finding.code is Code.READ_ONLY_DEVICE
        assert as_lsblk_says(luns[0])
        obey(finding)  # the kernel takes it, and the disk does not
        assert code(luns[0]) is Code.READ_ONLY_DEVICE
        assert is_free(*luns, wish=READING)


def test_a_disk_that_is_offline_cannot_be_read_and_one_that_is_gone_is_no_device(
    luns: list[Path],
) -> None:
    disk = luns[1]
    device = Path(f"/sys/block/{disk.name}/device").resolve()
    (device / "state").write_text("offline\n")
    (finding,) = findings(disk)
    assert (finding.code, finding.hint) == (
        Code.UNREADABLE,
        "the kernel log may have the reason: dmesg",
    )
    (device / "state").write_text("running\n")
    assert is_free(disk)
    asked = on_the_command_line(disk)
    (device / "delete").write_text("1")
    wait_until(lambda: not disk.exists(), "end of the disk")
    status, answer = vmplug(*asked)
    (problem,) = answer["problems"]
    assert (status, problem["code"]) == (CHECK_REFUSES, "no-such-device")


@contextmanager
def cd_drive(outer: OuterQemu) -> Iterator[Path]:
    """A drive without a disc, at a port that is free."""
    port, controller, drive = topology.FREE_PORT, "scsi-controller", "cd-drive"
    device = topology.device_behind(port, "virtio-scsi-pci", qdev_id=controller)
    outer.add(device)
    try:
        outer.execute("device_add", driver="scsi-cd", id=drive, bus=f"{controller}.0")
        node = Path("/dev/sr0")
        wait_until(node.exists, "CD drive")
        yield node
        Path(f"/sys/block/{node.name}/device/delete").write_text("1")
        wait_until(lambda: not node.exists(), "end of the CD drive")
        outer.execute("device_del", id=drive)
    finally:
        outer.remove(device)


def test_a_drive_is_read_when_there_is_a_disc_in_it() -> None:
    with OuterQemu.connect() as outer, cd_drive(outer) as drive:
        finding = refusal(drive, READING)
        assert finding.code is Code.NO_MEDIUM
        with pytest.raises(OSError, match="No medium found"):
            drive.open("rb")
        outer.execute("blockdev-add", **DISC)
        outer.execute("blockdev-open-tray", id="cd-drive")
        assert code(drive, READING) is Code.NO_MEDIUM
        outer.execute("blockdev-insert-medium", **{"id": "cd-drive", "node-name": "disc"})
        outer.execute("blockdev-close-tray", id="cd-drive")
        drive.open("rb").close()
        assert is_free(drive, wish=READING)
        assert as_lsblk_says(drive)
        assert code(drive, WRITING) is Code.READ_ONLY_DEVICE


# Memory, network, NVMe


def test_a_device_that_has_not_been_set_up_has_no_size() -> None:
    with zram(size_mib=0) as disk:
        assert code(disk) is Code.SIZE_ZERO
        Path(f"/sys/block/{disk.name}/disksize").write_text("4M")
        assert is_free(disk)
    assert code(Path("/dev/nbd0")) is Code.SIZE_ZERO


@pytest.mark.parametrize("kind", ["scsi_generic", "bsg", "nvme-generic"])
def test_who_sends_commands_to_a_disk_past_the_block_layer_is_found(
    luns: list[Path], kind: str
) -> None:
    load("sg")
    disk = namespace(topology.NVME_SERIAL) if kind == "nvme-generic" else luns[0]
    if kind == "nvme-generic":
        node = Path(f"/dev/ng{disk.name.removeprefix('nvme')}")
    else:
        (listed,) = Path(f"/sys/block/{disk.name}/device/{kind}").iterdir()
        node = Path("/dev", *(["bsg"] if kind == "bsg" else []), listed.name)
    assert is_free(disk)
    with node.open("r+b", buffering=0) as opened, sleeping(opened.fileno()) as pid:
        finding = refusal(disk)
        assert finding.code is Code.OPEN_BY_PROCESS
        assert finding.message == (
            f"{node}, which sends commands to {disk}, is open for writing in process {pid} (sleep)"
        )
        assert is_free(luns[1])
    assert is_free(disk)


@contextmanager
def sleeping(descriptor: int) -> Iterator[int]:
    """A process that has the file open."""
    with subprocess.Popen(["sleep", "600"], stdin=descriptor) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("bdf", "serial"),
    [(topology.NVME, topology.NVME_SERIAL), (topology.SRIOV, topology.SRIOV_SERIAL)],
)
def test_a_mounted_namespace_keeps_its_controller_too(
    bdf: str, serial: str, tmp_path: Path
) -> None:
    disk = namespace(serial)
    assert is_free(disk)
    run("mkfs.ext4", "-q", disk)
    with mounted(disk, tmp_path / "mnt"):
        finding = refusal(disk)
        assert finding.code is Code.MOUNTED_ON_HOST
        (controller,) = examine([VfioInfo(label="nvme", device=bdf)], HOST, managed=True)
        assert [f.code for f in controller.findings] == [Code.MOUNTED_ON_HOST]
        obey(finding)
        assert is_free(disk)


# Names


def requested_by(*names: str) -> list[str]:
    """The nodes of the volumes that a container asks for by these names."""
    mounts = [
        {"destination": f"/dev/{index}", "type": "bind", "source": name, "options": ["bind"]}
        for index, name in enumerate(names)
    ]
    config = json.dumps({"ociVersion": "1.0.2", "mounts": mounts}).encode()
    found = examine(find_requests(parse_config(config, name="bundle"), HOST), HOST)
    assert all(not request.findings for request in found)
    return [request.device.host_path for request in found if request.device]


def test_the_names_that_udev_gives_lead_to_the_devices(tmp_path: Path) -> None:
    with scsi_disks() as luns, udev():
        first, second, *paths = luns
        table = f"0 32768 multipath 0 0 1 1 round-robin 0 2 1 {paths[0]} 1 {paths[1]} 1"
        with mapped("mpatha", table, options=["--uuid=mpath-360001"]):
            settle()
            wwn = Path(f"/sys/block/{first.name}/device/wwid").read_text().strip()[len("naa.") :]
            nvme = namespace(topology.NVME_SERIAL)
            names = {
                f"/dev/disk/by-id/wwn-0x{wwn}": first,
                f"/dev/disk/by-id/scsi-3{wwn}": first,
                f"/dev/disk/by-path/pci-{topology.NVME}-nvme-1": nvme,
                f"/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_{topology.NVME_SERIAL}": nvme,
                f"/dev/disk/by-path/virtio-pci-{topology.VIRTIO_DISK}": VIRTIO_DISK,
                "/dev/mapper/mpatha": Path("/dev/dm-0"),
                "/dev/disk/by-id/dm-uuid-mpath-360001": Path("/dev/dm-0"),
            }
            assert requested_by(*names) == list(map(str, names.values()))
            assert code(paths[0]) is code(paths[1]) is Code.HAS_HOLDERS
            obey(refusal(paths[0]))
        # Who uses a device by such a name uses the device.
        label = Path("/dev/disk/by-label/lab-swap")
        run("mkswap", "--label=lab-swap", second)
        run("udevadm", "trigger", "--settle", "--action=change", f"/sys/block/{second.name}")
        assert requested_by(str(label)) == [str(second)]
        run("swapon", label)
        settle()  # udev looks at what somebody has closed
        obey(refusal(second))
        with looped(label):
            settle()
            obey(refusal(second))
        settle()
        assert is_free(second)


# A real QEMU


def test_a_real_qemu_takes_a_mapping_a_lun_and_compressed_memory(tmp_path: Path) -> None:
    with ExitStack() as stack:
        luns = stack.enter_context(scsi_disks(sector_size=4096))
        volume = stack.enter_context(mapped("lab", f"0 8192 linear {luns[3]} 0"))
        disks = [volume, luns[0], stack.enter_context(zram())]
        state = tmp_path / "state"
        vm = stack.enter_context(
            start_vm(tmp_path, devices=root_ports(3), guest=False, paused=True, memory="128M")
        )
        with DeviceManager.open(
            vm="sb1",
            host=HOST,
            hypervisor=Qemu.connect(str(vm.qmp_path)),
            state_dir=state,
        ) as devices:
            devices.attach_all([want(number(disk)) for disk in disks])
            assert [has_open(vm.pid, file_id(disk.stat())) for disk in disks] == [True] * 3
            assert sector_sizes(vm) == [4096, 4096, 4096]
            # What is built on a disk that a VM has is that VM's too.
            above = stack.enter_context(mapped("lab-above", f"0 4096 linear {luns[0]} 0"))
            loop = stack.enter_context(looped(above))
            asked = on_the_command_line(*disks, loop, luns[3])
            _, answer = vmplug(*asked, "--state-dir", state)
            told = {(problem["container_path"], problem["code"]) for problem in answer["problems"]}
            assert told == {
                *((str(disk), "in-use-by-vm") for disk in (*disks, loop)),
                (str(luns[0]), "has-holders"),
                (str(luns[3]), "has-holders"),
                (str(luns[3]), "in-use-by-vm"),  # the volume is in this request
            }


def sector_sizes(vm: GuestVm) -> list[int]:
    """As the guest would see them."""
    fronts = vm.oracle.execute("qom-list", path="/machine/peripheral")
    return [
        vm.oracle.execute(
            "qom-get", path=f"/machine/peripheral/{front['name']}", property="logical_block_size"
        )
        for front in fronts
        if front["type"].startswith("child<virtio-blk")
    ]
