"""The agent in the guest: what it is told of disks that are neither PCI nor SCSI."""

from typing import Any

from tests.kata.cold import LIVE, ColdMachine
from tests.kata.host import add_device, disk, request
from tests.kata.machine import Machine, agent_record
from tests.kata.pmem import ALIGNED_BYTES, image, memory
from tests.kata.vector import Answer, Case, Facts
from tests.support.tree import HostTree
from vmplug.hypervisor.qemu.start.machine import Machine as MachineType
from vmplug.journal.records import Attachment

_MACHINES = {"virtio-mmio": MachineType.MICROVM, "virtio-blk-ccw": MachineType.S390}


def device(case: Case) -> Answer:
    """The record of a device, of kataAgent.appendBlockDevice."""
    path = case.input["container_path"]
    hold = _attach(case, case.setup["block_device_driver"], path)
    record = agent_record(hold)
    ours = {key: record[key] for key in ("type", "id", "vm_path")}
    return Answer({**ours, "container_path": hold.container_path}, dict(case.expected))


def volume(case: Case) -> Answer:
    """The record of a volume, of kataAgent.handleBlockVolume; the guest looks at its source."""
    drive = case.input["drive"]
    is_memory = drive.get("Pmem", False)
    driver = "nvdimm" if is_memory else case.setup["block_device_driver"]
    assert case.setup["block_device_driver"] in {driver, "any"}
    options = {"fstype": drive["Format"]} if "Format" in drive else {}
    record = agent_record(_attach(case, driver, "/data", pmem=is_memory, options=options))
    ours = {"driver": record["type"], "source": record["vm_path"] or record["id"]}
    if is_memory:
        ours |= {"fstype": record["fstype"], "options": record["options"]}
    return Answer(ours, dict(case.expected))


def _attach(
    case: Case,
    driver: str,
    container_path: str,
    *,
    pmem: bool = False,
    options: dict[str, str] | None = None,
) -> Attachment:
    """A disk that gets the place of Kata's: the second one where the guest counts."""
    said = {**({} if pmem else {"block-driver": driver}), **(options or {})}
    drive: Facts = case.input["drive"]
    if driver == "nvdimm":
        assert drive["NvdimmID"] == "1"
        machine = Machine(case, LIVE)
        machine.attach(memory(image(case, ALIGNED_BYTES, "first"), pmem=True))
        second = image(case, ALIGNED_BYTES, "second")
        return machine.attach(
            memory(second, container_path=container_path, pmem=pmem, driver_options=said)
        )
    address = drive["VirtPath"] if driver == "virtio-mmio" else drive["DevNo"]
    assert address in {"/dev/vdb", "0.0.0001"}
    tree = HostTree(case.path)
    asked: dict[str, Any] = {**disk("sda"), "ContainerPath": container_path}
    add_device(tree, disk("sda"))
    is_mmio = driver == "virtio-mmio"
    cold = ColdMachine(case, tree.root, _MACHINES[driver], boot_disk=is_mmio)
    answer = cold.try_attach(request(asked, driver_options=said))
    assert isinstance(answer, Attachment)
    return answer
