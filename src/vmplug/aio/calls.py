"""The functions of the library as coroutines: each row is one of them, and what it may change."""

import inspect
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from vmplug.aio.threads import Concerns, Scope, Threads
from vmplug.arguments import checked
from vmplug.host import host_path
from vmplug.host import resolve as resolving
from vmplug.host.block import volumes
from vmplug.host.cdi import find as cdi_devices
from vmplug.host.pci import function as functions
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.leases import life as leases
from vmplug.manager import host_listing
from vmplug.manager.binding import groups, mediated, virtual_functions
from vmplug.manager.naming import specs as cdi_specs
from vmplug.oci import spec as specs
from vmplug.policy import file as policies
from vmplug.policy import find as policy_search
from vmplug.vms import (
    adopt,
    attachments,
    check,
    io_errors,
    listing,
    reconcile,
    release,
    start,
    status,
    stop,
)
from vmplug.vms import (
    import_kata as kata,
)

P = ParamSpec("P")
R = TypeVar("R")


def _in_thread(
    function: Callable[P, R], changes: Scope = Scope.NOTHING, *, vm: str | None = None
) -> Callable[P, Coroutine[Any, Any, R]]:
    """The function as a coroutine.

    `vm` is its parameter that names the VM that it changes; without a value it may be any.
    """
    signature = inspect.signature(function)
    work: Callable[P, R] = checked(function)

    @wraps(function)
    async def call(*args: P.args, **named: P.kwargs) -> R:
        concerns = _named_vm(signature, vm, args, named) if vm else changes
        return await Threads.of_loop().call(lambda: work(*args, **named), concerns=concerns)

    return call


def _named_vm(
    signature: inspect.Signature,
    parameter: str,
    args: tuple[object, ...],
    named: Mapping[str, object],
) -> Concerns:
    try:
        value = signature.bind_partial(*args, **named).arguments.get(parameter)
    except TypeError:  # the call itself will say so
        return Scope.NOTHING
    name = value.name if isinstance(value, VmSpec) else value
    return name if isinstance(name, str) else Scope.ALL_VMS


start_vm = _in_thread(start.start_vm, vm="spec")
adopt_vm = _in_thread(adopt.adopt_vm, vm="name")
stop_vm = _in_thread(stop.stop_vm, vm="name")
resume_vm = _in_thread(io_errors.resume_vm, vm="name")
list_vms = _in_thread(status.list_vms)
list_ended_logs = _in_thread(release.list_ended_logs)

check_requests = _in_thread(check.check_requests)
list_attachments = _in_thread(listing.list_attachments)
detach_attachments = _in_thread(attachments.detach_attachments, Scope.ALL_VMS)
detach_owner = _in_thread(attachments.detach_owner, vm="vm")
resize_attachment = _in_thread(attachments.resize_attachment, Scope.ALL_VMS)
reconcile_host = _in_thread(reconcile.reconcile_host, vm="vm")
import_kata = _in_thread(kata.import_kata, vm="vm")

list_leases = _in_thread(leases.list_leases)
end_lease = _in_thread(leases.end_lease, vm="lease_id")

list_host = _in_thread(host_listing.list_host)
show_thing = _in_thread(host_listing.show_thing)
bind_device = _in_thread(groups.bind_device, Scope.DRIVERS)
unbind_device = _in_thread(groups.unbind_device, Scope.DRIVERS)
read_virtual_functions = _in_thread(virtual_functions.read_virtual_functions)
set_virtual_function_count = _in_thread(
    virtual_functions.set_virtual_function_count, Scope.DRIVERS
)
configure_virtual_function = _in_thread(
    virtual_functions.configure_virtual_function, Scope.DRIVERS
)
create_mediated_device = _in_thread(mediated.create_mediated_device, Scope.DRIVERS)
remove_mediated_device = _in_thread(mediated.remove_mediated_device, Scope.DRIVERS)

write_cdi_specs = _in_thread(cdi_specs.write_cdi_specs)

read_bundle = _in_thread(specs.read_bundle)
find_requests = _in_thread(volumes.find_requests)
find_cdi_devices = _in_thread(cdi_devices.find_cdi_devices)
read_policy = _in_thread(policies.read_policy)
find_policy = _in_thread(policy_search.find_policy)
read_functions = _in_thread(functions.read_functions)
resolve = _in_thread(resolving.resolve)
resolve_all = _in_thread(resolving.resolve_all)
get_host_path = _in_thread(host_path.get_host_path)


async def in_thread(function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
    """Call any other function of the library, such as Qemu.connect, in one of vmplug's threads."""
    return await Threads.of_loop().call(lambda: function(*args, **named))
