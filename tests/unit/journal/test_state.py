"""The error for devices that a guest did not release."""

import pytest

from vmplug.drivers.ports import UnplugFailure
from vmplug.errors import UnplugRefused, UnplugTimeout
from vmplug.journal.state import unplug_error

TIMEOUT, LOST, REFUSED = UnplugFailure.TIMEOUT, UnplugFailure.LOST, UnplugFailure.REFUSED
PATHS = {"a": "/dev/sda", "b": "/dev/sdb"}


def never_asked() -> str:
    raise AssertionError("the run state explains only a guest that does not answer")


@pytest.mark.parametrize("other", UnplugFailure)
def test_a_refusal_says_most(other: UnplugFailure) -> None:
    left = {"a": other, "b": REFUSED}
    error = unplug_error(left, PATHS, timeout_s=1.5, status=never_asked)
    assert isinstance(error, UnplugRefused)
    assert error.message == "the guest refuses to release /dev/sda, /dev/sdb"
    device = "a" if other is REFUSED else "b"
    assert error.qom_path == f"/machine/peripheral/vmplug-{device}"


def test_a_lost_backend_says_more_than_silence() -> None:
    error = unplug_error({"a": TIMEOUT, "b": LOST}, PATHS, timeout_s=1.5, status=never_asked)
    assert isinstance(error, UnplugTimeout)
    assert error.ids == ("a", "b")
    assert error.message == (
        "the guest did not release /dev/sda, /dev/sdb within 1.5 s: "
        "the backend of /dev/sdb is gone"
    )


@pytest.mark.parametrize(
    ("status", "hint"),
    [("running", "it stays detaching; detach again"), ("paused", "the VM is paused: the guest")],
)
def test_the_hint_on_silence_follows_the_run_state(status: str, hint: str) -> None:
    error = unplug_error({"a": TIMEOUT}, PATHS, timeout_s=2.0, status=lambda: status)
    assert isinstance(error, UnplugTimeout)
    assert error.message == "the guest did not release /dev/sda within 2 s"
    assert error.hint
    assert error.hint.startswith(hint)
