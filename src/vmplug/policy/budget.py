"""How long may one request keep vmplug busy?"""

import time
from typing import TYPE_CHECKING

from vmplug.errors import PolicyError
from vmplug.oci.limits import REQUEST_S
from vmplug.policy import DEFAULT_POLICY

if TYPE_CHECKING:
    from vmplug.policy.rules import Policy


class Budget:
    """The time of one request, from now on: what `policy` says, else the default.

    It is checked between steps, so that a request ends a step later at most.
    """

    def __init__(self, policy: "Policy | None") -> None:
        self._seconds = policy.request_s if policy else REQUEST_S
        self._where = policy.name if policy else DEFAULT_POLICY
        self._ends_at = time.monotonic() + self._seconds

    def check(self) -> None:
        """PolicyError when it is spent."""
        if time.monotonic() < self._ends_at:
            return
        raise PolicyError(
            f"the request takes longer than the {self._seconds:g} s that one may take",
            hint="request fewer devices at once; the operator sets the limit in "
            f"{self._where}: request-seconds, in the table limits",
        )
