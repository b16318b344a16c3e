"""`vmplug host` and `vmplug record`, on other hosts' trees and on this host."""

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Result, Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image, loop_device
from tests.support.pci_tree import CONFIG_CUT, FLAGS_IO, FLAGS_MEM64, PciTree
from tests.support.tree import GIB, MIB

PORT, NVME, NIC, GPU = "0000:00:1c.0", "0000:3b:00.0", "0000:3c:00.0", "0000:00:02.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
PCI_IDS = """
8086  Intel Corporation
\t0953  PCIe Data Center SSD
\t1572  Ethernet Controller X710 for 10GbE SFP+

C 01  Mass storage controller
\t08  Non-Volatile memory controller
C 02  Network controller
\t00  Ethernet controller
"""
KINDS = {"pci", "block", "vhost_user", "pmem", "mdev_types", "mdev"}


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "host").file("/usr/share/misc/pci.ids", PCI_IDS)


@pytest.fixture
def host(tree: PciTree) -> PciTree:
    """A server with something of every kind."""
    tree.pci_function(PORT, class_code=0x060400, driver="pcieport", group=1)
    bars = {0: (1 << 40, 16 * GIB, FLAGS_MEM64), 4: (0xE000, 32, FLAGS_IO)}
    tree.pci_function(NVME, below=PORT, driver="nvme", group=26, bars=bars, numa_node=1)
    tree.pci_disk(NVME, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    tree.mount("/dev/nvme0n1p1", "/srv", "259:1")
    tree.pci_function(NIC, class_code=0x020000, device=0x1572, driver="i40e", config=CONFIG_CUT)
    tree.sriov(NIC, "0000:3c:02.0", group=28).network(NIC, "eth0").route("eth0")
    tree.pci_function(GPU, class_code=0x030000, driver="i915", group=0)
    tree.mdev_type(GPU, "i915-1", title="GVTg", available=2).mdev(UUID, GPU, "i915-1", group=40)
    tree.block_device("7:0", "loop0", size_bytes=0)
    return tree.vfio_group(28).pmem("namespace0.0", size_bytes=GIB)


def at(tree: PciTree) -> tuple[str, str]:
    return ("--root", str(tree.path))


def entry(document: Any, kind: str, **wanted: Any) -> dict[str, Any]:
    (found,) = (e for e in document[kind] if wanted.items() <= e.items())
    return dict(found)


# as JSON


def test_the_document_has_every_key_even_of_an_empty_host(vmplug: Vmplug, tree: PciTree) -> None:
    document = vmplug("host", *at(tree), "--json").json()
    assert document == {**{kind: [] for kind in KINDS}, "unreadable": []}


def test_a_function_in_json(vmplug: Vmplug, host: PciTree) -> None:
    document = vmplug("host", *at(host), "--json").json()
    assert entry(document, "pci", address=NVME) == {
        "address": NVME,
        "class": "0x010802",
        "class_name": "Non-Volatile memory controller",
        "vendor": "0x8086",
        "vendor_name": "Intel Corporation",
        "device": "0x0953",
        "device_name": "PCIe Data Center SSD",
        "driver": "nvme",
        "iommu_group": 26,
        "numa_node": 1,
        "pcie": True,
        "is_bridge": False,
        "bars": [
            {
                "number": 0,
                "start": 1 << 40,
                "size_bytes": 16 * GIB,
                "is_memory": True,
                "is_64bit": True,
                "is_prefetchable": True,
                "is_large": True,
                "is_assigned": True,
            },
            {
                "number": 4,
                "start": 0xE000,
                "size_bytes": 32,
                "is_memory": False,
                "is_64bit": False,
                "is_prefetchable": False,
                "is_large": False,
                "is_assigned": True,
            },
        ],
        "physfn": None,
        "virtfns": [],
        "reset_methods": ["flr", "bus"],
        "group_node": None,
        "cdev_node": None,
        "block": ["/dev/nvme0n1", "/dev/nvme0n1p1"],
        "networks": [],
        "held_by": [{"kind": "mount", "device": "/dev/nvme0n1p1", "detail": "/srv"}],
        "unreadable": [],
    }


def test_absent_facts_are_null(vmplug: Vmplug, tree: PciTree) -> None:
    tree.link(f"/sys/bus/pci/devices/{NVME}", f"../../../devices/pci0000:3b/{NVME}")
    (function,) = vmplug("host", *at(tree), "--json").json()["pci"]
    assert function.pop("address") == NVME
    lists = ("virtfns", "block", "networks", "held_by", "unreadable")
    assert [function.pop(key) for key in lists] == [[]] * len(lists)
    assert set(function.values()) == {None}


def test_uses_and_facts_that_a_copy_does_not_hold_are_null(vmplug: Vmplug, tree: PciTree) -> None:
    tree.pci_function(GPU, driver="i915")
    tree.block_device("7:0", "loop0", loop={"backing_file": "/a.img\n"})
    known = vmplug("host", *at(tree), "--json").json()
    assert entry(known, "block", name="loop0")["mounts"] == []
    assert entry(known, "block", name="loop0")["is_swap"] is False
    shutil.rmtree(tree.path / "proc")
    for name in ("ro", "removable", "queue/logical_block_size", "loop/offset"):
        (tree.path / "sys/block/loop0" / name).unlink()
    (tree.path / "sys/block/loop0/holders").rmdir()
    (tree.path / tree.real(GPU)[1:] / "resource").unlink()
    document = vmplug("host", *at(tree), "--json").json()
    disk = entry(document, "block", name="loop0")
    keys = ("mounts", "is_swap", "read_only", "removable", "sector_bytes", "holders")
    assert {disk[key] for key in (*keys, "backing_offset_bytes")} == {None}
    assert entry(document, "pci", address=GPU)["bars"] is None
    checked = vmplug("check", "-d", "b:7:0:/dev/xvda", *at(tree), "--json").json()
    assert checked["ok"] is True
    (problem,) = checked["problems"]
    assert (problem["code"], problem["severity"]) == ("unknown-use", "warning")
    assert "mounts (no /proc/PID/mountinfo), swap space (no /proc/swaps)" in problem["message"]


def test_virtual_functions_interfaces_and_unknown_pcie_in_json(
    vmplug: Vmplug, host: PciTree
) -> None:
    document = vmplug("host", *at(host), "--json").json()
    nic, virtfn = (entry(document, "pci", address=bdf) for bdf in (NIC, "0000:3c:02.0"))
    assert (nic["virtfns"], nic["pcie"], nic["iommu_group"]) == (["0000:3c:02.0"], None, None)
    assert (virtfn["physfn"], virtfn["pcie"], virtfn["group_node"]) == (NIC, True, "/dev/vfio/28")
    assert nic["networks"] == [
        {"name": "eth0", "has_default_route": True, "has_address": True, "master": None}
    ]
    assert [use["kind"] for use in nic["held_by"]] == ["network"]


def test_the_other_kinds_in_json(vmplug: Vmplug, host: PciTree) -> None:
    document = vmplug("host", *at(host), "--json").json()
    part = entry(document, "block", name="nvme0n1p1")
    assert part == {
        "name": "nvme0n1p1",
        "device_node": "/dev/nvme0n1p1",
        "major": 259,
        "minor": 1,
        "size_bytes": GIB // 2,
        "sector_bytes": 512,
        "read_only": False,
        "removable": False,
        "disk": "nvme0n1",
        "pci": NVME,
        "holders": [],
        "mounts": ["/srv"],
        "is_swap": False,
        "backing_file": None,
        "backing_offset_bytes": None,
        "backing_deleted": None,
        "held_by": [{"kind": "mount", "device": "/dev/nvme0n1p1", "detail": "/srv"}],
        "unreadable": [],
    }
    assert [disk["name"] for disk in document["block"]] == [
        "loop0",
        "nvme0n1",
        "nvme0n1p1",
        "pmem0",
    ]
    assert document["pmem"] == [
        {
            "name": "namespace0.0",
            "device_node": "/dev/pmem0",
            "mode": "fsdax",
            "size_bytes": GIB,
            "numa_node": 0,
            "held_by": [],
            "unreadable": [],
        }
    ]
    assert document["mdev_types"] == [
        {
            "parent": GPU,
            "name": "i915-1",
            "title": "GVTg",
            "available": 2,
            "device_api": "vfio-pci",
            "unreadable": [],
        }
    ]
    assert document["mdev"] == [
        {
            "uuid": UUID,
            "kind": "vfio-mdev",
            "parent": GPU,
            "mdev_type": "i915-1",
            "iommu_group": 40,
            "group_node": None,
            "cdev_node": None,
            "ap_queues": [],
            "held_by": [],
            "unreadable": [],
        }
    ]


def test_unreadable_files_are_listed_with_their_function(vmplug: Vmplug, host: PciTree) -> None:
    path = host.path / host.real(NVME)[1:] / "resource"
    path.unlink()
    path.symlink_to("resource")
    (host.path / host.real(GPU)[1:] / "numa_node").write_bytes(b"caf\xe9\n")
    document = vmplug("host", *at(host), "--json").json()
    assert entry(document, "pci", address=NVME)["bars"] is None
    assert entry(document, "pci", address=NVME)["unreadable"] == [
        f"cannot read /sys/bus/pci/devices/{NVME}/resource: Too many levels of symbolic links"
    ]
    (told,) = entry(document, "pci", address=GPU)["unreadable"]
    assert "numa_node" in told
    assert entry(document, "pci", address=NIC)["unreadable"] == []


def test_names_that_are_not_utf8_and_escapes_are_made_harmless(
    vmplug: Vmplug, tree: PciTree
) -> None:
    tree.pci_function(NVME, driver="nv\udce9\x1b[31mme")
    document = vmplug("host", *at(tree), "--json").json()
    assert document["pci"][0]["driver"] == "nv\udce9\x1b[31mme"
    shown = vmplug("host", *at(tree)).answer()
    assert "nv\\udce9\\x1b[31mme" in shown


# for people


def test_the_tree_of_a_host(vmplug: Vmplug, host: PciTree) -> None:
    shown = vmplug("host", *at(host)).answer()
    sections = [section.splitlines() for section in shown.split("\n\n")]
    assert [section[0] for section in sections] == [
        "PCI functions by IOMMU group",
        "block devices",
        "persistent memory",
        "mediated devices",
        "what devices can be divided into",
    ]
    pci = sections[0]
    titles = [line.strip() for line in pci if line.startswith("  ") and line[2] != " "]
    assert titles == ["group 0", "group 1", "group 26", "group 28, /dev/vfio/28", "in no group"]
    nvme = pci.index("  group 26")
    words = [" ".join(line.split()) for line in pci[nvme + 1 : nvme + 6]]
    drive = "Non-Volatile memory controller [010802] Intel Corporation PCIe Data Center SSD"
    assert words == [
        f"{NVME} PCIe node 1 nvme {drive} [8086:0953]",
        "reset: flr, bus",
        "BARs: 0 16 GiB large, 4 32 B of ports",
        "disks: /dev/nvme0n1 /dev/nvme0n1p1",
        "held: /dev/nvme0n1p1 is mounted at /srv",
    ]
    assert "      virtual function of 0000:3c:00.0" in pci
    assert "      held: eth0 has the default route, an address" in pci
    assert "      a bridge: stays with the host" in pci
    assert "loop0" not in shown
    depths = {line.split()[0]: line.index("/") for line in sections[1] if " rw" in line}
    assert depths == {"/dev/nvme0n1": 2, "/dev/nvme0n1p1": 4, "/dev/pmem0": 2}


def test_columns_stand_below_each_other(vmplug: Vmplug, host: PciTree) -> None:
    lines = vmplug("host", *at(host), "--kind", "pci").answer().splitlines()
    functions = [line for line in lines if re.match(r" {4}[0-9a-f]{4}:", line)]
    assert len(functions) == 5
    classes = ("Non-Vol", "Ethernet", "PCI bridge", "Bridge", "VGA", "Display")
    starts = {line.index(word) for line in functions for word in classes if word in line}
    assert len(starts) == 1


def test_an_empty_host_says_so(vmplug: Vmplug, tree: PciTree) -> None:
    assert vmplug("host", *at(tree)).answer() == "the host has nothing to hand over\n"
    shown = vmplug("host", *at(tree), "--kind", "pmem").answer()
    assert shown == "the host has nothing of that kind\n"


def test_a_terminal_gets_colour_and_a_pipe_or_no_color_none(vmplug: Vmplug, host: PciTree) -> None:
    piped = vmplug("host", *at(host)).answer()
    shown = vmplug.at_terminal("host", *at(host), columns=40)
    assert (shown.status, shown.stderr) == (0, "")
    assert "\x1b[33m" in shown.stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    assert plain.split() == piped.split()
    grey = vmplug.at_terminal("host", *at(host), env={"NO_COLOR": "1"}).stdout
    assert "\x1b[33m" not in grey
    assert "\x1b" not in piped


# what is asked for


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (NVME, {"pci": [NVME]}),
        ("3b:00.0", {"pci": [NVME]}),
        ("3B:00.0", {"pci": [NVME]}),
        ("28", {"pci": ["0000:3c:02.0"]}),
        ("/dev/vfio/28", {"pci": ["0000:3c:02.0"]}),
        ("/dev/nvme0n1", {"block": ["nvme0n1", "nvme0n1p1"]}),
        ("nvme0n1p1", {"block": ["nvme0n1p1"]}),
        ("259:1", {"block": ["nvme0n1p1"]}),
        (UUID, {"mdev": [UUID]}),
        (GPU, {"pci": [GPU], "mdev": [UUID], "mdev_types": ["i915-1"]}),
        ("namespace0.0", {"pmem": ["namespace0.0"]}),
    ],
)
def test_one_thing_by_its_name(
    vmplug: Vmplug, host: PciTree, name: str, found: dict[str, list[str]]
) -> None:
    document = vmplug("host", *at(host), name, "--json").json()
    assert document.pop("thing")["name"]
    del document["unreadable"]
    keys = {"pci": "address", "mdev": "uuid"}
    named = {
        kind: [e[keys.get(kind, "name")] for e in entries]
        for kind, entries in document.items()
        if entries
    }
    assert named == found


