"""A QMP socket on which somebody else answers: bytes, in place of QEMU's messages."""

from contextlib import suppress

from tests.support.says import AGREED, GREETING, QUIET_S, Says
from vmplug.drivers.ports import Command
from vmplug.errors import HypervisorError
from vmplug.hypervisor.qmp.client import QmpMonitor


def check(data: bytes) -> None:
    """Whatever comes, a command ends in an answer or in a HypervisorError, and so does the next.

    The first byte says how much of the beginning is QEMU's.
    """
    before = ((), (GREETING,), (GREETING, AGREED))[data[0] % 3] if data else ()
    with Says(*before, data[1:]) as path, suppress(HypervisorError):
        monitor = QmpMonitor.connect(path, timeout_s=QUIET_S)
        heard: list[str] = []
        monitor.listen(lambda event, members: heard.append(f"{event} {members.get('device')}"))
        try:
            for _ in range(2):
                with suppress(HypervisorError):
                    monitor.execute(Command("query-status", {}))
        finally:
            monitor.close()
