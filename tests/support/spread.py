"""Runs the tests on all CPUs: they are collected once, and run by forked processes.

With pytest-xdist each process collects thousands of tests again, and the one in the middle has
five messages for each test: a third of all the CPU time of the fast tests. Measured with 3.8.
"""

import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from multiprocessing.connection import Connection, Pipe, wait

import pytest

_CHUNK = 40
"""How many tests of a file a process takes at a time.

More, and the processes do not end together; fewer, and each makes what the tests of a file share.
"""
_NUMBER = struct.Struct("=I")
_Numbered = tuple[int, pytest.Item]
"""A test and its number in the session."""


@dataclass
class _Process:
    """Tells a number when it begins a test, and then the reports of that test."""

    pid: int
    told: Connection
    last: int | None = None


class Spread:
    """The plugin: pytest's own loop, in a process for each CPU."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """A forked process returns too, and ends its session as pytest does, but on no screen."""
        if session.testsfailed or session.config.option.collectonly:
            return None
        chunks = _chunks(session.items)
        todo, give = os.pipe()
        os.write(give, b"".join(map(_NUMBER.pack, range(len(chunks)))))
        os.close(give)
        processes = list[_Process]()
        for _ in os.sched_getaffinity(0):
            sys.stdout.flush()
            told, tell = Pipe(duplex=False)
            if (pid := os.fork()) == 0:
                _run(session, _take(chunks, todo), tell)
                return True
            tell.close()
            processes.append(_Process(pid, told))
        try:
            _repeat(session, processes, todo)
        finally:
            _begin_no_other(todo)
            os.close(todo)
            for process in processes:
                _wait_for(process, session)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        return True


def _chunks(items: Sequence[pytest.Item]) -> list[list[_Numbered]]:
    found = list[list[_Numbered]]()
    for _, group in groupby(enumerate(items), lambda numbered: numbered[1].path):
        tests = list(group)
        found += [tests[start : start + _CHUNK] for start in range(0, len(tests), _CHUNK)]
    return found


def _take(chunks: Sequence[Sequence[_Numbered]], todo: int) -> Iterator[_Numbered]:
    while number := os.read(todo, _NUMBER.size):
        yield from chunks[_NUMBER.unpack(number)[0]]


def _begin_no_other(todo: int) -> None:
    while os.read(todo, 1 << 16):
        pass


def _run(session: pytest.Session, items: Iterator[_Numbered], tell: Connection) -> None:
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(_Teller(session.config, tell))
    for (number, item), (_, following) in pairwise(chain(items, [(0, None)])):
        assert item
        tell.send(number)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)


class _Teller:
    """The plugin that sends what a process reports."""

    def __init__(self, config: pytest.Config, tell: Connection) -> None:
        self._config, self._tell = config, tell

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            hook = self._config.hook
            self._tell.send(hook.pytest_report_to_serializable(config=self._config, report=report))


def _repeat(session: pytest.Session, processes: Sequence[_Process], todo: int) -> None:
    hook, by_pipe = session.config.hook, {process.told: process for process in processes}
    while by_pipe:
        if session.shouldfail:
            _begin_no_other(todo)
        for pipe in wait(list(by_pipe)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError:
                del by_pipe[pipe]
                continue
            if isinstance(message, int):
                by_pipe[pipe].last = message
            else:
                report = hook.pytest_report_from_serializable(config=session.config, data=message)
                hook.pytest_runtest_logreport(report=report)


def _wait_for(process: _Process, session: pytest.Session) -> None:
    """A process that did not end as pytest does failed in its last test, or after it."""
    process.told.close()
    status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    if status in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED} or process.last is None:
        return
    item = session.items[process.last]
    why = f"the process that ran it last ended with status {status}; others may not have run"
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
    session.config.hook.pytest_runtest_logreport(report=report)
