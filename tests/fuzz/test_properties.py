"""Every property on its seeds, and on a few inputs that hypothesis makes; always the same ones."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import changes_only
from tests.fuzz.targets import TARGETS, load, seeds

EXAMPLES = {
    "spec": 2,
    "device": 2,
    "host": 1,
    "record": 0.6,
    "answers": 3,
    "qmp": 1,
    "cdi": 1,
    "kubernetes": 0.6,
}
"""So many times those of another property."""
DEADLINE_S = 20
"""For one input: far more than it takes, so that a hang has an end."""


@contextmanager
def deadline() -> Iterator[None]:
    def hang(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"no answer within {DEADLINE_S} s")

    former = signal.signal(signal.SIGALRM, hang)
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("x"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("x"),
        lambda path: (path.parent / "there").unlink(),
        lambda path: (path.parent / "there").rename(path),
        lambda path: (path.parent / "below" / ".." / "there").chmod(0o700),
        lambda path: subprocess.run(["true", path], check=True),
    ],
)
def test_a_change_outside_is_seen_and_one_inside_is_not(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for directory in (inside, outside):
        (directory / "below").mkdir(parents=True)
        (directory / "there").touch()
    with pytest.raises(AssertionError), changes_only(str(inside)):
        change(outside / "new")
    with changes_only(str(inside)):
        (inside / "new").write_text("x")


@pytest.mark.parametrize("target", TARGETS)
def test_every_seed_is_answered_or_refused(target: str) -> None:
    check, inputs = load(target), seeds(target)
    assert inputs
    for data in inputs:
        with deadline():
            check(data)


@pytest.mark.parametrize("target", TARGETS)
def test_anything_is_answered_or_refused(target: str) -> None:
    check, inputs = load(target), seeds(target)

    @settings(
        max_examples=int(EXAMPLES[target] * settings().max_examples),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a hang is not to be shrunk
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=300) | _spoiled(inputs))
    def answered_or_refused(data: bytes) -> None:
        with deadline():
            check(data)

    answered_or_refused()


def _spoiled(inputs: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed with some of its bytes replaced."""
    return st.builds(
        lambda data, start, length, put: data[:start] + put + data[start + length :],
        st.sampled_from(inputs),
        st.integers(0, max(map(len, inputs))),
        st.integers(0, 8),
        st.binary(max_size=12),
    )
