"""Do the steps of a plug: all of them, or none."""

import logging
from collections.abc import Callable, Sequence

from vmplug.drivers.ports import Command, Step
from vmplug.errors import BackendError, CommandError, HostError
from vmplug.hypervisor.qmp.monitor import Monitor

log = logging.getLogger(__name__)

NOT_THERE = ("Failed to find node", "not found")
"""Parts of QEMU's errors for a part that has gone."""


def do_all(
    monitor: Monitor,
    steps: Sequence[Step],
    verify: Callable[[], None] | None = None,
    *,
    begin: Callable[[Command], None] | None = None,
) -> None:
    """All or none; `verify` raises before the last step, which shows it to the guest.

    `begin` does the first step, and raises when the rest must not follow.
    """
    done: list[Step] = []
    try:
        if begin:
            done.append(steps[0])
            begin(steps[0].do)
        if verify:
            _do_each(monitor, steps[:-1], done)
            verify()
        _do_each(monitor, steps[len(done) :], done)
    except (CommandError, HostError, BackendError):
        for step in reversed(done):
            _take_back(monitor, step.undo)
        raise


def _do_each(monitor: Monitor, steps: Sequence[Step], done: list[Step]) -> None:
    answers, refusal = monitor.attempt([step.do for step in steps])
    done += steps[: len(answers)]
    if refusal:
        raise refusal


def _take_back(monitor: Monitor, command: Command | None) -> None:
    """Undo a step, unless its part has gone already: a netdev takes its chardev along."""
    if command is None:
        return
    try:
        monitor.execute(command)
    except CommandError as error:
        if not any(words in error.desc for words in NOT_THERE):
            log.warning("ignored: cannot undo %s: %s", command.arguments, error)
