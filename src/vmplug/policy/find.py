"""Which policy holds on this host?"""

import os
from typing import TYPE_CHECKING

from vmplug.host.permissions import is_absent
from vmplug.host.root import THIS_HOST
from vmplug.host.use.silent import require_answer
from vmplug.policy import DEFAULT_POLICY

if TYPE_CHECKING:
    from vmplug.policy.rules import Policy


def find_policy(path: str | os.PathLike[str] | None = None) -> "Policy | None":
    """Return the policy in that file, or else the host's own; None when the host has none.

    Raises PolicyError, also for a file that cannot be read, and AttributeReadError for one whose
    storage does not answer.
    """
    named = DEFAULT_POLICY if path is None else os.fspath(path)
    require_answer(named, THIS_HOST)
    if path is None and is_absent(named):
        return None
    from vmplug.policy.file import read_policy  # noqa: PLC0415  tomllib: 2.5 ms

    return read_policy(named)
