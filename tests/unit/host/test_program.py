"""Programs of the host: how they ended, and what they said."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import vmplug
from tests.support.silent_files import SilentFiles, silent_files
from vmplug.errors import AttributeReadError, HostError
from vmplug.host import program
from vmplug.host.block.volumes import find_volumes
from vmplug.host.events import HostEvents
from vmplug.host.program import (
    PROGRAM_PATH,
    Finished,
    Look,
    Looks,
    ask_content,
    read_start,
    run_program,
)
from vmplug.host.root import HostRoot
from vmplug.host.use import silent
from vmplug.oci.info import Mount

SOON_S = 60.0


def test_what_a_program_says_is_kept() -> None:
    done = run_program(["sh", "-c", "echo out; echo err >&2"], timeout_s=SOON_S)
    assert done == Finished(0, "out\n", "err")


def test_a_program_that_fails_in_silence_has_a_status() -> None:
    done = run_program(["sh", "-c", "exit 3"], timeout_s=SOON_S)
    assert done == Finished(3, "", "sh ended with status 3")


def test_only_the_first_words_of_a_long_complaint_are_kept() -> None:
    done = run_program(["sh", "-c", "seq 1000 >&2; exit 1"], timeout_s=SOON_S)
    assert done.complaint == "1; 2; 3"


def test_a_program_that_is_not_there_is_told() -> None:
    done = run_program(["no-such-program", "x"], timeout_s=SOON_S)
    assert done == Finished(None, "", "the program no-such-program is not installed")


@pytest.mark.parametrize("name", ["gcc", "ld"])
def test_a_missing_libudev_is_not_looked_for_with_programs_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program, marker = tmp_path / name, tmp_path / "ran"
    program.write_text(f"#!/bin/sh\n: >{marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("ctypes.util._findSoname_ldconfig", lambda _: None)
    monkeypatch.setattr("vmplug.host.events._LIBRARY", "libudev-not-there.so.1")
    with pytest.raises(HostError, match="events cannot be received"):
        HostEvents()
    assert not marker.exists()


def test_a_program_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("")
    program.chmod(0o755)
    done = run_program([str(program)], timeout_s=SOON_S)
    assert done.status is None
    assert "Exec format error" in done.complaint


STARTS = re.compile(r"\bsubprocess\b|os\.(exec|spawn|posix_spawn|system|popen|fork)")


@pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM; sleep 60; true", "exec yes"])
def test_a_program_has_a_deadline(script: str) -> None:
    begun = time.monotonic()
    done = run_program(["sh", "-c", script], timeout_s=0.1)
    assert done.status is None
    assert "did not end within 0.1 s" in done.complaint
    assert time.monotonic() - begun < 30


def test_programs_are_found_whatever_the_callers_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("true", "ip", "modprobe", "setsid", "qemu-system-x86_64"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 99\n")
        (tmp_path / name).chmod(0o755)
    for path in (f"{tmp_path}:{os.environ['PATH']}", str(tmp_path), ".", ""):
        monkeypatch.setenv("PATH", path)
        monkeypatch.chdir(tmp_path)
        assert run_program(["true"], timeout_s=SOON_S).status == 0
    monkeypatch.delenv("PATH")
    assert run_program(["true"], timeout_s=SOON_S).status == 0
    assert "PATH" not in os.environ


def test_nothing_of_the_callers_environment_changes_what_a_program_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "MODPROBE_OPTIONS", "LC_ALL", "TMPDIR"):
        monkeypatch.setenv(name, "of the caller")
    before = os.umask(0)
    try:
        done = run_program(["sh", "-c", f"umask; env; > {tmp_path}/made"], timeout_s=SOON_S)
    finally:
        os.umask(before)
    umask, *variables = done.stdout.split("\n")
    assert umask == "0077"
    named = {line.partition("=")[0] for line in variables} - {"", "PWD", "OLDPWD", "SHLVL", "_"}
    assert named == {"PATH", "LC_ALL"}
    assert f"PATH={PROGRAM_PATH}" in variables
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600


def test_every_program_is_started_in_the_same_environment() -> None:
    """Another way to start one would need its own answer to what a caller can change.

    The command of a lease is the caller's: it has the caller's environment.
    """
    source = Path(vmplug.__file__).parent
    starts = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(
            r"^import subprocess|os\.(exec|spawn|posix_spawn|system|popen|fork)",
            path.read_text(),
            re.MULTILINE,
        )
    }
    ours = {
        "host/program.py",
        "hypervisor/keeper.py",
        "hypervisor/qemu/start/launch.py",
        "hypervisor/virtiofsd.py",
    }
    assert starts == ours | {"leases/run.py"}
    for path in ours:
        text = (source / path).read_text()
        assert text.count("env=program_environment(") == text.count("umask=") == 1, path


# what may never answer


def test_the_start_of_a_device_is_read_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 2)
    assert read_start(str(path), 300, timeout_s=SOON_S) == path.read_bytes()[:300]
    assert read_start(str(path), 1000, timeout_s=SOON_S) == path.read_bytes()


def test_what_does_not_answer_is_given_up_and_leaves_no_process(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "fifo")
    begun = time.monotonic()
    assert read_start(str(path), 10, timeout_s=0.05) is None
    assert time.monotonic() - begun < 30
    readers = [read for read in Path("/proc").glob("[0-9]*/cmdline") if names(read, path)]
    assert readers == []


@pytest.fixture
def files(tmp_path: Path) -> Iterator[SilentFiles]:
    below, mounted = tmp_path / "below", tmp_path / "mounted"
    for directory in (below, mounted):
        directory.mkdir()
    (below / "a").write_bytes(b"a")
    with silent_files(below, mounted) as made:
        yield made


@pytest.mark.root
def test_only_what_does_not_answer_is_silent_and_is_waited_for_once(
    tmp_path: Path, files: SilentFiles
) -> None:
    silent, here, absent = (str(tmp_path / name) for name in ("mounted/a", "here", "absent"))
    Path(here).touch()
    with Looks(timeout_s=4.0) as looks:
        assert looks.find_silent([silent, here, absent]) == set()
        files.stop()
        assert looks.find_silent([silent, here, absent]) == {silent}
        begun = time.monotonic()
        assert looks.find_silent([silent, here, absent]) == {silent}
        assert looks.find_silent([here]) == set()
        assert time.monotonic() - begun < 2, "a second wait takes half of its time at least"
        files.go_on()
        while silent in looks.find_silent([silent]):
            assert time.monotonic() - begun < 60, "it answers again"
        files.stop()
        assert looks.find_silent([silent]) == {silent}
    assert [read for read in Path("/proc").glob("[0-9]*/cmdline") if names(read, silent)] == []


@pytest.mark.parametrize(
    ("script", "is_silent"),
    [("n=0; until [ $((n += 1)) = 100000 ]; do :; done", False), ("sleep 60", True)],
)
def test_a_look_that_gets_no_cpu_in_time_says_nothing_of_the_storage(
    script: str, *, is_silent: bool
) -> None:
    def ask(_: Sequence[str]) -> Look:
        return Look(["sh", "-c", script])

    with Looks(timeout_s=0.02, ask=ask) as looks:
        assert looks.find_silent(["/a"]) == ({"/a"} if is_silent else set())


def test_a_look_has_nothing_of_the_caller(tmp_path: Path) -> None:
    """One that hangs would keep it open. It says nothing, and has its own session."""
    shown = tmp_path / "shown"
    script = f"cd /proc/$$/fd; for each in *; do readlink $each; done >{shown}; echo a; echo b >&2"
    held, other = os.pipe()
    try:
        os.set_inheritable(held, True)  # noqa: FBT003  Python's
        look = Look(["sh", "-c", script])
        assert look.ends_within(SOON_S)
        assert look.ends_within(0), "also when it is asked again"
        look.kill()
    finally:
        os.close(held)
        os.close(other)
    opened = shown.read_text().splitlines()
    assert opened.count("/dev/null") >= 2
    assert not [name for name in opened if name.startswith("pipe:")]


def test_a_look_with_a_program_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one of that name in the working directory."""
    (tmp_path / "no-such-look").write_text("#!/bin/sh\n")
    (tmp_path / "no-such-look").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no-such-look"):
        Look(["no-such-look"])


