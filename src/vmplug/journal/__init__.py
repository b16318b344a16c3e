"""The persistent state: VMs, their devices, the holds on them, and bound functions.

In: decisions, before they are carried out. Out: records that survive any crash. It does not depend
on the parts that decide.
"""

import os

DEFAULT_STATE_DIR = "/run/vmplug"
StateDir = str | os.PathLike[str]
"""The directory that the journal is in."""


def journal_path(state_dir: StateDir) -> str:
    """Return the path of the journal in a state directory."""
    return os.path.join(state_dir, "journal.db")


def has_journal(state_dir: StateDir) -> bool:
    """Whether vmplug ever wrote there."""
    return os.path.exists(journal_path(state_dir))
