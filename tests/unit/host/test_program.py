"""Programs of the host: how they ended, and what they said."""

import os
import time
from pathlib import Path

import pytest

from vmplug.errors import AttributeReadError
from vmplug.host.program import Finished, read_start, run_program


def test_what_a_program_says_is_kept() -> None:
    done = run_program(["sh", "-c", "echo out; echo err >&2"], timeout_s=10)
    assert done == Finished(0, "out\n", "err")


def test_a_program_that_fails_in_silence_has_a_status() -> None:
    done = run_program(["sh", "-c", "exit 3"], timeout_s=10)
    assert done == Finished(3, "", "sh ended with status 3")


def test_only_the_first_words_of_a_long_complaint_are_kept() -> None:
    done = run_program(["sh", "-c", "seq 1000 >&2; exit 1"], timeout_s=10)
    assert done.complaint == "1; 2; 3"


def test_a_program_that_is_not_there_is_told() -> None:
    done = run_program(["no-such-program", "x"], timeout_s=10)
    assert done == Finished(None, "", "the program no-such-program is not installed")


def test_a_program_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("")
    program.chmod(0o755)
    done = run_program([str(program)], timeout_s=10)
    assert done.status is None
    assert "Exec format error" in done.complaint


@pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM; sleep 60; true", "exec yes"])
def test_a_program_has_a_deadline(script: str) -> None:
    begun = time.monotonic()
    done = run_program(["sh", "-c", script], timeout_s=0.1)
    assert done.status is None
    assert "did not end within 0.1 s" in done.complaint
    assert time.monotonic() - begun < 5


def test_programs_of_the_system_are_found_without_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_program(["true"], timeout_s=10).status == 0
    monkeypatch.delenv("PATH")
    assert run_program(["true"], timeout_s=10).status == 0
    assert "PATH" not in os.environ


# what may never answer


def test_the_start_of_a_device_is_read_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 2)
    assert read_start(str(path), 300, timeout_s=10) == path.read_bytes()[:300]
    assert read_start(str(path), 1000, timeout_s=10) == path.read_bytes()


def test_what_does_not_answer_is_given_up_and_leaves_no_process(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "fifo")
    begun = time.monotonic()
    assert read_start(str(path), 10, timeout_s=0.05) is None
    assert time.monotonic() - begun < 5
    readers = [read for read in Path("/proc").glob("[0-9]*/cmdline") if names(read, path)]
    assert readers == []


def names(cmdline: Path, path: Path) -> bool:
    try:
        return os.fsencode(path) in cmdline.read_bytes()
    except OSError:  # it has ended
        return False


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeReadError, match="Is a directory"):
        read_start(str(tmp_path), 10, timeout_s=10)
