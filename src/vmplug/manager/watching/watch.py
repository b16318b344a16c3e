"""Watch: report events of the host devices that VMs have, as they happen.

It changes nothing, and asks no backend. The kernel reports at once devices that come and go, and
processes that end. Watch checks everything else (files, sockets, changes of the journal) every
LOOK_INTERVAL_S, and asks the VMs every ASK_INTERVAL_S whether an error has stopped them.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Self

import msgspec

from vmplug.drivers.ports import FailedDisk
from vmplug.host.events import Event, EventsLost, HostEvents, ProcessEnded
from vmplug.host.kind import Identity
from vmplug.host.process import ProcessLock
from vmplug.host.program import Looks
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.sockets import UnixSockets
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord, has_ended
from vmplug.manager.watching.health import (
    DeviceHealth,
    HostSnapshot,
    HostState,
    find_silent,
    is_settled,
    socket_of,
)
from vmplug.manager.watching.notice import (
    DeviceEvent,
    compare,
    device_notices,
    ended_notice,
    find_removed,
    lost_notice,
    resumed_notice,
    stopped_notice,
    was_taken_away,
)

LOOK_INTERVAL_S = 1.0
ASK_INTERVAL_S = 5.0
"""A QMP socket serves one client at a time: a watch must not be in the way of the others."""


FindFailedDisks = Callable[
    [Sequence[VmRecord], Sequence[DeviceRecord], Journal], Mapping[str, tuple[FailedDisk, ...]]
]
"""By VM, the disks that have stopped it; a VM that does not answer is left out."""


class _Rows(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of the journal at one version."""

    version: int
    vms: Sequence[VmRecord]
    devices: Sequence[DeviceRecord]
    holds: Sequence[Attachment]


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What the last check covered.

    `unknown` of the `devices` cannot be judged: they are on their way, or not visible. The VMs in
    `silent_vms` did not say whether an error on a disk has stopped them.
    """

    vms: int = 0
    devices: int = 0
    unknown: int = 0
    silent_vms: tuple[str, ...] = ()


class Watch(Iterator[DeviceEvent]):
    """Iterates over notices; a context manager that closes its arguments.

    One thread iterates. Another one may close it, which ends the iteration. `looked` says what the
    last check covered: no notice means that nothing of that is wrong.
    """

    def __init__(
        self,
        journal: Journal,
        events: HostEvents,
        *,
        host: HostRoot,
        find_failed_disks: FindFailedDisks = lambda *_: {},
        vm: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._journal = journal
        self._events = events
        self._host = host
        self._vm = vm
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._rows: _Rows | None = None
        self._seen: dict[str, DeviceHealth] = {}
        self._ended: set[VmRecord] = set()
        self._find_failed_disks = find_failed_disks
        self._stopped: dict[str, tuple[FailedDisk, ...]] = {}
        self._asked_at = -ASK_INTERVAL_S
        self._servers: dict[str, int | None] = {}
        self._daemons: dict[str, int] = {}
        self._looks = Looks()
        self._waiting: deque[DeviceEvent] = deque()
        self._silent_vms: tuple[str, ...] = ()
        self._is_closed = False
        self.looked = Looked()
        self._in_use = ProcessLock()

    def close(self) -> None:
        """Stop: there are no more notices. It waits for a check in another thread."""
        was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            with self._in_use:
                self._looks.close()
                self._events.close()
                self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __next__(self) -> DeviceEvent:
        """Wait for the next notice; StopIteration when the time is over."""
        while not self._waiting and self._wait():
            pass
        if self._is_closed or not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def take(self) -> list[DeviceEvent] | None:
        """The notices that wait, or those of the next check; None when the time is over.

        It takes about LOOK_INTERVAL_S, so that a thread may stop in between.
        """
        is_going_on = bool(self._waiting) or self._wait()
        if self._is_closed or not is_going_on:
            return None
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def _wait(self) -> bool:
        """Wait for events, and check once; False when the time is over, or it is closed."""
        left = LOOK_INTERVAL_S
        if self._deadline is not None and self._rows is not None:
            left = min(left, self._deadline - time.monotonic())
        if left <= 0:
            return False
        with self._in_use:
            if self._is_closed:
                return False
            self._look([] if self._rows is None else self._events.wait(left))
        return True

    def _look(self, happened: Sequence[Event]) -> None:
        """Check every device, and queue notices of changes.

        A device counts only if its record in the journal was the same before and after the check.
        Otherwise the change may be vmplug's own, such as a function that is given back. Events
        before the device was first seen in the VM do not count: it was still being bound.
        """
        before = self._rows = self._read()
        self._events.follow(self._pids(before))
        happened = [*happened, *self._events.wait(0)]
        self._forget_servers({event.pid for event in happened if isinstance(event, ProcessEnded)})
        silent = find_silent(before.devices, self._looks, self._host)
        snapshot = HostSnapshot(self._host, before.vms, self._daemons, silent)
        checked = [(r, snapshot.of(r)) for r in before.devices if is_settled(r)]
        ended = [vm for vm in before.vms if vm not in self._ended and has_ended(vm, self._host)]
        after = self._rows = self._read()
        # Notices explain those that follow: lost events all, an ended VM its devices.
        if any(isinstance(event, EventsLost) for event in happened):
            self._waiting.append(lost_notice())
        self._note_ended(ended, before, after)
        self._note_changes(checked, after, happened)
        self._note_stopped(after)
        self.looked = Looked(
            vms=sum(not vm.is_lease for vm in after.vms),
            devices=len(before.devices),
            unknown=len(before.devices) - sum(health is not None for _, health in checked),
            silent_vms=self._silent_vms,
        )
        self._find_servers([record for record, _ in checked])
        self._events.follow(self._pids(after))

    def _note_ended(self, ended: Sequence[VmRecord], before: _Rows, after: _Rows) -> None:
        """Queue a notice of each VM that has ended and is still in the journal."""
        self._waiting += [ended_notice(vm, before.holds) for vm in ended if vm in after.vms]
        self._ended = {vm for vm in {*self._ended, *ended} if vm in after.vms}

    def _note_stopped(self, rows: _Rows) -> None:
        """Ask the VMs now and then, and queue a notice of each that stopped or runs again."""
        if time.monotonic() < self._asked_at + ASK_INTERVAL_S:
            return
        self._asked_at = time.monotonic()
        vms = [vm for vm in rows.vms if vm not in self._ended and not vm.is_lease]
        answers = self._find_failed_disks(vms, rows.devices, self._journal)
        self._silent_vms = tuple(vm.name for vm in vms if vm.name not in answers)
        for name, disks in answers.items():
            before = self._stopped.pop(name, ())
            if disks and disks != before:
                self._waiting.append(stopped_notice(name, disks))
            if before and not disks:
                self._waiting.append(resumed_notice(name))
            if disks:
                self._stopped[name] = disks

    def _note_changes(
        self,
        checked: Sequence[tuple[DeviceRecord, DeviceHealth | None]],
        after: _Rows,
        happened: Sequence[Event],
    ) -> None:
        """Queue the notices of devices whose records are the same after the check."""
        same, removed = set(map(_key, after.devices)), find_removed(happened)
        holds = defaultdict[str, list[Attachment]](list)
        for hold in after.holds:
            holds[hold.device_id].append(hold)
        ended = {vm.name for vm in self._ended}
        for record, now in checked:
            if now and _key(record) in same and record.vm not in ended:
                self._judge(record, now, removed, holds[record.id])
        present = {record.id for record in after.devices}
        self._seen = {name: health for name, health in self._seen.items() if name in present}

    def _judge(
        self,
        record: DeviceRecord,
        now: DeviceHealth,
        removed: AbstractSet[Identity | str],
        holds: Sequence[Attachment],
    ) -> None:
        before = self._seen.get(record.id)
        taken_away = before is not None and was_taken_away(record, removed)
        what = compare(before, now, taken_away=taken_away)
        if what:
            self._waiting += device_notices(what, record, holds, before=before, now=now)
        self._seen[record.id] = now

    def _read(self) -> _Rows:
        """The contents of the journal; read again only after a change."""
        before, journal = self._journal, self._journal.renewed()
        self._journal, version = journal, journal.version()
        if self._rows and journal is before and self._rows.version == version:
            return self._rows
        vms = [vm for vm in journal.all_holders() if self._vm in {None, vm.name}]
        # The process of a lease is watched, and not its devices, which no verb detaches.
        devices = [d for vm in vms if not vm.is_lease for d in journal.devices(vm.name)]
        return _Rows(
            version=version, vms=vms, devices=devices, holds=journal.attachments(self._vm)
        )

    def _pids(self, rows: _Rows) -> set[int]:
        vms = {vm.pid for vm in rows.vms if vm.pid and vm not in self._ended}
        return {*vms, *self._daemons.values(), *(pid for pid in self._servers.values() if pid)}

    def _find_servers(self, records: Sequence[DeviceRecord]) -> None:
        """The process behind each socket, so that its end is reported at once.

        vmplug searches for it only when the socket has come back, as that reads all processes.
        """
        there = set[str]()
        for record in records:
            path, look = socket_of(record), self._seen.get(record.id)
            if path and look and look.state is not HostState.GONE:
                there.add(path)
        sockets = UnixSockets(self._host)
        for path in there - self._servers.keys():
            server = sockets.find_server(path)
            self._servers[path] = server.pid if server else None
        self._servers = {path: self._servers[path] for path in there}

    def _forget_servers(self, ended: Collection[int]) -> None:
        self._servers = {path: pid for path, pid in self._servers.items() if pid not in ended}


def _key(record: DeviceRecord) -> tuple[str, str]:
    """Whether it is the same device in the same state: each plug has a new id."""
    return record.id, record.state
