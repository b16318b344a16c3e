"""What a QEMU can do, for tests that have none."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """See Abilities."""

    reconnect_ms: bool
    iommufd: bool
    vf_token: bool


OLD = Told(reconnect_ms=False, iommufd=False, vf_token=False)
"""As QEMU 7.2."""

NEW = Told(reconnect_ms=True, iommufd=True, vf_token=True)
"""As QEMU 10 and 11."""
