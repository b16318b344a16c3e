"""Keep the files of CDI true, as devices come and go."""

import os
from collections.abc import Callable, Generator

from vmplug.errors import DeviceError
from vmplug.host.events import HostEvents
from vmplug.manager.naming.specs import WrittenSpecs, own_files, update_specs
from vmplug.manager.setup import Setup

LOOK_INTERVAL_S = 2.0
"""For what the kernel has no event of: a name that udev gives, a socket, the policy, a directory
that has gone."""


def keep_cdi_specs(
    directory: str | os.PathLike[str], read_setup: Callable[[], Setup]
) -> Generator[WrittenSpecs | DeviceError]:
    """Write the specs now, and again whenever something has changed, until it is closed.

    It gives what it did first, and then each change; later errors are given once, and tried again.
    The files stay when it ends. Raises what `write_cdi_specs` raises, except that it waits for the
    first device; and HostError when the kernel's events cannot be received.
    """
    with HostEvents() as events, own_files(directory) as own:
        last: WrittenSpecs | DeviceError = update_specs(own, setup=read_setup())
        yield last
        while True:
            events.wait(LOOK_INTERVAL_S)
            try:
                now: WrittenSpecs | DeviceError = update_specs(own, setup=read_setup())
            except DeviceError as error:
                now = error
            if _is_news(last, now):
                yield now
            last = now


def _is_news(last: WrittenSpecs | DeviceError, now: WrittenSpecs | DeviceError) -> bool:
    match last, now:
        case (WrittenSpecs(), WrittenSpecs()):
            return bool(now.written or now.removed or now.left_out != last.left_out)
        case (DeviceError(), DeviceError()):
            return now.message != last.message
        case _:
            return True
