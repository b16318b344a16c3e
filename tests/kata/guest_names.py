"""Names in the guest: /dev/vda and its like, where they can be known."""

from tests.kata.cold import ColdMachine
from tests.kata.host import add_device, disk, request
from tests.kata.vector import Adapter, Answer, Case, attempt, katas_result
from tests.support.tree import HostTree
from vmplug.address import virtio_disk_path
from vmplug.hypervisor.qemu.start.machine import Machine
from vmplug.journal.records import Attachment


def _disk_name(case: Case) -> Answer:
    path = attempt(lambda: virtio_disk_path(case.input["index"]))
    ours = path.removeprefix("/dev/") if isinstance(path, str) else path
    return Answer(ours, katas_result(case.expected))


def _is_named(case: Case) -> Answer:
    """Whether a disk with these options goes by a name such as /dev/vda."""
    tree = HostTree(case.path)
    add_device(tree, disk("sda"))
    options = dict(case.input["driver_options"])
    is_ccw = options.get("block-driver") == "virtio-blk-ccw"
    machine = ColdMachine(case, tree.root, Machine.S390 if is_ccw else Machine.Q35)
    hold = machine.try_attach(request(disk("sda"), driver_options=options))
    assert isinstance(hold, Attachment)
    assert hold.guest_address
    return Answer(hold.guest_address.virt_path is not None, case.expected["result"])


ADAPTERS: dict[str, Adapter] = {
    "utils.GetVirtDriveName": _disk_name,
    "drivers.isVirtioBlkBlockDriver": _is_named,
}
