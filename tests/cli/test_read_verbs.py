"""info, resolve and check: on other hosts' trees and on this host, as text and as JSON."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import (
    VMPLUG,
    Result,
    Vmplug,
    config,
    device,
    number_of,
    write_bundle,
)
from tests.support.disks import disk_image, loop_device, qcow2_image
from tests.support.tree import GIB, HostTree

MIB = 1 << 20
NULL = ("--device", "c:1:3:/dev/null")
"""The one device that every Linux has."""

ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7]|10[0-7])m")
"""An escape sequence that sets a colour; bold is none. Source: ECMA-48, SGR; no-color.org."""

NO_SUCH = (
    "no block device 8:99 on this host: sysfs has no entry for it, and at /dev/xvdz "
    "there is nothing"
)
NO_SUCH_HINT = (
    "compare with the numbers in `ls -l /dev` on the host; check that the driver is loaded and "
    "the disk is plugged in"
)


@pytest.fixture
def host(tree: HostTree) -> HostTree:
    """A host with a disk, a loop device, a character device and an image."""
    tree.block_device("8:16", "sdb", partitions={"8:17": "sdb1"})
    loop = {"backing_file": "/images/a.img\n", "offset": "1048576\n", "sizelimit": "0\n"}
    tree.block_device("7:0", "loop0", size_bytes=16 * MIB, ro=True, loop=dict(loop))
    tree.char_device("10:229", "fuse").file("/images/b.img", b"\0" * MIB)
    return tree


def at(tree: HostTree) -> tuple[str, str]:
    return ("--root", str(tree.path))


def table(text: str) -> list[list[str]]:
    """The cells of an aligned table: columns begin where the headings begin."""
    lines = text.splitlines()
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S+(?: \S+)*", lines[0])]
    ends = [*starts[1:], None]
    for line in lines:
        gaps = (line[start - 2 : start] for start in starts[1:] if start < len(line))
        assert all(gap == "  " for gap in gaps), text
    return [
        [line[start:end].rstrip() for start, end in zip(starts, ends, strict=True)]
        for line in lines
    ]


def everything_below(directory: Path) -> dict[str, tuple[int, int]]:
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in paths}


# info


def test_info_tells_what_is_asked_for(vmplug: Vmplug, tmp_path: Path) -> None:
    rule = {"allow": True, "type": "b", "major": 8, "minor": 17, "access": "rm"}
    bundle = write_bundle(
        tmp_path / "ctr1",
        device("/dev/xvda", "8:16", fileMode=0o660, uid=0, gid=6),
        device("/dev/xvdb", "8:17"),
        device("/dev/fuse", "10:229", "c"),
        {"path": "/dev/pipe", "type": "p"},
        rules=[rule],
    )
    assert table(vmplug("info", bundle).answer()) == [
        ["CONTAINER PATH", "TYPE", "NUMBER", "RO/RW", "MODE", "UID", "GID"],
        ["/dev/xvda", "b", "8:16", "rw", "0660", "0", "6"],
        ["/dev/xvdb", "b", "8:17", "ro", "-", "-", "-"],
        ["/dev/fuse", "c", "10:229", "rw", "-", "-", "-"],
        ["/dev/pipe", "p", "-", "rw", "-", "-", "-"],
    ]


def test_info_as_json_has_every_field(vmplug: Vmplug, tmp_path: Path) -> None:
    bundle = write_bundle(
        tmp_path / "ctr1",
        device("/dev/xvda", "8:16", fileMode=0o660, uid=0, gid=6),
        {"path": "/dev/pipe", "type": "p"},
    )
    image = ("--device", "file:/images/b.img:/dev/xvdc")
    answer = vmplug("info", bundle, *image, "--read-only", "-o", "cache=none", "--json")
    nothing: dict[str, object] = {"major": None, "minor": None, "host_path": None, "options": {}}
    nobody = {"file_mode": None, "uid": None, "gid": None}
    disk = {"device_type": "b", "read_only": True, "options": {"cache": "none"}, "pmem": False}
    assert answer.json() == {
        "name": "ctr1",
        "devices": [
            {
                **disk,
                **named("/dev/xvda"),
                "major": 8,
                "minor": 16,
                "host_path": None,
                "file_mode": 0o660,
                "uid": 0,
                "gid": 6,
            },
            {
                **nothing,
                **nobody,
                **named("/dev/pipe"),
                "device_type": "p",
                "read_only": True,
                "pmem": False,
            },
            {
                **nothing,
                **nobody,
                **disk,
                **named("/dev/xvdc"),
                "host_path": "/images/b.img",
            },
        ],
    }


def named(path: str) -> dict[str, str]:
    """What a device with a path in the container goes by."""
    return {"name": path, "container_path": path}


ANNOTATIONS = {
    "org.vmplug.net.eth0": json.dumps({"socket": "/run/eth0.sock", "mac": "52:54:00:aa:bb:cc"}),
    "org.vmplug.share.work": json.dumps({"source": "/srv/work", "read-only": True}),
    "org.vmplug.rng.rng0": "{}",
    "org.vmplug.options./dev/xvda": json.dumps({"cache": "none"}),
    "io.kubernetes.pod": "somebody else's",
}


def test_info_tells_what_annotations_and_the_command_line_ask_for(vmplug: Vmplug) -> None:
    text = config(device("/dev/xvda", "8:16"), annotations=ANNOTATIONS)
    more = ("-d", "net:/run/eth1.sock", "-d", "share:fd:7:other", "-d", "rng:/dev/hwrng")
    refused = vmplug("info", "-", *more, stdin=text)
    assert (refused.status, refused.stdout) == (3, "")
    assert "rng:rng0: is asked for twice" in refused.stderr
    assert table(vmplug("info", "-", *more[:-2], stdin=text).answer()) == [
        ["CONTAINER PATH", "TYPE", "NUMBER", "RO/RW", "MODE", "UID", "GID"],
        ["/dev/xvda", "b", "8:16", "rw", "-", "-", "-"],
        ["net:eth0", "net", "/run/eth0.sock", "rw", "-", "-", "-"],
        ["share:work", "share", "/srv/work", "ro", "-", "-", "-"],
        ["rng:rng0", "rng", "/dev/urandom", "ro", "-", "-", "-"],
        ["net:eth1", "net", "/run/eth1.sock", "rw", "-", "-", "-"],
        ["share:other", "share", "fd:7", "rw", "-", "-", "-"],
    ]


def test_info_as_json_names_what_has_no_path_in_the_container(vmplug: Vmplug) -> None:
    text = config(device("/dev/xvda", "8:16"), annotations=ANNOTATIONS)
    disk, net, share, rng = vmplug("info", "-", "--json", stdin=text).json()["devices"]
    keys = ("container_path", "device_type", "major", "minor", "file_mode", "uid", "gid")
    nothing = {**dict.fromkeys(keys), "pmem": False}
    assert disk["options"] == {"cache": "none"}
    assert net == {
        **nothing,
        "name": "net:eth0",
        "host_path": "/run/eth0.sock",
        "read_only": False,
        "options": {"mac": "52:54:00:aa:bb:cc"},
    }
    assert share == {
        **nothing,
        "name": "share:work",
        "host_path": "/srv/work",
        "read_only": True,
        "options": {},
    }
    assert rng == {
        **nothing,
        "name": "rng:rng0",
        "host_path": "/dev/urandom",
        "read_only": True,
        "options": {},
    }


def test_a_bundle_is_a_directory_a_config_or_standard_input(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "ctr1", device("/dev/xvda", "8:16"))
    text = (bundle / "config.json").read_text()
    named = vmplug("info", bundle, "--json").json()
    assert named["name"] == "ctr1"
    assert vmplug("info", bundle / "config.json", "--json").json() == named
    assert vmplug("info", "-", "--json", stdin=text).json() == {**named, "name": None}


def test_a_bundle_in_the_working_directory_has_that_directorys_name(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "ctr1", device("/dev/xvda", "8:16"))
    for name in (".", "config.json", "../ctr1/"):
        done = subprocess.run(
            [VMPLUG, "info", name, "--json"], cwd=bundle, capture_output=True, check=True
        )
        assert json.loads(done.stdout)["name"] == "ctr1"


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_a_bundle_without_devices_is_said_to_be_one(vmplug: Vmplug, verb: str) -> None:
    assert (
        vmplug(verb, "-", stdin='{"ociVersion": "1.0.2"}').answer() == "no devices are asked for\n"
    )


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_a_bundle_without_devices_is_an_empty_list_in_json(vmplug: Vmplug, verb: str) -> None:
    document = vmplug(verb, "-", "--json", stdin='{"ociVersion": "1.0.2"}').json()
    (answers,) = [value for value in document.values() if isinstance(value, list)]
    assert answers == []


def test_devices_of_the_bundle_come_before_those_of_the_command_line(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "ctr1", device("/dev/xvda", "8:16"))
    more = ("-d", "b:8:32:/dev/xvdb", "-d", "b:8:48", "-d", "c:10:229")
    rows = table(vmplug("info", bundle, *more).answer())[1:]
    assert [row[0] for row in rows] == [
        "/dev/xvda",
        "/dev/xvdb",
        "/dev/block/8:48",
        "/dev/char/10:229",
    ]


@pytest.mark.root
def test_a_bind_mount_of_a_block_device_is_asked_for_too(vmplug: Vmplug, tree: HostTree) -> None:
    tree.block_device("8:16", "sdb").node("/dev/sdb", "b", "8:16")
    mount = {"destination": "/data", "source": "/dev/sdb", "options": ["bind", "ro"]}
    document = vmplug("info", "-", *at(tree), "--json", stdin=config(mounts=[mount])).json()
    (asked,) = document["devices"]
    wanted = {"container_path": "/data", "device_type": "b", "major": 8, "minor": 16}
    assert wanted.items() <= asked.items()
    assert asked["read_only"] is True


# resolve


def test_resolve_says_where_each_device_is(vmplug: Vmplug, host: HostTree) -> None:
    asked = ("-d", "b:8:16:/dev/xvda", "-d", "b:7:0", "-d", "c:10:229:/dev/fuse")
    image = ("-d", "file:/images/b.img")
    assert table(vmplug("resolve", *asked, *image, *at(host)).answer()) == [
        ["CONTAINER PATH", "HOST PATH", "KIND", "SIZE", "FOUND BY"],
        ["/dev/xvda", "/dev/sdb", "block", "1 GiB", "sysfs"],
        ["/dev/block/7:0", "/dev/loop0", "block", "16 MiB", "sysfs"],
        ["/dev/fuse", "/dev/fuse", "generic", "-", "sysfs"],
        ["/dev/b.img", "/images/b.img", "block", "1 MiB", "file"],
    ]


def test_resolve_as_json_has_every_key_of_the_contract(vmplug: Vmplug, host: HostTree) -> None:
    asked = ("-d", "b:8:16:/dev/xvda", "-d", "b:7:0", "-d", "c:10:229:/dev/fuse")
    image = ("-d", "file:/images/b.img")
    document = vmplug("resolve", *asked, *image, *at(host), "--json").json()
    disk = {"device_type": "b", "kind": "block", "read_only": False}
    assert document == {
        "devices": [
            {
                **disk,
                **named("/dev/xvda"),
                "major": 8,
                "minor": 16,
                "host_path": "/dev/sdb",
                "found_by": "sysfs",
                "size_bytes": GIB,
                "host_read_only": False,
                "sysfs_path": "/sys/devices/virtual/block/sdb",
            },
            {
                **disk,
                **named("/dev/block/7:0"),
                "major": 7,
                "minor": 0,
                "host_path": "/dev/loop0",
                "found_by": "sysfs",
                "size_bytes": 16 * MIB,
                "host_read_only": True,
                "sysfs_path": "/sys/devices/virtual/block/loop0",
                "backing_file": "/images/a.img",
                "backing_offset_bytes": MIB,
                "backing_size_limit_bytes": None,
                "backing_deleted": False,
            },
            {
                **named("/dev/fuse"),
                "device_type": "c",
                "major": 10,
                "minor": 229,
                "host_path": "/dev/fuse",
                "kind": "generic",
                "found_by": "sysfs",
                "read_only": False,
            },
            {
                **disk,
                **named("/dev/b.img"),
                "major": None,
                "minor": None,
                "host_path": "/images/b.img",
                "found_by": "file",
                "size_bytes": MIB,
                "host_read_only": False,
                "pmem": False,
            },
        ]
    }


@pytest.mark.root
def test_resolve_answers_what_annotations_ask_for_too(vmplug: Vmplug, host: HostTree) -> None:
    host.node("/run/eth0.sock", "s").node("/dev/urandom", "c", "1:9").file("/srv/work/a", "")
    text = config(device("/dev/xvda", "8:16"), annotations=ANNOTATIONS)
    document = vmplug("resolve", "-", *at(host), "--json", stdin=text).json()
    _, net, share, rng = document["devices"]
    keys = ("container_path", "device_type", "major", "minor")
    nothing = {**dict.fromkeys(keys), "found_by": "file"}
    assert net == {
        **nothing,
        "name": "net:eth0",
        "host_path": "/run/eth0.sock",
        "kind": "virtio-net-pci",
        "read_only": False,
    }
    assert share == {
        **nothing,
        "name": "share:work",
        "host_path": "/srv/work",
        "kind": "vhost-user-fs-pci",
        "read_only": True,
    }
    assert rng == {
        **nothing,
        "name": "rng:rng0",
        "host_path": "/dev/urandom",
        "kind": "virtio-rng-pci",
        "read_only": True,
    }


@pytest.mark.parametrize("word", ["net:/nope", "share:/nope:work", "rng:/nope"])
def test_another_end_that_is_not_there_is_told_under_its_name(
    vmplug: Vmplug, host: HostTree, word: str
) -> None:
    told = vmplug("resolve", "-d", word, *at(host), "--json")
    assert told.status == 4
    (missing,) = told.json()["devices"]
    assert missing["name"].partition(":")[0] == word.partition(":")[0]
    assert missing["container_path"] is None
    assert missing["error"]["code"] == "no-such-device"
    assert missing["error"]["hint"]
    assert "host_path" not in missing


def test_a_device_that_is_not_there_fails_and_the_others_are_answered(
    vmplug: Vmplug, host: HostTree
) -> None:
    asked = ("-d", "b:8:16:/dev/xvda", "-d", "b:8:99:/dev/xvdz", "-d", "b:7:0", *at(host))
    text = vmplug("resolve", *asked)
    assert text.status == 4
    rows = table(text.stdout)
    assert [row[0] for row in rows] == ["CONTAINER PATH", "/dev/xvda", "/dev/block/7:0"]
    assert text.stderr == f"vmplug: {NO_SUCH}\nhint: {NO_SUCH_HINT}\n"
    told = vmplug("resolve", *asked, "--json")
    assert told.status == 4
    first, missing, last = told.json()["devices"]
    assert (first["host_path"], last["host_path"]) == ("/dev/sdb", "/dev/loop0")
    assert missing == {
        **named("/dev/xvdz"),
        "device_type": "b",
        "major": 8,
        "minor": 99,
        "read_only": False,
        "error": {"code": "no-such-device", "message": NO_SUCH, "hint": NO_SUCH_HINT},
    }


def test_every_device_that_is_not_there_is_told(vmplug: Vmplug, host: HostTree) -> None:
    missing = vmplug("resolve", "-d", "b:8:99", "-d", "c:8:98", "-d", "file:/nope", *at(host))
    assert (missing.stdout, missing.status) == ("", 4)
    told = [line for line in missing.stderr.splitlines() if line.startswith("vmplug: ")]
    assert [re.search("8:99|8:98|/nope", line) is not None for line in told] == [True] * 3


def test_absent_and_unreadable_are_two_answers(vmplug: Vmplug, tree: HostTree) -> None:
    tree.file("/sys/dev/block/8:16/uevent", "MAJOR=8\nMINOR=16\n")
    told = vmplug("resolve", "-d", "b:8:16", "-d", "b:8:32", *at(tree), "--json")
    assert told.status == 4
    codes = [answer["error"]["code"] for answer in told.json()["devices"]]
    assert codes == ["unreadable", "no-such-device"]


def test_a_fifo_is_found_at_its_container_path(vmplug: Vmplug, tree: HostTree) -> None:
    tree.node("/run/pipe", "p")
    text = json.dumps(
        {"ociVersion": "1.0.2", "linux": {"devices": [{"path": "/run/pipe", "type": "p"}]}}
    )
    (found,) = vmplug("resolve", "-", *at(tree), "--json", stdin=text).json()["devices"]
    assert (found["host_path"], found["found_by"]) == ("/run/pipe", "container-path")
    assert (found["kind"], found["major"]) == ("generic", None)


@pytest.mark.root
def test_a_number_of_the_vhost_user_store_is_answered_with_its_socket(
    vmplug: Vmplug, tree: HostTree
) -> None:
    for name, number in (("blk0", "241:0"), ("scsi0", "242:1"), ("dead", "241:7")):
        tree.node(f"/store/block/devices/{name}", "b", number)
    for name in ("blk0", "scsi0"):
        tree.node(f"/store/block/sockets/{name}", "s")
    asked = ("-d", "b:241:0:/dev/xvda", "-d", "b:242:1", "-d", "b:241:7")
    told = vmplug("resolve", *asked, "--vhost-user-store", "/store", *at(tree), "--json")
    assert told.status == 4
    blk, scsi, dead = told.json()["devices"]
    assert (blk["host_path"], blk["kind"]) == ("/store/block/sockets/blk0", "vhost-user-blk-pci")
    assert (scsi["host_path"], scsi["kind"]) == (
        "/store/block/sockets/scsi0",
        "vhost-user-scsi-pci",
    )
    assert {blk["found_by"], scsi["found_by"]} == {"vhost-user-store"}
    assert "/store/block/sockets/dead" in dead["error"]["message"]


def test_the_running_hosts_character_device_is_found(vmplug: Vmplug) -> None:
    (found,) = vmplug("resolve", *NULL, "--json").json()["devices"]
    wanted = {"host_path": "/dev/null", "kind": "generic", "found_by": "sysfs"}
    assert wanted.items() <= found.items()


def read_lsblk() -> dict[str, dict[str, object]]:
    """Every disk that lsblk lists, by number."""
    columns = "MAJ:MIN,PATH,SIZE,RO"
    command = ["lsblk", "--all", "--list", "--bytes", "--json", "--output", columns]
    done = subprocess.run(command, capture_output=True, check=True)
    return {disk["maj:min"]: disk for disk in json.loads(done.stdout)["blockdevices"]}


def test_every_disk_of_the_running_host_is_what_lsblk_says(vmplug: Vmplug) -> None:
    """Other tests may set up loop devices meanwhile: only what stays the same is compared."""
    disks = read_lsblk()
    asked = [word for number in disks for word in ("--device", f"b:{number}")]
    if not asked:
        pytest.skip("this host has no block device")
    told = vmplug("resolve", *asked, "--json")
    still = read_lsblk()
    for found in told.json()["devices"]:
        number = f"{found['major']}:{found['minor']}"
        if still.get(number) == (disk := disks[number]):
            assert found["host_path"] == disk["path"]
            assert found["size_bytes"] == int(str(disk["size"] or 0))
            assert found["host_read_only"] == disk["ro"]


@pytest.mark.root
def test_a_loop_device_of_the_running_host_tells_its_file(vmplug: Vmplug, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "a loop device")
    with loop_device(image, offset=512, size_limit=MIB, read_only=True) as node:
        number = number_of(node)
        (found,) = vmplug("resolve", "-d", f"b:{number}", "--json").json()["devices"]
    assert found["host_path"] == str(node)
    assert (found["size_bytes"], found["host_read_only"]) == (MIB, True)
    assert found["backing_file"] == str(image)
    assert found["backing_offset_bytes"] == 512
    assert found["backing_size_limit_bytes"] == MIB
    assert found["backing_deleted"] is False


@pytest.mark.parametrize("node", ["/dev/vfio/99", "/dev/vfio/devices/vfio99"])
def test_a_vfio_node_without_a_device_is_an_error(
    vmplug: Vmplug, host: HostTree, node: str
) -> None:
    asked = ("-d", f"vfio:{node}", *at(host))
    said = f"{node} is a VFIO node, but the kernel has no device behind it"
    for verb in ("resolve", "check"):
        failed = vmplug(verb, *asked)
        assert failed.status == 4
        assert said in failed.stderr + failed.stdout
    (device,) = json.loads(vmplug("resolve", *asked, "--json").stdout)["devices"]
    assert (device["error"]["code"], device["error"]["message"]) == ("no-such-device", said)
    host.link("/sys/kernel/iommu_groups/99/devices/0000:01:00.0", "../../../../devices/0")
    host.file("/sys/bus/pci/devices/0000:01:00.0/uevent", "PCI_CLASS=10802\nPCI_ID=8086:0953\n")
    assert vmplug("resolve", "-d", "vfio:/dev/vfio/99", *at(host)).status == 0


# check


def test_check_says_that_a_device_may_go(vmplug: Vmplug, host: HostTree) -> None:
    asked = ("-d", "b:8:16:/dev/xvda", "-d", "c:10:229:/dev/fuse", *at(host))
    assert vmplug("check", *asked).answer() == (
        "/dev/xvda: ok, /dev/sdb may be handed over\n"
        "/dev/fuse: ok, /dev/fuse is counted, not given to the VM\n"
    )
    document = vmplug("check", *asked, "--json").json()
    assert document == {"ok": True, "problems": []}


def test_check_tells_every_problem_of_every_device_with_its_remedy(
    vmplug: Vmplug, host: HostTree
) -> None:
    host.mount("/dev/sdb1", "/srv", "8:17").swap("/dev/sdb").hold("sdb", "dm-0")
    asked = ("-d", "b:8:16:/dev/xvda", "-d", "b:7:0:/dev/xvdb", "-d", "b:8:99:/dev/xvdz")
    told = vmplug("check", *asked, *at(host), "--json")
    assert told.status == 4
    document = told.json()
    assert document["ok"] is False
    problems = document["problems"]
    keys = {"name", "container_path", "code", "message", "hint", "severity"}
    assert {frozenset(problem) for problem in problems} == {frozenset(keys)}
    assert [problem["name"] for problem in problems] == [p["container_path"] for p in problems]
    assert [(problem["container_path"], problem["code"]) for problem in problems] == [
        ("/dev/xvda", "mounted-on-host"),
        ("/dev/xvda", "has-holders"),
        ("/dev/xvda", "is-swap"),
        ("/dev/xvdb", "read-only-device"),
        ("/dev/xvdz", "no-such-device"),
    ]
    assert {problem["severity"] for problem in problems} == {"error"}
    mounted = problems[0]
    assert mounted["message"] == "/dev/sdb1 is mounted on the host at /srv"
    assert mounted["hint"] == "umount /srv"
    text = vmplug("check", *asked, *at(host))
    assert (text.stderr, text.status) == ("", 4)
    for problem in problems:
        path, code, message = (problem[key] for key in ("container_path", "code", "message"))
        indent = " " * (len(path) + 2)
        assert f"{path}: error {code}: {message}\n{indent}{problem['hint']}\n" in text.stdout


def test_an_allowed_finding_is_a_warning_and_the_answer_is_yes(
    vmplug: Vmplug, host: HostTree
) -> None:
    host.mount("/dev/sdb", "/srv", "8:16")
    asked = ("-d", "b:8:16:/dev/xvda", "--allow", "mounted-on-host", *at(host))
    assert "/dev/xvda: warning mounted-on-host: " in vmplug("check", *asked).answer()
    document = vmplug("check", *asked, "--json").json()
    (problem,) = document["problems"]
    assert (document["ok"], problem["severity"]) == (True, "warning")


def test_one_permission_covers_one_finding(vmplug: Vmplug, host: HostTree) -> None:
    host.mount("/dev/sdb", "/srv", "8:16").hold("sdb", "dm-0")
    allowed = ("--allow", "mounted-on-host")
    told = vmplug("check", "-d", "b:8:16", *allowed, *at(host), "--json")
    assert told.status == 4
    severities = {problem["code"]: problem["severity"] for problem in told.json()["problems"]}
    assert severities == {"mounted-on-host": "warning", "has-holders": "error"}


def test_what_is_wanted_only_for_reading_may_be_read_only(vmplug: Vmplug, host: HostTree) -> None:
    asked = ("check", "-d", "b:7:0", *at(host))
    assert vmplug(*asked).status == 4
    assert vmplug(*asked, "--read-only").status == 0


def test_an_option_settles_what_an_image_is(vmplug: Vmplug, tmp_path: Path) -> None:
    image = qcow2_image(tmp_path / "a.qcow2", 1, "an image")
    asked = ("check", "-d", f"file:{image}")
    unstated = vmplug(*asked, "--json")
    assert (unstated.status, unstated.json()["problems"][0]["code"]) == (4, "format-not-stated")
    for stated in ("qcow2", "raw"):
        assert vmplug(*asked, "-o", f"format={stated}").status == 0
    raw = disk_image(tmp_path / "b.img", 1, "no image")
    wrong = vmplug("check", "-d", f"file:{raw}", "-o", "format=qcow2", "--json")
    assert (wrong.status, wrong.json()["problems"][0]["code"]) == (4, "not-that-format")


def test_a_node_of_vfio_with_nothing_behind_it_is_told_before_attach(
    vmplug: Vmplug, tree: HostTree
) -> None:
    tree.char_device("511:0", "vfio/26")
    told = vmplug("check", "-d", "c:511:0:/dev/vfio/26", *at(tree), "--json")
    (problem,) = told.json()["problems"]
    assert (told.status, problem["code"]) == (4, "no-such-device")
    assert "/dev/vfio/26 is a VFIO node" in problem["message"]


@pytest.mark.root
def test_a_mounted_disk_of_the_running_host_may_not_go(vmplug: Vmplug, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 8, "")
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with loop_device(image) as node:
        asked = ("check", "-d", f"b:{number_of(node)}:/dev/xvda")
        assert vmplug(*asked).answer() == f"/dev/xvda: ok, {node} may be handed over\n"
        subprocess.run(["mount", node, mount_point], check=True)
        try:
            mounted = vmplug(*asked)
        finally:
            subprocess.run(["umount", mount_point], check=True)
        assert vmplug(*asked).status == 0
    assert (mounted.stderr, mounted.status) == ("", 4)
    assert mounted.stdout == (
        f"/dev/xvda: error mounted-on-host: {node} is mounted on the host at {mount_point}\n"
        f"           umount {mount_point}\n"
    )


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_reading_changes_nothing_and_makes_no_journal(
    vmplug: Vmplug, host: HostTree, tmp_path: Path, verb: str
) -> None:
    bundle = write_bundle(tmp_path / "ctr1", device("/dev/xvda", "8:16"))
    before = everything_below(tmp_path)
    assert vmplug(verb, bundle, *at(host)).answer()
    assert everything_below(tmp_path) == before
    assert not vmplug.state_dir.exists()


# how it looks


def test_a_table_in_a_pipe_is_plain_aligned_text(vmplug: Vmplug, host: HostTree) -> None:
    long = "b:8:16:/dev/a-path-so-long-that-no-terminal-of-eighty-columns-could-show-all-of-it"
    text = vmplug("resolve", "-d", long, "-d", "b:7:0:/dev/b", *at(host)).answer()
    assert ESCAPE not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert [row[1] for row in table(text)] == ["HOST PATH", "/dev/sdb", "/dev/loop0"]


def test_a_terminal_gets_a_table_with_headings_that_stand_out(
    vmplug: Vmplug, host: HostTree
) -> None:
    asked = ("resolve", "-d", "b:8:16:/dev/xvda", "-d", "b:7:0", *at(host))
    shown = vmplug.at_terminal(*asked)
    assert (shown.stderr, shown.status) == ("", 0)
    assert shown.stdout.startswith(ESCAPE)
    piped = table(vmplug(*asked).answer())
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    assert [line.split() for line in plain.splitlines()] == [
        [word for cell in row for word in cell.split()] for row in piped
    ]


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_no_color_is_respected(vmplug: Vmplug, host: HostTree, verb: str) -> None:
    host.mount("/dev/sdb", "/srv", "8:16")
    asked = (verb, "-d", "b:8:16", *at(host))
    shown = vmplug.at_terminal(*asked, env={"NO_COLOR": "1"})
    assert "/dev/" in shown.stdout
    assert not COLOUR.search(shown.stdout)


def test_a_terminal_that_knows_no_escapes_gets_none(vmplug: Vmplug, host: HostTree) -> None:
    shown = vmplug.at_terminal("resolve", "-d", "b:8:16", *at(host), env={"TERM": "dumb"})
    assert "/dev/sdb" in shown.stdout
    assert ESCAPE not in shown.stdout


def test_a_narrow_terminal_shows_the_ends_of_a_path(vmplug: Vmplug, host: HostTree) -> None:
    path = "/dev/a-path-that-is-longer-than-half-a-terminal"
    shown = vmplug.at_terminal("resolve", "-d", f"b:8:16:{path}", *at(host), columns=60)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    assert all(len(line) <= 60 for line in plain.splitlines())
    start, end = plain.splitlines()[1].split("  ")[0].split("...")
    assert path.startswith(start)
    assert path.endswith(end)


def test_json_is_the_same_at_a_terminal_and_in_a_pipe(vmplug: Vmplug, host: HostTree) -> None:
    asked = ("resolve", "-d", "b:8:16", *at(host), "--json")
    assert vmplug.at_terminal(*asked).stdout == vmplug(*asked).stdout


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_stdout_holds_the_answer_and_stderr_nothing(
    vmplug: Vmplug, verb: str, more: tuple[str, ...]
) -> None:
    answered = vmplug(verb, *NULL, *more)
    assert (answered.stderr, answered.status) == ("", 0)
    assert "/dev/null" in answered.stdout or verb == "check"
    if more:
        assert json.loads(answered.stdout)["version"] == 1


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_a_newline_in_a_path_makes_no_second_line(
    vmplug: Vmplug, host: HostTree, verb: str
) -> None:
    text = config(device("/dev/a\nb", "8:16"))
    shown = vmplug(verb, "-", *at(host), stdin=text).answer()
    assert len(shown.splitlines()) == (1 if verb == "check" else 2)
    (asked,) = vmplug("info", "-", "--json", stdin=text).json()["devices"]
    assert asked["container_path"] == "/dev/a\nb"


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_a_path_cannot_command_the_terminal(vmplug: Vmplug, host: HostTree, verb: str) -> None:
    shown = vmplug.at_terminal(verb, "-d", "b:8:16:/dev/a\x1b[2Jb", *at(host))
    assert "/dev/sdb" in shown.stdout or verb == "info"
    assert "\x1b[2J" not in shown.stdout


# where the answer goes


@pytest.fixture
def into(vmplug: Vmplug) -> Callable[[int], Result]:
    """Runs `resolve` with its stdout at a descriptor."""

    def run(descriptor: int) -> Result:
        process = subprocess.Popen(
            [VMPLUG, "resolve", *NULL],
            stdout=descriptor,
            stderr=subprocess.PIPE,
            env=vmplug.environment,
        )
        _, stderr = process.communicate(timeout=30)
        return Result("", stderr.decode(), process.returncode)

    return run


def test_a_reader_that_went_away_ends_it_as_sigpipe_would(into: Callable[[int], Result]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = into(writer)
    finally:
        os.close(writer)
    assert (done.stderr, done.status) == ("", 141)


def test_a_full_disk_under_stdout_is_told_as_such(into: Callable[[int], Result]) -> None:
    with open("/dev/full", "wb") as full:
        done = into(full.fileno())
    assert done.status != 0
    assert "No space left on device" in done.stderr
    assert "bug" not in done.stderr
    assert "Errno" not in done.stderr


def in_shell(vmplug: Vmplug, command: str) -> Result:
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=vmplug.environment,
        timeout=30,
        check=False,
    )
    return Result(done.stdout, done.stderr, done.returncode)


def test_a_closed_standard_input_cannot_be_read(vmplug: Vmplug) -> None:
    done = in_shell(vmplug, "vmplug info - <&-")
    assert (done.stdout, done.status) == ("", 3)
    assert done.stderr.startswith("vmplug: standard input: ")


def test_a_closed_standard_output_is_no_bug(vmplug: Vmplug) -> None:
    done = in_shell(vmplug, f"vmplug info {' '.join(NULL)} >&-")
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
