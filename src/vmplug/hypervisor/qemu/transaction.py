"""Do the steps of a plug: all of them, or none."""

from collections.abc import Callable, Sequence

from vmplug.drivers.ports import Command, Step
from vmplug.errors import BackendError, CommandError, HostError
from vmplug.hypervisor.qmp.monitor import Monitor, Talk
from vmplug.log import Log

log = Log(__name__)

NOT_THERE = ("Failed to find node", "not found")
"""Parts of QEMU's errors for a part that has gone."""

UNDONE = (CommandError, HostError, BackendError)
"""After these, QEMU still answers, and what was done is undone."""


def do_all(
    monitor: Monitor, steps: Sequence[Step], *, begin: Callable[[Command], Talk] | None = None
) -> None:
    """See `transaction`."""
    monitor.converse(transaction(steps, begin=begin))


def transaction(
    steps: Sequence[Step],
    *,
    begin: Callable[[Command], Talk] | None = None,
    verify: Talk | None = None,
) -> Talk:
    """All or none; `verify` raises before the last step, which shows it to the guest.

    `begin` does the first step, and raises when the rest must not follow.
    """
    done: list[Step] = []
    try:
        for step in steps:
            if verify and step is steps[-1]:
                yield from verify
            if begin and step is steps[0]:
                done.append(step)
                yield from begin(step.do)
            else:
                yield step.do
                done.append(step)
    except UNDONE:
        for step in reversed(done):
            yield from _take_back(step.undo)
        raise


def _take_back(command: Command | None) -> Talk:
    """Undo a step, unless its part has gone already: a netdev takes its chardev along."""
    if command is None:
        return
    try:
        yield command
    except CommandError as error:
        if not any(words in error.desc for words in NOT_THERE):
            log.warning("ignored: cannot undo %s: %s", command.execute, error.error_class)
