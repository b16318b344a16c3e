"""Cold plug: devices as options of a QEMU that is to be started."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from tests.kata.cold import LIVE, ColdMachine
from tests.kata.pmem import image, memory
from tests.kata.terms import Terms, command_line
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Facts,
    Refusal,
    attempt,
    kind_of,
)
from tests.support.tree import HostTree
from vmplug.address import CcwDevNo, new_id
from vmplug.drivers.place import CcwPlace, Place
from vmplug.drivers.plug import SharedFS
from vmplug.drivers.ports import NewPlug
from vmplug.host.finding import Code
from vmplug.hypervisor.qemu.start import machine as machines
from vmplug.hypervisor.qemu.start.machine import Machine
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request, RngInfo, ShareInfo

_INVALID = "invalid"
"""Kata does not say what is wrong with a device that it does not write."""


def answer(case: Case, ours: Terms | Refusal) -> Answer:
    """Ours beside Kata's command line, or that both refuse."""
    katas = command_line(case.expected["argv"]) if case.expected["valid"] else _INVALID
    if katas == _INVALID:
        assert case.expected["argv"] is None
        return Answer(_INVALID if isinstance(ours, Refusal) else ours, katas)
    return Answer(ours, katas)


def written(machine: ColdMachine, info: Request, allow: Sequence[Code] = ()) -> Terms | Refusal:
    """What a request puts on the command line of a machine, or why it does not."""
    hold = machine.try_attach(info, allow=allow)
    return hold if isinstance(hold, Refusal) else machine.terms()


def _disk(case: Case) -> Answer:
    """The drive's name is the disk's serial in Kata, which is an option of ours."""
    said = case.input
    assert said["Driver"] == "virtio-blk"
    assert said.get("Interface", "none") == "none"
    assert said.get("DevNo", "fe.0.0001") == "fe.0.0001"
    said.skip("the machine's", "Transport")
    said.skip("QEMU lets the guest choose, unless it is told not to", "WCE")
    options = {"cache": "writeback"}
    for key, option in (("AIO", "aio"), ("Format", "format"), ("ID", "serial")):
        if key in said:
            options[option] = said[key]
    if said.get("ShareRW"):
        options["share-rw"] = "on"
    tree, path = HostTree(case.path), said.get("File", "")
    machine = ColdMachine(case, tree.root, Machine(case.setup["machine"]))
    read_only = said.get("ReadOnly", False)
    info = attempt(lambda: _disk_request(tree, path, options, read_only=read_only))
    ours = info if isinstance(info, Refusal) else written(machine, info)
    return answer(case, ours)


def _disk_request(
    tree: HostTree, path: str, options: dict[str, str], *, read_only: bool
) -> DeviceInfo:
    info = DeviceInfo(
        container_path="/dev/sda",
        dev_type=DevType.BLOCK,
        host_path=path,
        read_only=read_only,
        driver_options=options,
    )
    tree.file(path, bytes(512))
    return info


def _memory(case: Case) -> Answer:
    said = case.input
    assert case.setup["machine"] == "q35"
    assert (said["Driver"], said["Type"]) == ("nvdimm", "memory-backend-file")
    assert said["ID"]
    assert said["DeviceID"]
    path, word = image(case, said.get("Size", 0)), said["MemPath"]
    info = memory(path, pmem=True)
    ours = written(ColdMachine(case, LIVE.root), info, [Code.NVDIMM_SIZE])
    for _, facts in () if isinstance(ours, Refusal) else ours:
        if facts.get("mem-path") == path:
            facts["mem-path"] = word
    return answer(case, ours)


def _scsi_controller(case: Case) -> Answer:
    """The machine's own."""
    case.input.skip("of the machine's own nothing can be chosen", *case.input)
    spec = machines.VmSpec(name="vm", machine=Machine(case.setup["machine"]))
    arguments = machines.command_line(spec, 3, 4)
    pairs = pairwise(arguments)
    found = [pair for pair in pairs if pair[0] == "-device" and "virtio-scsi" in pair[1]]
    return answer(case, command_line([word for pair in found for word in pair]))


