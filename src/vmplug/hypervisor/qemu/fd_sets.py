"""The sets of descriptors that QEMU was given for devices, and may have kept.

Separate from `vmplug.hypervisor.qemu.handover`, which fills them: a look at a VM needs no more.
"""

from vmplug.address import device_id_of
from vmplug.drivers.ports import Choose, Command
from vmplug.hypervisor.qmp.monitor import Monitor


def close_sets(monitor: Monitor, choose: Choose) -> None:
    """Close the files in sets of those devices that `choose` takes from all that have some.

    The devices have descriptors of their own. QEMU 7.2 closes nothing while it is paused.
    """
    sets = {
        found["fdset-id"]: device_id
        for found in monitor.execute(Command("query-fdsets", {}))
        for fd in found["fds"]
        if (device_id := device_id_of(fd.get("opaque", "")))
    }
    chosen = choose(set(sets.values())) if sets else ()
    for number, device_id in sets.items():
        if device_id in chosen:  # another process may close it at the same time
            monitor.attempt([Command("remove-fd", {"fdset-id": number})])
