"""The library for an event loop: the same names, values and errors, as coroutines.

    from vmplug import aio

    async with await aio.connect_vm("sb1") as devices:
        await devices.attach(disk, owner="ctr1")
    async for event in aio.watch(vm="sb1"):
        print(event.message)

In: arguments of the synchronous library. Out: its results. Each call runs in a thread; the thread
of the loop waits for nothing. What blocks neither files nor VMs, such as `parse_config`, stays in
`vmplug` alone.
"""

from vmplug.aio.calls import adopt_vm as adopt_vm
from vmplug.aio.calls import bind_device as bind_device
from vmplug.aio.calls import check_requests as check_requests
from vmplug.aio.calls import configure_virtual_function as configure_virtual_function
from vmplug.aio.calls import create_mediated_device as create_mediated_device
from vmplug.aio.calls import detach_attachments as detach_attachments
from vmplug.aio.calls import detach_owner as detach_owner
from vmplug.aio.calls import end_lease as end_lease
from vmplug.aio.calls import find_cdi_devices as find_cdi_devices
from vmplug.aio.calls import find_policy as find_policy
from vmplug.aio.calls import find_requests as find_requests
from vmplug.aio.calls import get_host_path as get_host_path
from vmplug.aio.calls import import_kata as import_kata
from vmplug.aio.calls import in_thread as in_thread
from vmplug.aio.calls import list_attachments as list_attachments
from vmplug.aio.calls import list_ended_logs as list_ended_logs
from vmplug.aio.calls import list_host as list_host
from vmplug.aio.calls import list_leases as list_leases
from vmplug.aio.calls import list_vms as list_vms
from vmplug.aio.calls import read_bundle as read_bundle
from vmplug.aio.calls import read_functions as read_functions
from vmplug.aio.calls import read_policy as read_policy
from vmplug.aio.calls import read_virtual_functions as read_virtual_functions
from vmplug.aio.calls import reconcile_host as reconcile_host
from vmplug.aio.calls import remove_mediated_device as remove_mediated_device
from vmplug.aio.calls import resize_attachment as resize_attachment
from vmplug.aio.calls import resolve as resolve
from vmplug.aio.calls import resolve_all as resolve_all
from vmplug.aio.calls import resume_vm as resume_vm
from vmplug.aio.calls import set_virtual_function_count as set_virtual_function_count
from vmplug.aio.calls import show_thing as show_thing
from vmplug.aio.calls import start_vm as start_vm
from vmplug.aio.calls import stop_vm as stop_vm
from vmplug.aio.calls import unbind_device as unbind_device
from vmplug.aio.calls import write_cdi_specs as write_cdi_specs
from vmplug.aio.lease import AsyncLease as AsyncLease
from vmplug.aio.lease import lease as lease
from vmplug.aio.manager import AsyncDeviceManager as AsyncDeviceManager
from vmplug.aio.manager import connect_vm as connect_vm
from vmplug.aio.watch import AsyncWatch as AsyncWatch
from vmplug.aio.watch import watch as watch
