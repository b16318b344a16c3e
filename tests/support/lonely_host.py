"""The running host as if no other process were on it, or only those that the test starts.

What has a file open is looked for in every process, which takes ten milliseconds for two hundred
of them. The files of most tests are open nowhere else.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vmplug.host.root import HostRoot


class LonelyHost(HostRoot):
    """As the live root, but its list of processes has only this one."""

    def list_dir(self, path: str) -> list[str]:
        """See HostRoot."""
        return [str(os.getpid())] if path == "/proc" else super().list_dir(path)


class FamilyHost(HostRoot):
    """As the live root, but its list of processes has only this one and its children."""

    def list_dir(self, path: str) -> list[str]:
        """See HostRoot."""
        if path != "/proc":
            return super().list_dir(path)
        return sorted([str(os.getpid()), *_children()])


def _children() -> Iterator[str]:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            yield from (thread / "children").read_text().split()
