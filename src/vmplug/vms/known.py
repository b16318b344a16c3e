"""The VMs that the journal knows: which of them still run, and how one is forgotten."""

import os
import re
import shutil
from collections.abc import Iterable

from vmplug.errors import SpecError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.listening import is_listening
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord, has_ended

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def check_name(name: str) -> None:
    """Raise SpecError for a name that cannot be a VM's."""
    if not _NAME.match(name):
        raise SpecError(
            f"VM name {name!r}", "it is made of letters, digits, '.', '_' and '-', 63 at most"
        )


def is_gone(record: VmRecord, host: HostRoot) -> bool:
    """Whether the VM has surely ended: its process has, or the host has booted since.

    A socket that refuses proves nothing while the process runs: it may be that of a proxy. Only
    where the process was never known does the socket decide; a missing file proves nothing.
    """
    if record.is_of_earlier_boot:
        return True
    if record.pid is None:
        return is_listening(record.qmp_socket) is False
    return has_ended(record, host)


def find_ended(journal: Journal, names: Iterable[str]) -> list[str]:
    """Return those of the named VMs that seem to have ended. No VM is asked."""
    wanted = set(names)
    return [vm.name for vm in journal.vms() if vm.name in wanted and is_gone(vm, journal.host)]


def forget_vm(journal: Journal, record: VmRecord) -> None:
    """Forget a VM that has ended, or that vmplug no longer serves, and remove vmplug's files."""
    journal.forget_vm(record.name)
    if record.is_ours:
        shutil.rmtree(os.path.dirname(record.qmp_socket), ignore_errors=True)


def forget_ended(journal: Journal, name: str) -> None:
    """Forget the VM of that name if it has ended and nothing is left attached to it.

    VMs of an earlier boot are forgotten too: the boot released whatever they held.
    """
    for record in journal.vms():
        has_left = (
            record.name == name and is_gone(record, journal.host) and not journal.devices(name)
        )
        if record.is_of_earlier_boot or has_left:
            forget_vm(journal, record)