def test_a_caller_that_ignores_the_end_of_children_gets_an_answer() -> None:
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Looks() as looks:
            assert looks.find_silent(["/", "/dev/null"]) == set()
    finally:
        signal.signal(signal.SIGCHLD, former)


def test_more_paths_are_looked_at_than_a_program_may_have_words() -> None:
    """As many as one request may have. Before, OSError: Argument list too long."""
    paths = [f"/{'n' * 250}/{number}" for number in range(16384)]
    with Looks(timeout_s=120, ask=ask_content) as looks:
        assert looks.find_silent(paths) == set()


def test_the_mounts_of_a_bundle_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant chooses how many there are, and how long each takes."""
    asked = list[Sequence[str]]()

    def ask(paths: Sequence[str]) -> Look:
        asked.append(paths)
        return ask_content(paths)

    monkeypatch.setattr(silent, "_choose_at_risk", lambda paths, _: paths)
    monkeypatch.setattr(program, "ask_content", ask)
    mounts = [
        Mount(destination=f"/{number}", source=f"/absent/{number}", type="bind", read_only=False)
        for number in range(100)
    ]
    assert find_volumes(mounts, HostRoot()) == []
    assert [len(paths) for paths in asked] == [100]


@pytest.mark.root
def test_the_storage_behind_a_link_and_back_is_asked(tmp_path: Path, files: SilentFiles) -> None:
    """By its text alone the path is another one, which answers."""
    (tmp_path / "below" / "dir").mkdir()
    (tmp_path / "link").symlink_to(files.mounted / "dir")
    path = str(tmp_path / "link" / ".." / "a")
    assert silent.find_silent([path], HostRoot()) == set()
    files.stop()
    assert silent.find_silent([path], HostRoot()) == {path}


@pytest.mark.root
def test_what_others_have_open_is_known_while_its_storage_does_not_answer(
    tmp_path: Path, files: SilentFiles
) -> None:
    """In a process: one that hangs is ended by the file system when that ends."""
    here = tmp_path / "here"
    here.touch()
    script = """
