"""The running host as if no other process were on it.

What has a file open is looked for in every process, which takes ten milliseconds for two hundred
of them. The files of most tests are open nowhere else.
"""

import os

from vmplug.host.root import HostRoot


class LonelyHost(HostRoot):
    """As the live root, but its list of processes has only this one."""

    def list_dir(self, path: str) -> list[str]:
        """See HostRoot."""
        return [str(os.getpid())] if path == "/proc" else super().list_dir(path)