def test_a_link_in_dev_names_what_it_leads_to(vmplug: Vmplug, host: PciTree) -> None:
    host.file("/dev/nvme0n1").link("/dev/disk/by-id/a", "../../nvme0n1")
    document = vmplug("host", *at(host), "/dev/disk/by-id/a", "--json").json()
    assert [disk["name"] for disk in document["block"]] == ["nvme0n1", "nvme0n1p1"]


def test_one_thing_as_a_tree(vmplug: Vmplug, host: PciTree) -> None:
    assert vmplug("host", *at(host), "3b:00.0").answer().splitlines() == [
        f"{NVME} (Intel Corporation PCIe Data Center SSD): function, driver nvme",
        f"  identity: vfio {NVME}:8086:0953:-",
        "  unknown: who has its disks open (O_EXCL): this is a copy of a host",
        "  /dev/nvme0n1: disk, 1 GiB, its disk",
        "    /dev/nvme0n1p1: partition, 512 MiB",
        "      in use by a mounted file system: /srv [mounted-on-host]",
        "        found by the mount tables of all mount namespaces",
        "        to free it: umount /srv",
    ]
    assert "  in use by nothing that vmplug can see" in vmplug("host", *at(host), UUID).answer()


def test_one_thing_in_json(vmplug: Vmplug, host: PciTree) -> None:
    document = vmplug("host", *at(host), "/dev/nvme0n1", "--json").json()
    thing = document["thing"]
    assert (thing["kind"], thing["identity"], thing["uses"]) == ("disk", "block 259:0 -", [])
    (part,) = thing["made_of"]
    assert part["relation"] == "partition"
    assert part["uses"] == [
        {
            "code": "mounted-on-host",
            "who": "a mounted file system",
            "where": "/srv",
            "found_by": "the mount tables of all mount namespaces",
            "message": "/dev/nvme0n1p1 is mounted on the host at /srv",
            "hint": "umount /srv",
            "severity": "error",
        }
    ]
    assert set(part) == {
        *("kind", "name", "identity", "relation", "title", "driver", "size_bytes"),
        *("made_of", "uses", "unknown"),
    }