import sys
from vmplug.host.file_id import CheckedFile, file_id, find_missing, has_open, shows_open
import os
pid, name = int(sys.argv[1]), file_id(os.stat(sys.argv[2]))
print(has_open(pid, name), shows_open(pid), find_missing(pid, [CheckedFile("", name)]))
"""
    with open(files.mounted / "a", "rb") as silent, open(here, "r+b") as other:
        command = ["sleep", "60"]
        with subprocess.Popen(command, stdin=silent, stdout=other) as holder:
            try:
                files.stop()
                words = [sys.executable, "-c", script, str(holder.pid), str(here)]
                asking = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
                try:
                    assert asking.communicate(timeout=60)[0] == "True True None\n"
                finally:
                    asking.kill()
                    files.go_on()
                    asking.wait()
            finally:
                holder.kill()


def names(cmdline: Path, path: Path | str) -> bool:
    try:
        return os.fsencode(path) in cmdline.read_bytes()
    except OSError:  # it has ended
        return False


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeReadError, match="Is a directory"):
        read_start(str(tmp_path), 10, timeout_s=SOON_S)


@pytest.mark.parametrize(
    ("path", "is_asked"),
    [
        ("remote", True),
        ("remote/file", True),
        ("link/file", True),
        ("relative/file", True),
        ("local/../remote/file", True),
        ("local/up/remote", True),
        ("loop", True),
        ("remote2", False),
        ("local/file", False),
        ("local/up/local", False),
        ("absent/file", False),
    ],
)
def test_only_a_path_through_the_files_of_a_server_is_asked_for(
    tmp_path: Path, path: str, *, is_asked: bool
) -> None:
    for name in ("remote", "remote2", "local"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "remote")
    (tmp_path / "relative").symlink_to("local/../remote")
    (tmp_path / "local/up").symlink_to("..")
    (tmp_path / "loop").symlink_to("loop")
    assert (
        silent._leads_through(f"{tmp_path}/{path}", {f"{tmp_path}/remote"}, HostRoot()) is is_asked
    )


def test_a_link_of_a_process_does_not_say_where_it_leads() -> None:
    assert silent._leads_through("/proc/self/root/tmp", {"/no-such-directory"}, HostRoot())
