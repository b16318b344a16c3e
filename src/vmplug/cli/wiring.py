"""What the verbs are wired to: the journal, the VMs in it, and a connected manager."""

import os
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmplug.errors import ConnectError, StateError
from vmplug.host.root import HostRoot

if TYPE_CHECKING:
    from vmplug.address import Bdf
    from vmplug.host.vhost_user.store import VhostUserStore
    from vmplug.hypervisor.qemu.start.cold import ColdQemu
    from vmplug.journal.journal import Journal
    from vmplug.journal.records import Attachment, VmRecord
    from vmplug.manager.manager import DeviceManager
    from vmplug.policy.rules import Policy


def has_journal(state_dir: str) -> bool:
    """Whether vmplug ever wrote there."""
    return os.path.exists(os.path.join(state_dir, "journal.db"))


def open_journal(state_dir: str) -> "Journal":
    """The journal below `state_dir`, a context manager."""
    from vmplug.journal.journal import Journal  # noqa: PLC0415  sqlite3 costs 5 ms

    return Journal.open(state_dir)


def find_vm(journal: "Journal", name: str) -> "VmRecord":
    """The VM of that name; StateError when it is not known."""
    record = journal.find_vm(name)
    if record is None:
        raise StateError(
            f"no VM {name!r} is known",
            state="unknown",
            required="started or adopted",
            hint=f"vmplug vm list shows the known ones; vmplug vm adopt {name} --qmp SOCKET",
        )
    return record


def read_attachments(journal: "Journal", vm: str | None) -> "list[Attachment]":
    """What is attached, to all VMs or to one; StateError when that one is not known."""
    held = journal.attachments(vm)
    if vm and not held:
        find_vm(journal, vm)
    return held


def forget_vm(journal: "Journal", record: "VmRecord") -> None:
    """Forget a VM that has ended or is no longer ours to serve, and remove its files."""
    journal.forget_vm(record.name)
    if record.is_ours:
        shutil.rmtree(os.path.dirname(record.qmp_socket), ignore_errors=True)


def give_back_unused(journal: "Journal") -> None:
    """Give functions that were bound for devices which are no more to their former drivers.

    Raises BindError for one that cannot be; reconcile tries again.
    """
    from vmplug.manager.binding.binder import Binder  # noqa: PLC0415  most verbs bind nothing

    failures = [told.error for told in Binder(journal, HostRoot()).recover() if told.error]
    if failures:
        raise failures[0]


def is_gone(record: "VmRecord") -> bool:
    """Whether the VM has surely ended: nobody listens on its QMP socket, or the host has booted.

    A socket file that is missing proves nothing as long as the process that made it runs.
    """
    if record.is_of_earlier_boot:
        return True
    from vmplug.hypervisor.qemu.start.launch import is_listening  # noqa: PLC0415
    from vmplug.journal.records import has_ended  # noqa: PLC0415

    listening = is_listening(record.qmp_socket)
    if listening is not None:
        return not listening
    return has_ended(record, HostRoot())


def find_policy(path: str | None) -> "Policy | None":
    """The policy that was named, or else the host's own; None when the host has none.

    Raises PolicyError.
    """
    from vmplug.host.permissions import is_absent  # noqa: PLC0415
    from vmplug.policy import DEFAULT_POLICY  # noqa: PLC0415
    from vmplug.policy.file import read_policy  # noqa: PLC0415  msgspec and TOML, only who has one pays

    if path is None and is_absent(DEFAULT_POLICY):
        return None
    return read_policy(DEFAULT_POLICY if path is None else path)


def find_ended(journal: "Journal", names: "Iterable[str]") -> list[str]:
    """Which of these VMs are not what the journal knows any more, as far as can be seen from here.

    No VM is asked: a process that has ended is enough.
    """
    from vmplug.journal.records import has_ended  # noqa: PLC0415

    wanted = set(names)
    return [
        vm.name
        for vm in journal.vms()
        if vm.name in wanted and (is_gone(vm) or has_ended(vm, journal.host))
    ]


def open_manager(
    vm: str,
    state_dir: str,
    *,
    host: HostRoot,
    vhost_user_store: "VhostUserStore | None" = None,
    policy: "Policy | None" = None,
) -> "DeviceManager":
    """The manager of a known VM, connected. StateError when the VM is not known."""
    from vmplug.hypervisor.qemu.running import Qemu  # noqa: PLC0415
    from vmplug.manager.manager import DeviceManager  # noqa: PLC0415

    with open_journal(state_dir) as journal:
        record = find_vm(journal, vm)
    try:
        hypervisor = Qemu.connect(record.qmp_socket)
    except ConnectError as error:
        if is_gone(record):
            message = f"VM {vm} is not running any more: {error.message}"
            hint = "vmplug reconcile frees what it held"
            raise ConnectError(error.socket, message, hint=hint) from error
        raise
    return DeviceManager.open(
        vm=vm,
        host=host,
        hypervisor=hypervisor,
        state_dir=state_dir,
        vhost_user_store=vhost_user_store,
        policy=policy,
    )


def open_cold_manager(
    cold: "ColdQemu",
    state_dir: str,
    *,
    host: HostRoot,
    vhost_user_store: "VhostUserStore | None",
    policy: "Policy | None",
) -> "DeviceManager":
    """The manager of a VM that is in the journal and about to be started."""
    from vmplug.manager.manager import DeviceManager  # noqa: PLC0415

    name = cold.spec.name
    return DeviceManager.open(
        vm=name,
        host=host,
        hypervisor=cold,
        state_dir=state_dir,
        vhost_user_store=vhost_user_store,
        policy=policy,
    )


def windows_for(addresses: "Iterable[Bdf]", host: HostRoot) -> tuple[int, ...]:
    """Bytes that one port each needs for the BARs of a function and its neighbours in the slot.

    The largest first. Raises NoSuchDevice.
    """
    from vmplug.drivers.vfio import window_for  # noqa: PLC0415  most VMs need none
    from vmplug.host.pci.vfio import find_vfio_device  # noqa: PLC0415

    windows = []
    for bdf in addresses:
        group = find_vfio_device(str(bdf), host)
        windows.append(window_for([f for f in group.functions if f.bdf[:3] == bdf[:3]]))
    return tuple(sorted(windows, reverse=True))
