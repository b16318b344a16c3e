"""Start a QEMU that has room to plug into, with devices in it from the start."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from vmplug.address import Bdf
from vmplug.drivers.place import lacks_addresses
from vmplug.errors import BindError, SpecError, StateError
from vmplug.host.finding import Code
from vmplug.host.pci.address_bits import read_address_bits
from vmplug.host.process import read_start_time
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.start.accel import ACCELS, AUTO, Accel, choose_accel
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.launch import launch
from vmplug.hypervisor.qemu.start.machine import (
    BINARY,
    MAX_MEMORY_SLOTS,
    MAX_PORTS,
    TCG_ADDRESS_BITS,
    Machine,
    VmSpec,
    has_option,
    most_memory_mib,
)
from vmplug.journal.journal import Journal
from vmplug.journal.names import check_vm_name
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord
from vmplug.leases.life import end_ended
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.vms.release import abandon_start, forget_ended

if TYPE_CHECKING:
    from vmplug.oci.requests import Request

__all__ = ("ACCELS", "MAX_MEMORY_SLOTS", "MAX_PORTS", "Machine", "StartedVm", "VmSpec", "start_vm")

_ANSWER_TIMEOUT_S = 20.0


class StartedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that vmplug has started.

    `directory` holds its QMP socket, its console's output and its log. `accel` is kvm or tcg;
    where vmplug chose tcg, `why_not_kvm` is the reason. `attachments` are the devices that it
    started with.
    """

    name: str
    qmp_socket: str
    pid: int
    directory: str
    accel: str
    why_not_kvm: str | None
    attachments: tuple[Attachment, ...]


def start_vm(
    spec: VmSpec,
    requests: "Sequence[Request]" = (),
    *,
    owner: str | None = None,
    allow: Iterable[Code] = (),
    managed: bool = False,
    setup: Setup = DEFAULT_SETUP,
) -> StartedVm:
    """Start a VM with the requested devices in it: all of them, or no VM.

    `owner`, `allow` and `managed` are those of `DeviceManager.attach_all`. The VM outlives this
    process.

    Raises SpecError, PolicyError, HostError, HypervisorError, and StateError when a VM of that
    name runs or has left files. After a failure nothing is left of the VM.
    """
    check_vm_name(spec.name)
    if requests:
        setup.host.require_live("attach devices")
    directory = Path(setup.state_dir).resolve() / "vm" / spec.name
    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(setup.state_dir))
        end_ended(journal, setup.host)
        accel = _accel(spec, setup)
        spec = _complete(replace(spec, accel=accel.name), setup.host)
        cold = stack.enter_context(ColdQemu(spec, directory))
        _claim_name(cold, journal)
        try:
            _make_directory(directory)
            attachments = list[Attachment]()
            if requests:
                from vmplug.vms.connect import open_manager  # noqa: PLC0415  10 ms, with drivers

                with open_manager(spec.name, cold, setup) as devices:
                    attachments = devices.attach_all(
                        requests, owner=owner, allow=allow, managed=managed
                    )

            def record_process(pid: int) -> None:
                journal.set_process(spec.name, pid, read_start_time(pid, journal.host))

            pid = launch(cold, record_process, timeout_s=_ANSWER_TIMEOUT_S)
            cold.started()
            _require_same(journal.devices(spec.name), setup.host)
            journal.finish_start(spec.name)
        except BaseException:
            abandon_start(journal, journal.require_vm(spec.name))
            from vmplug.manager.binding.binder import give_back_unused  # noqa: PLC0415  3 ms

            with suppress(BindError):  # why it failed matters more, and reconcile tries again
                give_back_unused(journal)
            raise
    return StartedVm(
        name=spec.name,
        qmp_socket=str(cold.qmp_socket),
        pid=pid,
        directory=str(directory),
        accel=accel.name,
        why_not_kvm=accel.why_not_kvm,
        attachments=tuple(attachments),
    )


def _require_same(records: Sequence[DeviceRecord], host: HostRoot) -> None:
    if records:
        from vmplug.manager.examine import require_same  # noqa: PLC0415  10 ms, with all checks

        require_same(records, host)


def _accel(spec: VmSpec, setup: Setup) -> Accel:
    """The one that is named; else KVM, if it runs a guest."""
    if spec.accel != AUTO:
        return Accel(name=spec.accel)
    return choose_accel(BINARY[spec.machine], Path(setup.state_dir), setup.host)


def _complete(spec: VmSpec, host: HostRoot) -> VmSpec:
    """The machine with absolute paths and the windows that it needs, if QEMU can have it."""
    if spec.ports + spec.bridges > MAX_PORTS:
        raise SpecError(
            f"VM {spec.name}",
            f"{spec.ports} ports and {spec.bridges} bridges are more than {MAX_PORTS} together",
        )
    if has_option(spec.extra, "daemonize"):
        raise SpecError(
            "-daemonize",
            "another process than the one that vmplug starts would run the VM",
            hint="leave it out: the VM outlives vmplug all the same",
        )
    files = {name: getattr(spec, name) for name in ("kernel", "initrd", "disk")}
    absolute = {name: os.path.realpath(path) for name, path in files.items() if path}
    windows = tuple(sorted((_window_of(bdf, host) for bdf in spec.room_for), reverse=True))
    spec = replace(spec, **absolute, windows=windows or spec.windows)
    _check_addresses(spec, host)
    return spec


def _check_addresses(spec: VmSpec, host: HostRoot) -> None:
    """SpecError when the guest has too few addresses for the windows: firmware drops some."""
    bits = read_address_bits(host) if spec.accel == "kvm" else TCG_ADDRESS_BITS
    memory_bytes = most_memory_mib(spec) << 20
    room = None if bits is None else lacks_addresses(spec.windows, bits, memory_bytes)
    if room is not None:
        raise SpecError(
            f"VM {spec.name}",
            f"the ports need {sum(spec.windows) >> 30} GiB of addresses for their windows, and "
            f"the guest has {room >> 30} GiB ({bits} bits)",
            hint="make room for fewer functions, or plug some before the VM starts (--bundle)"
            + ("" if spec.accel == "kvm" else "; with KVM the guest has the host's bits"),
        )


def _window_of(bdf: Bdf, host: HostRoot) -> int:
    """Bytes that one port needs for the BARs of a function and its neighbours in the slot."""
    from vmplug.drivers.vfio import window_for  # noqa: PLC0415  2 ms, with all of VFIO
    from vmplug.host.pci.vfio import find_vfio_device  # noqa: PLC0415

    functions = find_vfio_device(str(bdf), host).functions
    return window_for([function for function in functions if function.bdf.device == bdf.device])


def _claim_name(cold: ColdQemu, journal: Journal) -> None:
    """Write the VM into the journal. Raises StateError when the name is taken."""
    name, socket, directory = cold.spec.name, str(cold.qmp_socket), cold.directory
    forget_ended(journal, name)
    if journal.find_vm(name) is None and directory.exists():
        raise StateError(
            f"{directory} is there already, and the journal knows no VM in it",
            state="there",
            required="absent",
            hint=f"if its QEMU runs, vmplug vm adopt {name} --qmp {socket}; "
            "else remove the directory",
        )
    record = VmRecord(
        name=name,
        qmp_socket=socket,
        pid=None,
        started_at=None,
        is_ours=True,
        starting_by=journal.worker,
    )
    journal.add_vm(record)


def _make_directory(directory: Path) -> None:
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    directory.mkdir(mode=0o700)
