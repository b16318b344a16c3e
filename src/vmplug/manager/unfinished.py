"""What did an interrupted call leave half done, and what finishes it?"""

import os
from collections.abc import Iterator

import msgspec

from vmplug.journal.bindings import BindingState
from vmplug.journal.journal import Journal
from vmplug.journal.process import ProcessIdentity
from vmplug.journal.state import State
from vmplug.manager.setup import DEFAULT_SETUP, Setup


class Unfinished(msgspec.Struct, frozen=True, kw_only=True):
    """One thing as it is left, and what finishes it."""

    what: str
    hint: str


def list_unfinished(*, setup: Setup = DEFAULT_SETUP) -> list[Unfinished]:
    """Return what no process has in progress any more, and is neither done nor undone.

    Reads only the journal. Raises StoreError as every reading of one does.
    """
    with Journal.open_existing(setup.state_dir) as journal:
        return [*_devices(journal), *_starts(journal), *_bindings(journal)]


def _devices(journal: Journal) -> Iterator[Unfinished]:
    for vm in journal.vms():
        for device in journal.devices(vm.name):
            if _is_elsewhere(device.in_progress_by, journal):
                continue
            if device.state is State.PLUGGING:
                what = f"{device.host_path} may be plugged into VM {vm.name} in part"
                yield Unfinished(what=what, hint="vmplug reconcile takes it out again")
            if device.state is State.DETACHING:
                what = (
                    f"{device.host_path} is still in VM {vm.name}, which was asked to release it"
                )
                hint = "the same command again, or vmplug reconcile, finishes it"
                yield Unfinished(what=what, hint=hint)


def _starts(journal: Journal) -> Iterator[Unfinished]:
    for vm in journal.vms():
        if vm.starting_by and not _is_elsewhere(vm.starting_by, journal):
            what = f"the start of VM {vm.name} is not complete"
            yield Unfinished(what=what, hint="vmplug reconcile removes what it left")


def _bindings(journal: Journal) -> Iterator[Unfinished]:
    for row in journal.bindings.all():
        if row.state is not BindingState.BOUND:
            what = f"function {row.bdf} is on its way from one driver to another"
            yield Unfinished(what=what, hint="vmplug reconcile gives it back to its former driver")


def _is_elsewhere(worker: ProcessIdentity | None, journal: Journal) -> bool:
    """Whether another process that runs has it in progress."""
    return worker is not None and worker.pid != os.getpid() and worker.is_alive(journal.host)
