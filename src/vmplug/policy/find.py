"""Which policy holds on this host?"""

import os
from typing import TYPE_CHECKING

from vmplug.host.permissions import is_absent
from vmplug.policy import DEFAULT_POLICY

if TYPE_CHECKING:
    from vmplug.policy.rules import Policy


def find_policy(path: str | os.PathLike[str] | None = None) -> "Policy | None":
    """Return the policy in that file, or else the host's own; None when the host has none.

    Raises PolicyError, also for a file that cannot be read.
    """
    if path is None and is_absent(DEFAULT_POLICY):
        return None
    from vmplug.policy.file import read_policy  # noqa: PLC0415  tomllib: 2.5 ms

    return read_policy(DEFAULT_POLICY if path is None else path)