def test_several_things(vmplug: Vmplug, host: PciTree) -> None:
    document = vmplug("host", *at(host), "nvme0n1p1", "28", "--json").json()
    assert [thing["name"] for thing in document["things"]] == ["/dev/nvme0n1p1", "28"]
    assert "thing" not in document
    assert [f["address"] for f in document["pci"]] == ["0000:3c:02.0"]
    shown = vmplug("host", *at(host), "nvme0n1p1", "28").answer()
    trees = [tree.splitlines()[0] for tree in shown.split("\n\n")]
    assert trees == ["/dev/nvme0n1p1: partition, 512 MiB", "28: IOMMU group"]


def test_a_thing_that_the_list_does_not_have(vmplug: Vmplug, host: PciTree) -> None:
    document = vmplug("host", *at(host.file("/srv/a.img", b"x")), "/srv/a.img", "--json").json()
    assert document["thing"]["kind"] == "file"
    assert all(document[kind] == [] for kind in KINDS)
    assert vmplug("host", *at(host), "i915-1").answer().startswith("i915-1 (GVTg): mediated type")


def test_with_a_kind_a_name_chooses_rows(vmplug: Vmplug, host: PciTree) -> None:
    assert "held: /dev/nvme0n1p1" in vmplug("host", *at(host), "--kind", "pci", NVME).answer()
    document = vmplug("host", *at(host), "--kind", "pci", NVME, "--json").json()
    assert "thing" not in document
    assert len(document["pci"]) == 1


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_tree_fits_the_terminal(vmplug: Vmplug, host: PciTree, columns: int) -> None:
    shown = vmplug.at_terminal("host", *at(host), NIC, columns=columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    assert max(map(len, plain.splitlines())) <= columns
    words = vmplug("host", *at(host), NIC).answer().split()
    assert plain.split() == words
    assert "\x1b[31m" in shown.stdout


def test_a_name_that_nothing_goes_by_is_an_error(vmplug: Vmplug, host: PciTree) -> None:
    refused = vmplug("host", *at(host), NVME, "0000:ff:00.0")
    assert (refused.status, refused.stdout) == (4, "")
    assert refused.stderr.startswith("vmplug: nothing on this host goes by '0000:ff:00.0'\nhint: ")
    error = vmplug("host", *at(host), "None", "--json").error()
    assert (error["code"], error["facts"]["wanted"]) == ("no-such-device", "None")


def test_an_empty_name_is_not_this_directory(vmplug: Vmplug) -> None:
    for name in ("", "no such thing"):
        assert vmplug("host", name, "--json").error()["code"] == "no-such-device"
    assert vmplug("host", "9999:0").status == 3


def test_kinds(vmplug: Vmplug, host: PciTree) -> None:
    document = vmplug("host", *at(host), "--kind", "block", "--kind", "mdev", "--json").json()
    assert {kind for kind in KINDS if document[kind]} == {"block", "mdev", "mdev_types"}
    refused = vmplug("host", "--kind", "usb")
    assert refused.status == 2
    assert "vhost-user" in refused.stderr


def test_a_store_that_is_not_there_is_an_error(vmplug: Vmplug, tree: PciTree) -> None:
    refused = vmplug("host", *at(tree), "--vhost-user-store", "/nowhere")
    assert (refused.status, refused.stdout) == (4, "")
    assert "the vhost-user store /nowhere does not exist" in refused.stderr


@pytest.mark.root
def test_a_store_is_shown(vmplug: Vmplug, tmp_path: Path) -> None:
    tree = PciTree(tmp_path).node("/store/block/devices/a", "b", "241:0")
    tree.node("/store/block/devices/b", "b", "242:0")
    (tmp_path / "store/block/sockets").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "store/block/sockets/a"))
    store = ("--vhost-user-store", str(tmp_path / "store"))
    served, unserved = vmplug("host", *store, "--json").json()["vhost_user"]
    assert served == {
        "device_node": f"{tmp_path}/store/block/devices/a",
        "major": 241,
        "minor": 0,
        "kind": "vhost-user-blk-pci",
        "socket_path": f"{tmp_path}/store/block/sockets/a",
        "problem": None,
        "held_by": [],
    }
    assert (unserved["socket_path"], "no socket" in unserved["problem"]) == (None, True)
    shown = vmplug("host", *store, "--kind", "vhost-user").answer()
    assert "nobody serves it" in shown
    assert "vhost-user-blk-pci" in shown


