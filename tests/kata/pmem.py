"""Persistent memory: which file is meant, whether the guest can map it, and how it is plugged."""

from dataclasses import replace
from typing import Any

from tests.kata.cold import LIVE
from tests.kata.machine import Machine
from tests.kata.terms import Terms, commands
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Facts,
    error_of,
    kind_of,
    kinds_of,
)
from tests.support.tree import HostTree
from vmplug.host.block.pmem import read_pfn_info
from vmplug.host.block.volumes import find_volumes
from vmplug.host.finding import Code
from vmplug.journal.records import Attachment
from vmplug.oci.info import DeviceInfo, DevType, Mount

_SIGNATURE = b"NVDIMM_PFN_INFO"
_SIGNED = bytes(4096) + _SIGNATURE
_FILES = {
    "absent": None,
    "0 bytes": b"",
    "4096 zero bytes + NVDIMM_PFN_INFO": _SIGNED,
    "signature at offset 0": _SIGNATURE,
    "4096 zero bytes + lower-case signature": _SIGNED.lower(),
    "4097 zero bytes + signature": bytes(1) + _SIGNED,
}
_IMAGE = "<regular file of 8192 bytes>"
ALIGNED_BYTES = 2 << 20
"""A size behind which the guest can use another."""


def _signature(case: Case) -> Answer:
    tree = HostTree(case.path)
    content = _FILES[case.setup["file"]]
    if content is not None:
        tree.file("/f", content)
    path = case.input["path"].removeprefix("$ROOT")
    return Answer(read_pfn_info(path, tree.root) is not None, case.expected["result"])


def _volume(case: Case) -> Answer:
    """Kata looks for the loop device of the source's file system, whatever it shows of that."""
    tree = HostTree(case.path)
    fs = case.setup.get("fs", {})
    for directory in fs.get("dirs", ()):
        (case.path / directory).mkdir()
    for path, text in fs.get("files", {}).items():
        _add_file(tree, path, text)
    if "sys_dev_path" in case.setup:
        assert case.setup["sys_dev_path"] == "$ROOT/sd"
        (case.path / "sys/dev/block").mkdir(parents=True)
        tree.link("/sys/dev/block/7:0", "../../../sd")
    source = case.input["source"].removeprefix("$ROOT")
    if source == "/proc":
        _mount(tree, "/proc", "proc")
    elif case.mended:
        _mount(tree, source, "ext4")
    volume = _find(case.input["destination"], source, tree, is_said=case.mended)
    if case.expected["result"] is None:
        return Answer(volume, kind_of(case.expected["error"]))
    assert case.expected["error"] is None
    return Answer(volume, _katas_volume(case.expected["result"]))


def _add_file(tree: HostTree, path: str, text: str) -> None:
    content = _SIGNED if text == "<4096 NUL><NVDIMM_PFN_INFO>" else text.replace("$ROOT", "")
    tree.file(path, content)


def _mount(tree: HostTree, path: str, fs_type: str) -> None:
    """The file system on loop device 7:0, the whole of it."""
    (tree.path / path.lstrip("/")).mkdir(exist_ok=True)
    tree.file("/proc/1/mountinfo", f"36 1 7:0 / {path} rw shared:1 - {fs_type} /dev/loop0 rw\n")


def _find(
    destination: str, source: str, tree: HostTree, *, is_said: bool
) -> dict[str, Any] | None:
    said = {"block-driver": "nvdimm"} if is_said else {}
    mount = Mount(destination, source, type="bind", read_only=False, driver_options=said)
    volumes = find_volumes([mount], tree.root)
    if not volumes:
        return None
    (info,) = volumes
    options = dict(info.driver_options)
    assert options.pop("block-driver") == "nvdimm"
    return {
        "ContainerPath": info.container_path,
        "DevType": str(info.dev_type),
        "DriverOptions": options,
        "HostPath": info.host_path,
        "Pmem": info.pmem,
    }


def _katas_volume(result: Facts) -> dict[str, Any]:
    result.skip("a file of ours has no number", "major_minor_equal_st_dev_of_source")
    result.skip("ours is drawn when it is plugged", "ID")
    facts = {key: result[key] for key in ("ContainerPath", "DevType", "DriverOptions", "Pmem")}
    return {**facts, "HostPath": result["HostPath"].removeprefix("$ROOT")}


