"""Unplug devices: ask the guest, wait for it, and give functions back to the host."""

from collections.abc import Iterable, Sequence

import msgspec

from vmplug.drivers.ports import Hypervisor, UnplugFailure
from vmplug.errors import BindError
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord, foreign_names
from vmplug.journal.state import State, unplug_error
from vmplug.log import Log
from vmplug.manager.binding.binder import Binder
from vmplug.manager.left_files import close_left_files
from vmplug.waiting import waiting

log = Log(__name__)


class Unplugger(msgspec.Struct, frozen=True, kw_only=True):
    """Unplugs devices of one VM that are detaching in the journal."""

    vm: str
    journal: Journal
    hypervisor: Hypervisor
    binder: Binder

    def unplug(self, records: Sequence[DeviceRecord], timeout_s: float) -> None:
        """Ask for all first and wait for all together; forget those that are gone.

        Raises CommandError, UnplugRefused or UnplugTimeout for devices that stay, and BindError
        for a function that its former driver does not take.
        """
        with self.journal.in_progress([record.id for record in records]):
            if any(record.place for record in records):
                close_left_files(self.vm, self.journal, self.hypervisor)
            self._unplug(records, timeout_s)
        for record in records:
            facts = {"vm": self.vm, "device_id": record.id}
            log.info("unplugged device %s: VM %s", record.id, self.vm, extra=facts)

    def _unplug(self, records: Sequence[DeviceRecord], timeout_s: float) -> None:
        self.hypervisor.claim_foreign_names(foreign_names(records))
        plugged = [record.id for record in records if record.place]
        refused = self.hypervisor.request_unplug(plugged) if plugged else {}
        if refused:
            self.journal.set_state(list(refused), State.ATTACHED)
        asked = [record for record in records if record.place and record.id not in refused]
        left = self._wait(asked, timeout_s) if asked else {}
        stay = left.keys() | refused.keys()
        gone = [record.id for record in records if record.id not in stay]
        unreturned = self.give_back(gone)
        self.journal.forget_devices(gone)
        if refused:
            raise refused.popitem()[1]
        if left:
            paths = {r.id: r.host_path for r in self.journal.devices(self.vm)}
            raise unplug_error(left, paths, timeout_s=timeout_s, status=self.hypervisor.status)
        if unreturned:
            raise unreturned

    def _wait(self, asked: Sequence[DeviceRecord], timeout_s: float) -> dict[str, UnplugFailure]:
        paths = [record.host_path for record in asked]
        what = f"the guest of VM {self.vm} to release {_few(paths)}"
        with waiting(what, timeout_s):
            return self.hypervisor.wait_unplugged([record.id for record in asked], timeout_s)

    def give_back(self, device_ids: Iterable[str]) -> BindError | None:
        """Give functions that `managed` bound back to their drivers; returns the failure, if any.

        A function that fails stays in the journal, for reconcile.
        """
        failure = None
        for device_id in device_ids:
            for told in self.binder.give_back(device_id):
                failure = told.error or failure
        return failure


def _few(paths: Sequence[str]) -> str:
    """`/dev/sdb`, `/dev/sdb and /dev/sdc`, `/dev/sdb and 3 others`."""
    first, *others = paths
    return (
        f"{first} and {others[0] if len(others) == 1 else f'{len(others)} others'}"
        if others
        else first
    )