# this host


def test_this_host_is_shown_without_a_word_on_stderr(vmplug: Vmplug) -> None:
    document = vmplug("host", "--json").json()
    assert document["unreadable"] == []
    assert vmplug("host").answer()
    addresses = {function["address"] for function in document["pci"]}
    assert addresses == set(os.listdir("/sys/bus/pci/devices"))


@pytest.mark.root
def test_what_is_mounted_and_what_a_vm_holds(vmplug: Vmplug, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 4 * MIB, "a")
    with (
        loop_device(image) as loop,
        MemoryVm(vmplug.state_dir.with_name("sb1.sock")) as vm,
    ):
        number = Path(f"/sys/class/block/{loop.name}/dev").read_text().strip()
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        before = vmplug("host", str(loop), "--json").json()["block"][0]
        assert (before["held_by"], before["backing_file"]) == ([], str(image))
        vmplug("attach", "--device", f"b:{number}", "--vm", "sb1", "--owner", "c1").answer()
        after = vmplug("host", str(loop), "--json").json()["block"][0]
        assert after["held_by"] == [{"kind": "vm", "device": str(loop), "detail": "sb1"}]
        assert "in use by VM 'sb1' [in-use-by-vm]" in vmplug("host", str(loop)).answer()
        listed = vmplug("host", "--kind", "block", str(loop)).answer()
        assert f"held: {loop} is in VM sb1" in listed