def mounted_directory(case: Case) -> Answer:
    """The directory of Container.createDeviceInfo, on a file that the guest can map."""
    assert case.input["source"] == "directory"
    tree = HostTree(case.path).file("/img", _SIGNED)
    tree.file("/sys/dev/block/7:0/loop/backing_file", "/img\n")
    _mount(tree, "/volume", "xfs")
    volume = _find("/data", "/volume", tree, is_said=case.mended)
    ours = volume and {key: volume[key] for key in ("DevType", "Pmem", "DriverOptions")}
    options = case.expected["DriverOptions"]
    assert options["fstype"] == "<fs>"
    katas = {key: case.expected[key] for key in ("DevType", "Pmem")}
    return Answer(ours, {**katas, "DriverOptions": {"fstype": "xfs"}})


def hot_plug(case: Case) -> Answer:
    """A file of qemu.hotplugBlockDevice that is memory; its odd size must be allowed first."""
    drive = case.input["drive"]
    assert (drive["Index"], drive["ReadOnly"], drive["Swap"]) == (0, False, False)
    drive.skip("ours is drawn", "ID")
    path = image(case, 8192) if drive["File"] == _IMAGE else drive["File"]
    machine = Machine(case, LIVE)
    driver = _driver(case.setup)
    options = {} if drive["Pmem"] else {"block-driver": driver}
    info = memory(path, pmem=drive["Pmem"], driver_options=options)
    refused = error_of(machine.try_attach(info))
    answer = machine.try_attach(info, allow=[Code.NVDIMM_SIZE])
    ours: dict[str, Any] = {"errors": [error_of(answer)], "NvdimmID": ""}
    if isinstance(answer, Attachment):
        assert answer.guest_address
        ours |= {"NvdimmID": str(answer.guest_address.nvdimm_id), "unasked": refused}
        if case.input["ops"] == ["add", "remove"]:
            ours["errors"].append(machine.try_detach(answer))
            ours["states"] = [str(record.state) for record in machine.records()]
    else:
        assert case.input["ops"] == ["add"]
    katas = {
        "errors": kinds_of(case.expected["errors"]),
        "NvdimmID": case.expected["NvdimmID"],
        "qmp": commands(case.expected["qmp"] or ()),
    }
    assert case.expected["PCIPath"] == case.expected["DevNo"] == ""
    assert [bridge["slots"] for bridge in case.expected["bridges_after"]] == [{}]
    return Answer({**ours, "qmp": _said(machine, path, drive["File"])}, katas)


def _driver(setup: Facts) -> str:
    """The driver of the VM's disks; nothing else there speaks of memory."""
    setup.skip("for disks only", "aio", "bridges", "cache_direct", "cache_set")
    setup.skip("for disks only", "iothreads", "indep_iothreads", "vcpus")
    if setup["qmp_replies"]:
        setup["qmp_replies"].skip("never asked for: the device is QEMU's to keep", "device_del")
    return str(setup["block_device_driver"])


def image(case: Case, size_bytes: int, name: str = "image") -> str:
    """The path of a file of that size."""
    path = case.path / name
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return str(path)


def memory(path: str, container_path: str = "/dev/memory", **more: Any) -> DeviceInfo:
    """A request for a file as memory."""
    return DeviceInfo(
        container_path=container_path, dev_type=DevType.BLOCK, host_path=path, **more
    )


def _said(machine: Machine, path: str, word: str) -> Terms:
    """What was said to QEMU, with Kata's word for the file."""
    terms = commands(machine.changes)
    for _, arguments in terms:
        if arguments.get("mem-path") == path:
            arguments["mem-path"] = word
    return terms


def _add_to_qemu(case: Case) -> Answer:
    """As large as asked for, and as large as it must be."""
    size = case.input.get("size", 1024)
    assert case.input["id"]
    asked = replace(case, path=case.path / "asked")
    asked.path.mkdir()
    refused = _added(asked, size)
    ours = {"as asked": refused, "of 2 MiB": _added(case, ALIGNED_BYTES)}
    said = {"error": kind_of(case.expected["error"]), "commands": _katas(case)}
    return Answer(ours, {"as asked": said, "of 2 MiB": said})


def _added(case: Case, size_bytes: int) -> dict[str, Any]:
    path = image(case, size_bytes)
    machine = Machine(case, LIVE)
    if replies := case.setup.get("replies"):
        assert "no slot" in replies[1]
        machine.monitor.fail_at = "device_add"
    is_pmem = case.input.get("pmem", True)
    answer = machine.try_attach(memory(path, pmem=is_pmem))
    said = _said(machine, path, case.input.get("mem_path", "/img"))
    return {"error": error_of(answer), "commands": said}


def _katas(case: Case) -> Terms:
    return commands(dict(command) for command in case.expected["commands"])


ADAPTERS: dict[str, Adapter] = {
    "config.hasPFNSignature": _signature,
    "config.PmemDeviceInfo": _volume,
    "govmm QMP.ExecuteNVDIMMDeviceAdd": _add_to_qemu,
}
