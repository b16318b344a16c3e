"""Wait until a guest releases devices: events wake the waiting thread, the object tree decides.

Events are missed while others have the QMP socket, and QEMU does not repeat them.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from vmplug.drivers.ports import UnplugFailure
from vmplug.hypervisor.qmp.monitor import MISSED
from vmplug.waiting import caller_has_left, next_pause_s

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 1.0
"""The time between two checks, in which others can use the QMP socket; it doubles each time. The
first check is immediate, as most guests take 0.1 seconds; a silent one must not keep the socket
busy."""
ASK_AGAIN_S = 2.0
"""A guest that boots loses a request. QEMU refuses a repeated one while the guest may be at work
on the first: 1 s with ACPI, 5 s with PCIe's own hot plug.
Source: QEMU hw/acpi/pcihp.c, hw/pci/pcie.c."""


class _Outcome(StrEnum):
    """The events that answer a request. Source: QEMU qapi/qdev.json."""

    DELETED = "DEVICE_DELETED"
    REFUSED = "DEVICE_UNPLUG_GUEST_ERROR"


_OUTCOMES = {str(outcome): outcome for outcome in _Outcome}


class UnplugWaiter:
    """The devices of one VM that were asked to leave, or are waited for. Thread-safe.

    `owner` returns the id of the device that owns a name in QEMU. Other events are dropped: other
    processes unplug devices too. A request without an answer is repeated every `ask_again_s`.
    """

    def __init__(self, owner: Callable[[str], str | None]) -> None:
        self._owner = owner
        self.ask_again_s = ASK_AGAIN_S
        self._changed = threading.Condition()
        self._asked: set[str] = set()
        self._waited_for: Counter[str] = Counter()
        self._outcomes: dict[str, _Outcome] = {}
        self._missed = 0

    def receive(self, event: str, data: Mapping[str, Any]) -> None:
        """Note the outcome for a device; virtio's inner half sends an event without a name."""
        name, outcome = data.get("device", ""), _OUTCOMES.get(event)
        with self._changed:
            if event == MISSED:
                self._missed += 1
            elif not isinstance(name, str):
                return
            elif outcome and (name in self._asked or self._owner(name) in self._waited_for):
                self._outcomes[name] = outcome
            else:
                return
            self._changed.notify_all()

    def expect(self, name: str) -> None:
        """Note that the guest is about to be asked: an earlier refusal no longer counts.

        That a device is gone still counts for a thread that waits for it; ids are never reused.
        """
        with self._changed:
            if self._outcomes.get(name) is _Outcome.REFUSED:
                del self._outcomes[name]
            self._asked.add(name)

    def forget(self, name: str) -> None:
        """Note that the guest could not be asked."""
        with self._changed:
            self._asked.discard(name)

    def wait(
        self,
        device_ids: Collection[str],
        look: Callable[[], set[str]],
        ask: Callable[[set[str]], None],
        timeout_s: float,
    ) -> dict[str, UnplugFailure]:
        """Wait until the devices are gone; `look` gives their names in the object tree.

        `ask` asks the guest for some again. Returns those that are still there: refused by the
        guest, or without an answer, also because the caller has left.
        """
        asked = time.monotonic()
        deadline = asked + timeout_s
        with self._waiting_for(device_ids):
            missed, pause_s = self._missed, 0.0
            pending = look() | self._names_asked(device_ids)
            while pending:
                self._hear(pending, min(deadline, asked + self.ask_again_s), missed)
                self._hear(pending, min(deadline, time.monotonic() + pause_s))
                missed, pause_s = self._missed, min(2 * pause_s or _FIRST_PAUSE_S, _LAST_PAUSE_S)
                is_late = time.monotonic() >= deadline or caller_has_left()
                pending = look()
                refused = self._refused(pending)
                if pending <= refused or is_late:
                    left = dict.fromkeys(pending, UnplugFailure.TIMEOUT)
                    return left | dict.fromkeys(refused, UnplugFailure.REFUSED)
                if time.monotonic() - asked >= self.ask_again_s:
                    ask(pending - refused)
                    asked = time.monotonic()
        return {}

    def pause(self, timeout_s: float) -> None:
        """Wait for an event, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def _names_asked(self, device_ids: Collection[str]) -> set[str]:
        with self._changed:
            return {name for name in self._asked if self._owner(name) in device_ids}

    def _hear(self, names: set[str], deadline: float, missed: int | None = None) -> None:
        """Wait for events of all of them, or until events were missed after `missed`."""
        with self._changed:
            while not (
                names <= self._outcomes.keys()
                or missed not in {None, self._missed}
                or caller_has_left()
                or (left_s := deadline - time.monotonic()) <= 0
            ):
                self._changed.wait(next_pause_s(left_s))

    def _refused(self, names: set[str]) -> set[str]:
        """Those that the guest refused to release; a noted deletion was an earlier one."""
        with self._changed:
            for name in [n for n in names if self._outcomes.get(n) is _Outcome.DELETED]:
                del self._outcomes[name]
            return names & self._outcomes.keys()

    @contextmanager
    def _waiting_for(self, device_ids: Collection[str]) -> Iterator[None]:
        """Keep outcomes until the last thread that waits for them has continued."""
        with self._changed:
            self._waited_for.update(device_ids)
        try:
            yield
        finally:
            with self._changed:
                self._waited_for.subtract(device_ids)
                self._waited_for = +self._waited_for
                for name in self._asked | self._outcomes.keys():
                    if self._owner(name) in device_ids - self._waited_for.keys():
                        self._asked.discard(name)
                        self._outcomes.pop(name, None)