@pytest.mark.parametrize("written", ["3b:00.0", "3B:00.0", "0000:3B:00.0"])
def test_a_device_that_is_asked_for_goes_by_an_address_as_it_is_spoken(
    vmplug: Vmplug, host: PciTree, written: str
) -> None:
    found = vmplug("resolve", *at(host), "--device", f"vfio:{written}", "--json").json()
    assert found == vmplug("resolve", *at(host), "--device", f"vfio:{NVME}", "--json").json()


# record


def shown(vmplug: Vmplug, *arguments: str | Path) -> Result:
    return vmplug(*arguments, "--json")


def test_every_reading_verb_takes_a_record(vmplug: Vmplug, host: PciTree, tmp_path: Path) -> None:
    (host.path / "usr/share/misc/pci.ids").unlink()
    (host.path / "proc/1/fd").rmdir()  # a record does not hold it
    report = tmp_path / "report.tar"
    told = vmplug("record", report, *at(host)).answer()
    assert re.fullmatch(rf"{report} holds \d+ files, \d+ links and \d+ device nodes\n", told)
    verbs = [
        ("host",),
        ("host", NVME),
        ("resolve", "--device", "b:259:1"),
        ("resolve", "--device", f"vfio:{NVME}"),
        ("check", "--device", "b:259:1"),
        ("check", "--device", f"vfio:{NIC}", "--device", f"vfio:{NVME}"),
        ("info", "--device", "b:259:1"),
        ("resolve", "--device", "b:8:99"),
    ]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary)}
    for verb in verbs:
        of_record = vmplug(*verb, "--root", report, "--json", env=env)
        assert of_record == shown(vmplug, *verb, *at(host)), verb
    assert list(temporary.iterdir()) == []


