"""What is collected: the tests of the lab only in the lab. What tests note is below build."""

import gc
import itertools
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from tests.support.memory import MEMORY
from tests.support.spread import Spread

IS_IN_LAB = "LAB_VM" in os.environ

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "build/hypothesis")
collect_ignore = [] if IS_IN_LAB else ["lab"]


_NUMBERS = itertools.count()
_HAS_FAILED = pytest.StashKey[bool]()


@pytest.fixture
def tmp_path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """As pytest's own, which leaves a link for each test and reads them all for the next one."""
    path = tmp_path_factory.getbasetemp() / str(next(_NUMBERS))
    path.mkdir(mode=0o700)
    failures = request.session.testsfailed
    yield path
    if request.session.testsfailed == failures:
        try:
            _remove(str(path))
        except OSError:
            shutil.rmtree(path, ignore_errors=True)


def _remove(directory: str) -> None:
    """In three quarters of the time that shutil takes, which fears that somebody moves it."""
    with os.scandir(directory) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(directory)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--spread", action="store_true", help="run the tests on all CPUs")
    parser.addoption(
        "--in-memory", action="store_true", help="keep temporary files in memory, if possible"
    )
    parser.addoption(
        "--quick", action="store_true", help="draw a fifth of the examples of each property"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What is collected stays, and the collector of garbage would go through it again and again.
    gc.set_threshold(100_000)
    # nohup(1) ignores SIGHUP, and sh the others in what it starts with `&`; so would every child.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if config.getoption("spread"):
        config.pluginmanager.register(Spread())
    if config.getoption("in_memory"):
        tempfile.tempdir = os.environ["TMPDIR"] = os.environ["PYTEST_DEBUG_TEMPROOT"] = MEMORY
    if not IS_IN_LAB:
        _settle_examples(20 if config.getoption("quick") else 100)


def pytest_collection_finish() -> None:
    """Nor does it go through thousands of tests later."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what has failed."""
    report = yield
    if report.failed:
        item.stash[_HAS_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """A VM that a test failed in is not the next one's: its guest may hang."""
    try:
        yield
    except BaseException:
        item.stash[_HAS_FAILED] = True
        raise
    finally:
        uses_vm = item.get_closest_marker("qemu") or item.get_closest_marker("lab")
        if uses_vm and item.stash.get(_HAS_FAILED, False):
            item.session._setupstate.teardown_exact(None)  # pytest has no other way


def _settle_examples(count: int) -> None:
    """The fifth of a second that an example may take is the machine's, which may be busy."""
    from hypothesis import HealthCheck, settings  # noqa: PLC0415  the lab has no such tests

    settings.register_profile(
        "tests",
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("tests")


@pytest.fixture
def logged() -> Iterator[BufferingHandler]:
    """What vmplug logs; pytest's own handler costs every other test more than this one."""
    handler, logger = BufferingHandler(100), logging.getLogger("vmplug")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
