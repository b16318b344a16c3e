"""Which host, and what holds on it: passed to every function that serves several VMs."""

from typing import TYPE_CHECKING

import msgspec

from vmplug.arguments import check_fields
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.journal import DEFAULT_STATE_DIR, StateDir

if TYPE_CHECKING:
    from vmplug.host.vhost_user.store import VhostUserStore
    from vmplug.policy.rules import Policy


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """A host as vmplug serves it.

    `state_dir` is where the journal is. `vhost_user_store` is the host's, None when it has none.
    Without a `policy` everything may be handed over that `check` finds nothing against; see
    `find_policy`.
    """

    host: HostRoot = THIS_HOST
    state_dir: StateDir = DEFAULT_STATE_DIR
    vhost_user_store: "VhostUserStore | None" = None
    policy: "Policy | None" = None

    def __post_init__(self) -> None:
        check_fields(self)


DEFAULT_SETUP = Setup()
