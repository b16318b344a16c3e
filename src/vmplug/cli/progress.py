"""What a verb does meanwhile: what it waits for, its steps with -v, and what Ctrl-C leaves.

The library logs its waits and steps (`vmplug.waiting`, docs/library.md). They are shown on stderr.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

import click

from vmplug.cli.render.terminal import (
    Style,
    is_terminal,
    knows_escapes,
    say,
    shorten,
    width_of,
)
from vmplug.errors import DeviceError
from vmplug.text import one_line

if TYPE_CHECKING:
    from logging import LogRecord

    from vmplug.manager.setup import Setup

_ERASE = "\r\x1b[K"
_PATIENCE_S, _STEP_S = 0.3, 0.25
"""Most verbs end before anybody could read what they wait for."""
_VERBOSE = "vmplug.verbose"


class Interrupted(Exception):
    """Ctrl-C: sentences on what is left as it is, each with what finishes it, or None."""

    def __init__(self, left: "list[tuple[str, str | None]]") -> None:
        super().__init__()
        self._left = left

    def told(self, *, as_one: bool) -> "list[tuple[str, str | None]]":
        """Each of them, or all as one."""
        if not as_one:
            return self._left
        hints = dict.fromkeys(hint for _, hint in self._left if hint)
        return [("; ".join(what for what, _ in self._left), "; ".join(hints) or None)]


@contextmanager
def at_work(
    what: str,
    setup: "Setup",
    *,
    otherwise: tuple[str, str | None] = ("nothing is half done", None),
) -> Iterator[None]:
    """`progress` of something that changes the host or a VM; Ctrl-C reports what is left.

    `otherwise` is the report when the journal has nothing that is half done.
    """
    try:
        with progress(what):
            yield
    except KeyboardInterrupt:
        from vmplug.manager.unfinished import list_unfinished  # noqa: PLC0415  msgspec: 9 ms

        left = list[tuple[str, str | None]]()
        with suppress(DeviceError):  # it has been reported, or will be by the next verb
            left += [(one.what, one.hint) for one in list_unfinished(setup=setup)]
        raise Interrupted(left or [otherwise]) from None


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show at a terminal, on stderr, what takes its time, and how long a wait may still take."""
    if not is_terminal(sys.stderr):
        yield
        return
    status = _Status(what)
    with hearing(status.hear):
        thread = Thread(target=status.run)
        thread.start()
        try:
            yield
        finally:
            status.end()
            thread.join()


class _Status:
    """The last line of the terminal: the wait that began last, or else what is done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._waits: list[tuple[str, float]] = []
        self._is_shown = False
        self._told = set[str | tuple[str, float]]()
        self._is_over = Event()
        self._is_verbose = is_verbose()

    def hear(self, record: "LogRecord") -> None:
        """Note a wait that begins or ends; show a warning, which -v shows too."""
        if not hasattr(record, "wait_for"):
            if record.levelname == "WARNING" and not self._is_verbose:
                self._erase()
                say(f"vmplug: {one_line(record.getMessage())}", Style.WARNING, err=True)
            return
        told = vars(record)
        wait = told["wait_for"], told["deadline"]
        if "waited_s" not in told:
            self._waits.append(wait)
        elif wait in self._waits:
            self._waits.remove(wait)

    def run(self) -> None:
        """Show it until `end`; what is over soon is not shown."""
        pause_s = _PATIENCE_S
        with suppress(Exception):  # the terminal has gone
            while not self._is_over.wait(pause_s):
                pause_s = _STEP_S
                self._show()
            self._erase()

    def end(self) -> None:
        """Ends `run`."""
        self._is_over.set()

    def _show(self) -> None:
        told: str | tuple[str, float] = self._what
        text = self._what
        for told in self._waits[-1:]:  # the last one, if it does not end meanwhile
            left_s = max(0.0, told[1] - time.monotonic())
            text = f"waiting for {told[0]}, {left_s:.0f} s left"
        if knows_escapes(sys.stderr):
            text = shorten(one_line(text), (width_of(sys.stderr) or 0) - 1)
            sys.stderr.write(_ERASE + text)
            sys.stderr.flush()
            self._is_shown = True
        elif told not in self._told:  # also when another wait has come between
            self._told.add(told)
            say(one_line(text), err=True)

    def _erase(self) -> None:
        if self._is_shown:
            self._is_shown = False
            sys.stderr.write(_ERASE)
            sys.stderr.flush()


@contextmanager
def hearing(hear: "Callable[[LogRecord], None]") -> Iterator[None]:
    """Hear all that the library logs, in the thread that logs it."""
    import logging  # noqa: PLC0415  5 ms that most verbs need not pay

    class Hearer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(Exception):  # a terminal that has gone must not stop an attach
                hear(record)

    hearer, log = Hearer(), logging.getLogger("vmplug")
    level = log.level
    log.addHandler(hearer)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(hearer)


def with_verbose(command: click.Command) -> click.Command:
    """The verb with the option -v, and those of its group, if it is one."""
    for verb in command.commands.values() if isinstance(command, click.Group) else [command]:
        if not any(option.name == "verbose" for option in verb.params):
            verb.params.append(_verbose_option())
    return command


def _verbose_option() -> click.Option:
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_show_steps,
        help="Show on stderr each write to sysfs and each QMP command.",
    )


def is_verbose() -> bool:
    """Whether the verb that runs was called with -v."""
    context = click.get_current_context(silent=True)
    return context is not None and _VERBOSE in context.meta


def _show_steps(context: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if is_wanted and _VERBOSE not in context.meta:
        context.meta[_VERBOSE] = True
        context.with_resource(hearing(StepPrinter().hear))


class StepPrinter:
    """Prints what is logged, with the seconds since -v was read; a wait when it was a long one."""

    def __init__(self) -> None:
        self._began = time.time()

    def hear(self, record: "LogRecord") -> None:
        """Print it above what `progress` shows."""
        if hasattr(record, "wait_for") and getattr(record, "waited_s", 0.0) < _PATIENCE_S:
            return
        if knows_escapes(sys.stderr):
            sys.stderr.write(_ERASE)
        text = f"{record.created - self._began:7.3f}  {one_line(record.getMessage())}"
        is_warning = record.levelname in {"WARNING", "ERROR"}
        say(text, Style.WARNING if is_warning else Style.DETAIL, err=True)
