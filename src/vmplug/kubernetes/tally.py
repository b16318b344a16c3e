"""Tally: what a plugin does, for a counter of it."""


class Tally:
    """Counts nothing; see `vmplug.kubernetes.metrics` for one that does. Thread-safe."""

    def allocated(self, resource: str, count: int) -> None:
        """Allocate gave so many devices."""

    def refused(self, resource: str, code: str) -> None:
        """A call of kubelet was refused: the code of the finding, or else of the error."""

    def reconciled(self, result: str) -> None:
        """The pods of kubelet were compared: `done`, `no-answer` or `failed`."""

    def bound(self, resource: str, took_s: float) -> None:
        """A device was bound to VFIO."""
