"""The persistent state: VMs, their devices, the holds on them, and bound functions.

In: decisions, before they are carried out. Out: records that survive any crash. It does not depend
on the parts that decide.
"""

import os

from vmplug.errors import StoreError
from vmplug.host.permissions import is_absent

DEFAULT_STATE_DIR = "/run/vmplug"
STATE_DIR_VARIABLE = "VMPLUG_STATE_DIR"
StateDir = str | os.PathLike[str]
"""The directory that the journal is in."""


def journal_path(state_dir: StateDir) -> str:
    """Return the path of the journal in a state directory."""
    return os.path.join(state_dir, "journal.db")


def has_journal(state_dir: StateDir) -> bool:
    """Whether vmplug ever wrote there. A file that cannot be read may be one.

    Raises StoreError for a missing directory, unless it is the default one or the environment's:
    nothing is attached where vmplug never ran, but a mistyped name is an error.
    """
    if not is_absent(journal_path(state_dir)):
        return True
    directory = os.path.normpath(state_dir)
    default = os.environ.get(STATE_DIR_VARIABLE) or DEFAULT_STATE_DIR
    usual = {os.path.normpath(default), DEFAULT_STATE_DIR}
    if directory not in usual and not os.path.isdir(directory):
        raise StoreError(
            directory,
            f"there is no state directory {directory}",
            hint=f"pass the --state-dir of vm start or vm adopt; without one it is {default}",
        )
    return False
