"""A VM that is still to be started, with its manager: what it is given is on its command line."""

from collections.abc import Iterable
from pathlib import Path

from tests.kata.machine import VM
from tests.kata.terms import Terms, command_line
from tests.kata.vector import Case, Refusal, attempt, error_of
from tests.support.abilities import OLD
from tests.support.tree import HostTree
from vmplug.host.finding import Code
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.machine import Machine, VmSpec
from vmplug.hypervisor.virtiofsd import VirtiofsdRunner
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.manager.manager import DeviceManager
from vmplug.oci.requests import Request

LIVE = HostTree(Path("/"))
"""The running host, for files that are to be memory: before QEMU makes them anew they are looked
at, and that is below no other root."""


class ColdMachine:
    """As `Machine`, but cold; in a restored life every step has a new manager.

    `boot_disk` says that it boots from a disk, which is the guest's first.
    """

    def __init__(
        self,
        case: Case,
        root: HostRoot,
        machine: Machine = Machine.Q35,
        *,
        boot_disk: bool = False,
        daemons: VirtiofsdRunner | None = None,
        store: VhostUserStore | None = None,
    ) -> None:
        disk = "/boot.img" if boot_disk else None
        self.spec = VmSpec(name=VM, machine=machine, disk=disk)
        self.qemu = ColdQemu(
            self.spec, case.path / "vm", daemons, OLD, root
        )  # as the QEMUs of Kata
        self._root = root
        self._store = store
        self._restored = case.restored
        self._state_dir = case.path / "state"
        self._manager = self._open()
        case.at_end.callback(self.close)

    def _open(self) -> DeviceManager:
        return DeviceManager.open(
            vm=VM,
            host=self._root,
            hypervisor=self.qemu,
            state_dir=self._state_dir,
            vhost_user_store=self._store,
        )

    def close(self) -> None:
        """The journal and the VM stay."""
        self._manager.close()

    @property
    def manager(self) -> DeviceManager:
        """The manager for the next step."""
        if self._restored:
            self.close()
            self._manager = self._open()
        return self._manager

    def try_attach(self, info: Request, *, allow: Iterable[Code] = ()) -> Attachment | Refusal:
        return attempt(lambda: self.manager.attach(info, allow=allow))

    def try_detach(self, hold: Attachment) -> Refusal | None:
        return error_of(attempt(lambda: self.manager.detach(hold.id)))

    def records(self) -> list[DeviceRecord]:
        """The devices of the VM as they are saved."""
        with Journal.open(self._state_dir) as journal:
            return journal.devices(VM)

    def terms(self) -> Terms:
        """What it was given."""
        return command_line(self.qemu.arguments())