def test_record_answers_in_json(vmplug: Vmplug, host: PciTree, tmp_path: Path) -> None:
    answer = vmplug("record", tmp_path / "r.tgz", *at(host), "--json").json()
    assert answer.keys() == {"file", "files", "links", "nodes", "unreadable"}
    assert answer["files"] > 50
    assert answer["unreadable"] == []


def test_record_replaces_nothing_unless_told(
    vmplug: Vmplug, host: PciTree, tmp_path: Path
) -> None:
    (tmp_path / "r.tar").write_text("mine")
    refused = vmplug("record", tmp_path / "r.tar", *at(host))
    assert (refused.status, refused.stdout) == (3, "")
    assert refused.stderr.splitlines() == [
        f"vmplug: {tmp_path}/r.tar: already exists",
        "hint: name another file, or pass --force",
    ]
    assert (tmp_path / "r.tar").read_text() == "mine"
    vmplug("record", tmp_path / "r.tar", *at(host), "--force").answer()
    assert (tmp_path / "r.tar").read_bytes()[:4] != b"mine"


def test_a_place_that_cannot_be_written_is_told(vmplug: Vmplug, host: PciTree) -> None:
    refused = vmplug("record", "/nowhere/r.tar", *at(host))
    assert refused.status == 3
    assert "the record cannot be written: No such file or directory" in refused.stderr


@pytest.mark.parametrize("verb", [("host",), ("check", "-d", "c:1:3"), ("resolve", "-d", "c:1:3")])
def test_a_file_that_is_no_record_is_told(
    vmplug: Vmplug, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    (tmp_path / "x.tar").write_text("hello\n" * 1000)
    refused = vmplug(*verb, "--root", tmp_path / "x.tar")
    assert (refused.status, refused.stdout) == (3, "")
    assert refused.stderr.startswith(f"vmplug: {tmp_path}/x.tar: cannot be read as a tar file: ")
    assert "hint: vmplug record writes such a file" in refused.stderr


def test_this_hosts_record_is_this_host(vmplug: Vmplug, tmp_path: Path) -> None:
    """It is made again when they differ: somebody else may have mounted a disk in between."""

    def shows(*words: str | Path) -> list[Result]:
        return [shown(vmplug, "host", "--kind", kind, *words) for kind in ("pci", "mdev")]

    for number in range(20):
        file = tmp_path / f"{number}.tar"
        vmplug("record", file).answer()
        recorded, live = shows("--root", file), shows()
        if recorded == live:
            break
    assert recorded == live


def test_progress_is_shown_at_a_terminal_on_stderr_only(
    vmplug: Vmplug, host: PciTree, tmp_path: Path
) -> None:
    done = vmplug("record", tmp_path / "r.tar", *at(host), "--json")
    assert done.stderr == ""
    json.loads(done.stdout)
