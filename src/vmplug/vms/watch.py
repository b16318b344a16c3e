"""What happens to the host devices that VMs have, and to the VMs?"""

from contextlib import ExitStack

from vmplug.host.events import HostEvents
from vmplug.journal.journal import Journal
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.manager.watching.watch import Watch
from vmplug.vms.listing import find_failed_disks


def watch(
    *,
    vm: str | None = None,
    timeout_s: float | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> Watch:
    """Report existing problems and then new events, until it is closed or `timeout_s` is over.

    `vm` selects one VM, None all; `timeout_s` None never ends. Raises StoreError, StateError for a
    VM that is not known, and HostError when the kernel's events cannot be received.
    """
    with ExitStack() as opened:
        journal = opened.enter_context(Journal.open_existing(setup.state_dir))
        if vm is not None:
            journal.require_vm(vm)
        events = opened.enter_context(HostEvents())
        opened.pop_all()
    return Watch(
        journal,
        events,
        host=setup.host,
        find_failed_disks=find_failed_disks,
        vm=vm,
        timeout_s=timeout_s,
    )