def _random_numbers(case: Case) -> Answer:
    said = case.input
    source = {"source": said["Filename"]} if "Filename" in said else {}
    info = attempt(lambda: RngInfo(label=said.get("ID", ""), **source))
    machine = ColdMachine(case, LIVE.root, Machine(case.setup["machine"]))
    return answer(case, info if isinstance(info, Refusal) else written(machine, info))


def _share_by_qemu(case: Case) -> Answer:
    said = case.input
    said.skip("ours is drawn", "ID")
    said.skip("there are no such options", "DisableModern", "ROMFile")
    for key, fixed in (("FSDriver", "local"), ("SecurityModel", "none"), ("Multidev", "remap")):
        assert said.get(key, fixed) == fixed
    assert said.get("Transport", "ccw") == "ccw"
    tree = HostTree(case.path)
    (case.path / said["Path"].lstrip("/")).mkdir(parents=True)
    machine = ColdMachine(case, tree.root, Machine(case.setup["machine"] or "q35"))
    info = attempt(lambda: _by_9p(said.get("MountTag", ""), said["Path"], said["Driver"]))
    if isinstance(info, Refusal):
        return answer(case, info)
    if "DevNo" in said:
        place = CcwPlace(devno=CcwDevNo.parse(said["DevNo"]))
        return answer(case, written_at(machine, info, place))
    return answer(case, written(machine, info))


def _by_9p(tag: str, source: str, filesystem: str) -> ShareInfo:
    return ShareInfo(tag=tag, source=source, driver_options={"filesystem": filesystem})


def written_at(machine: ColdMachine, info: Request, place: Place) -> Terms:
    """As it is written for a place that is given; the directory of a copied host is not opened."""
    (examined,) = machine.manager.check([info])
    assert examined.device
    assert examined.driver
    new = NewPlug(id=new_id(), device=examined.device, read_only=False)
    plug = examined.driver.plan(new, place, machine.qemu.offer())
    machine.qemu.plug(replace(plug, file_id=None) if isinstance(plug, SharedFS) else plug, place)
    return machine.terms()


def _9p_of_kata(case: Case) -> Answer:
    """Kata's name for it is made of the tag, ours is not: the tag is what there is to compare."""
    tag = case.input["MountTag"]
    tree = HostTree(case.path)
    (case.path / "p").mkdir()
    info = attempt(lambda: _by_9p(tag, "/p", "virtio-9p"))
    ours = info if isinstance(info, Refusal) else written(ColdMachine(case, tree.root), info)
    return Answer(ours, case.expected["ID"].removeprefix("extra-9p-"))


def _disk_of_kata(case: Case) -> Answer:
    """The asynchronous I/O of the kind of cache that Kata takes."""
    said = case.input
    assert not any(said[key] for key in ("DiscardUnmap", "ReadOnly", "ShareRW"))
    options = {"cache": "writeback", "format": said["Format"]}
    if said["ID"]:
        options["serial"] = said["ID"]
    tree = HostTree(case.path)
    info = attempt(lambda: _disk_request(tree, said["File"], options, read_only=False))
    ours = info if isinstance(info, Refusal) else written(ColdMachine(case, tree.root), info)
    if not isinstance(ours, Refusal):
        (front, (_, node)) = ours
        facts = {"AIO": node["aio"], "Format": node["format"], "ID": front[1]["serial"]}
        return Answer(facts, _katas_disk(case.expected))
    return Answer(ours, _katas_disk(case.expected))


def _katas_disk(expected: Facts) -> Any:
    assert expected["Interface"] == ("" if expected["error"] else "none")
    facts = {key: expected[key] for key in ("AIO", "Format", "ID")}
    return kind_of(expected["error"]) or facts


ADAPTERS: dict[str, Adapter] = {
    "govmm qemu.BlockDevice.QemuParams": _disk,
    "govmm qemu.FSDevice.QemuParams": _share_by_qemu,
    "govmm qemu.Object.QemuParams": _memory,
    "govmm qemu.RngDevice.QemuParams": _random_numbers,
    "govmm qemu.SCSIController.QemuParams": _scsi_controller,
    "qemu.generic9PVolume": _9p_of_kata,
    "qemu.genericBlockDevice": _disk_of_kata,
}
