"""A property that is read once: threads and children of fork do not wait for each other."""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from vmplug.cached import cached_property

END_S = 60


class Host:
    """One of which the storage answers when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.is_asked, self.answers = threading.Event(), threading.Event()

    @cached_property
    def size(self) -> int:
        """How often it was asked."""
        self.asked += 1
        self.is_asked.set()
        assert self.answers.wait(END_S * 2)
        return self.asked


@pytest.fixture
def silent() -> Iterator[Host]:
    """A thread waits for it."""
    host = Host()
    thread = threading.Thread(target=partial(getattr, host, "size"))
    thread.start()
    assert host.is_asked.wait(END_S)
    yield host
    host.answers.set()
    thread.join(END_S)


@pytest.fixture
def answering() -> Host:
    host = Host()
    host.answers.set()
    return host


def test_it_is_read_once_for_each_object(answering: Host) -> None:
    assert (answering.size, answering.size, answering.asked) == (1, 1, 1)
    assert Host.size.__doc__ == "How often it was asked."


def test_no_object_waits_for_another(silent: Host, answering: Host) -> None:
    thread = threading.Thread(target=partial(getattr, answering, "size"), daemon=True)
    thread.start()
    thread.join(END_S)
    assert not thread.is_alive()
    assert not silent.answers.is_set()


@pytest.mark.usefixtures("silent")
def test_no_child_waits_for_a_thread_of_its_parent(answering: Host) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(END_S)
        os._exit(answering.size - 1)
    assert os.waitpid(child, 0)[1] == 0
