"""Runs the tests on all CPUs: they are collected once, and run by forked processes.

With pytest-xdist each process collects thousands of tests again, and the one in the middle has
five messages for each test: a third of all the CPU time of the fast tests. Measured with 3.8.
"""

import faulthandler
import json
import os
import pickle
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, pairwise
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

import pytest

_CHUNK_S = 5.0
"""For how long the tests of a file that a process takes at a time may take it.

For longer, and the processes do not end together; for less, and each makes what they share.
"""
_CHUNK = 40
"""How many it takes as long as nothing is known of their times."""
_MORE_THAN_CPUS = 4
"""Processes: a test may wait for a deadline or for a process, and uses no CPU meanwhile.

Measured on two CPUs with 8 200 tests: 1 more takes 54 s, 3 more 46 s, 4 more 44 s, 6 more 47 s.
"""
_TIMES = Path("build", "test-times.json")
"""What a test of each file took on average when they were last run: the slowest begin."""
_NUMBER = struct.Struct("=I")
_Numbered = tuple[int, pytest.Item]
"""A test and its number in the session."""
_Report = dict[str, object]


@dataclass
class _Process:
    """Tells what it has begun, and with it the reports of the test before."""

    pid: int
    told: Connection
    last: int | None = None
    has_ended: bool = False


class Spread:
    """The plugin: pytest's own loop, in a process for each CPU and some more."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """A forked process returns too, and ends its session as pytest does, but on no screen."""
        if session.testsfailed or session.config.option.collectonly:
            return None
        times = _Times(session.config.rootpath)
        chunks = times.sort(session.items)
        todo, give = os.pipe()
        os.write(give, b"".join(map(_NUMBER.pack, range(len(chunks)))))
        os.close(give)
        processes = list[_Process]()
        for _ in range(len(os.sched_getaffinity(0)) + _MORE_THAN_CPUS):
            sys.stdout.flush()
            told, tell = Pipe(duplex=False)
            if (pid := os.fork()) == 0:
                _run(session, _take(chunks, todo, session.config), tell)
                return True
            tell.close()
            processes.append(_Process(pid, told))
        try:
            _repeat(session, processes, todo, times)
        finally:
            _begin_no_other(todo)
            os.close(todo)
            for process in processes:
                _wait_for(process, session)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        times.note()
        return True


@dataclass
class _Times:
    """How long the tests of each file take; a file that is new is taken to be slow."""

    root: Path
    taken: dict[Path, list[float]] = field(default_factory=dict)

    def sort(self, items: Sequence[pytest.Item]) -> list[list[_Numbered]]:
        """Chunks of tests, those that will take longest first."""
        known, found = self._read(), list[tuple[float, list[_Numbered]]]()
        whole, files = _grouped(items)
        for path, tests in files.items():
            each_s = known.get(self._name(path), _CHUNK_S)
            size = max(1, int(_CHUNK_S / max(each_s, 1e-6))) if known else _CHUNK
            chunks = (tests[start : start + size] for start in range(0, len(tests), size))
            found += [(each_s * len(chunk), chunk) for chunk in chunks]
        for tests in whole.values():
            times = (known.get(self._name(item.path), _CHUNK_S) for _, item in tests)
            found.append((sum(times), tests))
        return [chunk for _, chunk in sorted(found, key=lambda timed: -timed[0])]

    def add(self, path: Path, seconds: float) -> None:
        """Count one test."""
        self.taken.setdefault(path, []).append(seconds)

    def note(self) -> None:
        """Keep it for the next time; other files' times stay."""
        mean = {self._name(path): sum(times) / len(times) for path, times in self.taken.items()}
        file = self.root / _TIMES
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({**self._read(), **mean}))

    def _read(self) -> Mapping[str, float]:
        with suppress(FileNotFoundError, ValueError):
            return dict[str, float](json.loads((self.root / _TIMES).read_text()))
        return {}

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)


def _grouped(
    items: Sequence[pytest.Item],
) -> tuple[dict[str, list[_Numbered]], dict[Path, list[_Numbered]]]:
    """Those that stay together, by the name of their mark; the others, by their file."""
    whole, files = dict[str, list[_Numbered]](), dict[Path, list[_Numbered]]()
    for numbered in enumerate(items):
        if mark := numbered[1].get_closest_marker("together"):
            whole.setdefault(mark.args[0], []).append(numbered)
        else:
            files.setdefault(numbered[1].path, []).append(numbered)
    return whole, files


def _take(
    chunks: Sequence[Sequence[_Numbered]], todo: int, config: pytest.Config
) -> Iterator[_Numbered]:
    """A chunk may take as long as a test: pytest starts and joins a thread to watch each test."""
    stderr = os.dup(2)  # which a test may capture
    timeout_s = float(config.getini("faulthandler_timeout") or 0)
    exits = bool(config.getini("faulthandler_exit_on_timeout"))
    while number := os.read(todo, _NUMBER.size):
        if timeout_s:
            faulthandler.dump_traceback_later(timeout_s, file=stderr, exit=exits)
        yield from chunks[_NUMBER.unpack(number)[0]]


def _begin_no_other(todo: int) -> None:
    while os.read(todo, 1 << 16):
        pass


def _run(session: pytest.Session, items: Iterator[_Numbered], tell: Connection) -> None:
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.unregister(name="faulthandler")
    plugins.register(teller := _Teller(session.config, tell))
    # pytest makes a proxy of the hooks for each hook of each test: 2 % of all the CPU time.
    vars(session)["gethookproxy"] = cache(session.gethookproxy)
    for (number, item), (_, following) in pairwise(chain(items, [(0, None)])):
        assert item
        teller.begin(number)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            break
    faulthandler.cancel_dump_traceback_later()
    teller.begin(None)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)


class _Teller:
    """The plugin that sends what a process reports: one message for each test."""

    def __init__(self, config: pytest.Config, tell: Connection) -> None:
        self._config, self._tell = config, tell
        self._reports = list[_Report]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            hook = self._config.hook
            data = hook.pytest_report_to_serializable(config=self._config, report=report)
            self._reports.append(data)

    def begin(self, number: int | None) -> None:
        """A test, or None for the end."""
        self._tell.send_bytes(pickle.dumps((number, self._reports)))
        self._reports.clear()


def _repeat(
    session: pytest.Session, processes: Sequence[_Process], todo: int, times: _Times
) -> None:
    hook = session.config.hook
    with DefaultSelector() as pipes:
        for process in processes:
            pipes.register(process.told, EVENT_READ, process)
        while pipes.get_map():
            if session.shouldfail:
                _begin_no_other(todo)
            for key, _ in pipes.select():
                process = key.data
                try:
                    number, reports = pickle.loads(process.told.recv_bytes())
                except EOFError:
                    pipes.unregister(process.told)
                    continue
                for data in reports:
                    report = hook.pytest_report_from_serializable(config=session.config, data=data)
                    hook.pytest_runtest_logreport(report=report)
                    times.add(session.items[process.last].path, report.duration)
                if number is None:
                    process.has_ended = True
                else:
                    process.last = number


def _wait_for(process: _Process, session: pytest.Session) -> None:
    """A process that did not end as pytest does failed in its last test, or after it."""
    process.told.close()
    status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    is_done = status in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED} and process.has_ended
    if is_done or process.last is None:
        return
    item = session.items[process.last]
    why = f"the process that ran it last ended with status {status}; others may not have run"
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
    session.config.hook.pytest_runtest_logreport(report=report)
