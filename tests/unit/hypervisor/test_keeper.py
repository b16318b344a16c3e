"""The processes that keep what programs print, and the logs of VMs that have ended."""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from vmplug.host.process import find_marked, wait_for_end
from vmplug.hypervisor.keeper import KEEPER_MARK, end_keepers, kept_output, read_log
from vmplug.hypervisor.qemu.start.ended_logs import keep_logs, list_ended_logs

BOUND, END_S = 64, 60.0


def keepers(vm: str) -> list[int]:
    return [pid for pid, marked in find_marked(KEEPER_MARK).items() if marked == vm]


def kill_keepers(vm: str) -> bool:
    """Whether there was one. A dd that the shell starts after a look is there at the next."""
    pids = keepers(vm)
    for pid in sorted(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid, END_S)
    return bool(pids)


def has_reader(console: int) -> bool:
    poll = select.poll()
    poll.register(console, 0)
    return not poll.poll(10)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[str]:
    """The name of a VM whose keeper does not outlive the test."""
    name = str(tmp_path / "qmp.sock")
    yield name
    while kill_keepers(name):
        pass


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def say(console: int, text: str) -> None:
    os.write(console, text.encode())


def test_a_short_console_is_kept_whole_and_its_keeper_ends_with_the_pipe(
    tmp_path: Path, vm: str
) -> None:
    with kept_output(tmp_path / "console.log", vm, bound_bytes=BOUND) as console:
        assert contents(tmp_path) == {"console.log": ""}
        assert keepers(vm)
        say(console, "hello")
    end_keepers(vm)
    assert contents(tmp_path) == {"console.log": "hello"}
    assert keepers(vm) == []


@pytest.mark.parametrize("rest", [0, 1, BOUND - 1])
def test_only_the_end_of_a_long_console_is_kept(tmp_path: Path, vm: str, rest: int) -> None:
    printed = "".join(f"{number:07}\n" for number in range(5 * BOUND // 8)) + "x" * rest
    with kept_output(tmp_path / "console.log", vm, bound_bytes=BOUND) as console:
        say(console, printed)
    end_keepers(vm)
    last = contents(tmp_path)
    assert last == {
        "console.log": printed[len(printed) - rest :],
        "console.log.1": printed[len(printed) - rest - BOUND : len(printed) - rest],
    }
    assert read_log(tmp_path / "console.log") == printed[-rest - BOUND :]


def test_a_keeper_outlives_a_term_signal_and_its_children(tmp_path: Path, vm: str) -> None:
    """What a VM that was killed had printed is read to the end."""
    with kept_output(tmp_path / "console.log", vm, bound_bytes=BOUND) as console:
        for pid in keepers(vm):
            os.kill(pid, signal.SIGTERM)
        say(console, "the last words")
    end_keepers(vm)
    assert contents(tmp_path)["console.log"] == "the last words"


def test_a_killed_keeper_breaks_the_pipe_and_holds_up_nobody(tmp_path: Path, vm: str) -> None:
    with kept_output(tmp_path / "console.log", vm) as console:
        while has_reader(console):  # a program that is just being executed is not found
            kill_keepers(vm)
        with pytest.raises(BrokenPipeError):
            say(console, "x")


def test_a_keeper_on_a_full_disk_drops_some_output_and_tries_again(
    tmp_path: Path, vm: str
) -> None:
    (tmp_path / "console.log").symlink_to("/dev/full")
    with kept_output(tmp_path / "console.log", vm, bound_bytes=BOUND) as console:
        say(console, "x" * (1 + 4096) + "there is room")
    end_keepers(vm)
    assert (tmp_path / "console.log").read_text() == "there is room"
    assert not (tmp_path / "console.log").is_symlink()


# the logs of VMs that have ended


def a_vm(state_dir: Path, name: str, *, qemu: str = "", console: str = "") -> Path:
    directory = state_dir / "vm" / name
    directory.mkdir(parents=True)
    (directory / "qemu.log").write_text(qemu)
    (directory / "console.log").write_text(console)
    (directory / "qmp.sock").touch()
    return directory


def test_the_logs_move_and_all_else_goes(tmp_path: Path) -> None:
    keep_logs(a_vm(tmp_path, "sb1.a-b", qemu="it broke", console="help"), "sb1.a-b")
    (logs,) = list_ended_logs(tmp_path)
    assert logs.name == "sb1.a-b"
    assert contents(Path(logs.directory)) == {"qemu.log": "it broke", "console.log": "help"}
    assert list((tmp_path / "vm").iterdir()) == []
    assert Path(logs.directory).parent.stat().st_mode & 0o777 == 0o700


def test_two_of_a_name_and_eight_altogether_are_kept(tmp_path: Path) -> None:
    for count in range(3):
        keep_logs(a_vm(tmp_path, "sb1", console=str(count)), "sb1")
    kept = [Path(logs.directory, "console.log").read_text() for logs in list_ended_logs(tmp_path)]
    assert kept == ["1", "2"]
    for count in range(7):
        keep_logs(a_vm(tmp_path, f"x{count}"), f"x{count}")
    assert [logs.name for logs in list_ended_logs(tmp_path)] == [
        "sb1",
        *(f"x{count}" for count in range(7)),
    ]
    assert len(list((tmp_path / "ended").iterdir())) == 8


def test_a_vm_without_a_directory_has_no_logs(tmp_path: Path) -> None:
    keep_logs(tmp_path / "vm" / "sb1", "sb1")
    assert list_ended_logs(tmp_path) == []


def test_logs_that_cannot_be_kept_stop_nothing(tmp_path: Path, logged: BufferingHandler) -> None:
    directory = a_vm(tmp_path, "sb1")
    (tmp_path / "ended").touch()
    keep_logs(directory, "sb1")
    (record,) = logged.buffer
    assert "cannot be kept" in record.getMessage()
    assert list_ended_logs(tmp_path) == []
