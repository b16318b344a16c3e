"""A wait shows what it waits for and how long still, Ctrl-C what is left, and -v each step."""

import io
import json
import logging
import re
import time
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.cli.screen import Screen, session
from tests.support.disks import disk_image
from tests.support.journal import attach_row, device_record, vm_record
from tests.support.lab import wait_until
from vmplug.cli.progress import StepPrinter, hearing, progress
from vmplug.host.root import THIS_HOST
from vmplug.hypervisor.fake.monitor import Guest
from vmplug.journal.journal import Journal
from vmplug.journal.state import State
from vmplug.manager.setup import Setup
from vmplug.manager.unfinished import list_unfinished
from vmplug.waiting import waiting


@pytest.fixture
def image(vmplug: Vmplug, vm: MemoryVm, tmp_path: Path) -> Path:
    """A disk that the guest has and does not release."""
    image = disk_image(tmp_path / "a.img", 1, "a")
    vmplug("attach", "-d", f"file:{image}", "--vm", "sb1", "--owner", "c1").answer()
    vm.machine.guest = Guest.SILENT
    return image


# what is waited for


def waits_for(image: Path) -> re.Pattern[str]:
    return re.compile(rf"waiting for the guest of VM sb1 to release .*{image.name}, (\d+) s left")


def test_a_wait_says_for_what_and_how_long_still(vmplug: Vmplug, image: Path) -> None:
    words = waits_for(image)
    with session(vmplug, "detach", "--owner", "c1", "--timeout", "60", columns=200) as run:
        first = run.wait_for(lambda screen: bool(words.search(screen.text)))
        left_s = [int(words.findall(first.text)[0])]

        def is_later(screen: Screen) -> bool:
            return any(int(found) < left_s[0] for found in words.findall(screen.text))

        later = run.wait_for(is_later)
    assert 0 < left_s[0] <= 60
    assert len(first.rows) == len(later.rows) == 1  # one line, which is written again


@pytest.mark.parametrize("timeout", ["1e18", "inf"])
def test_a_wait_may_be_longer_than_anything_can_wait(
    vmplug: Vmplug, vm: MemoryVm, image: Path, timeout: str
) -> None:
    words = re.compile(f"waiting for the guest of VM sb1 to release .*{image.name}")
    with session(vmplug, "detach", "--owner", "c1", "--timeout", timeout, columns=200) as run:
        run.wait_for(lambda screen: bool(words.search(screen.text)))
        vm.machine.wake_guest()
        screen, status = run.end()
    assert status == 0, screen.text


def test_a_wait_that_is_over_leaves_no_line(vmplug: Vmplug, vm: MemoryVm, image: Path) -> None:
    words = waits_for(image)
    with session(vmplug, "detach", "--owner", "c1", "--timeout", "60", columns=200) as run:
        run.wait_for(lambda screen: bool(words.search(screen.text)))
        vm.machine.wake_guest()
        screen, status = run.end()
    assert status == 0
    assert "waiting" not in screen.text
    assert len(screen.rows) == 1
    assert screen.rows[0].startswith("detached ")


def test_a_wait_fits_on_one_line_of_a_narrow_terminal(vmplug: Vmplug, image: Path) -> None:
    with session(vmplug, "detach", "--owner", "c1", "--timeout", "60", columns=40) as run:
        screen = run.wait_for(lambda screen: "s left" in screen.text)
    assert len(screen.rows) == 1
    assert screen.rows[0].startswith("waiting for ")


def test_a_terminal_that_knows_no_escapes_is_told_once(vmplug: Vmplug, image: Path) -> None:
    words = waits_for(image)
    asked = ("detach", "--owner", "c1", "--timeout", "2")
    with session(vmplug, *asked, columns=200, env={"TERM": "dumb"}) as run:
        screen, status = run.end()
    assert status == 5
    assert len(words.findall(screen.text)) == 1
    assert "did not release" in screen.text


class PlainTerminal(io.StringIO):
    """A terminal that knows no escapes."""

    def isatty(self) -> bool:
        return True

    def wait_for(self, line: str) -> None:
        """Until it has been told this."""
        wait_until(lambda: line in self.getvalue(), f"line: {line}")


def test_such_a_terminal_is_told_once_too_when_another_wait_comes_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = PlainTerminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("vmplug.cli.progress._PATIENCE_S", 0.001)
    monkeypatch.setattr("vmplug.cli.progress._STEP_S", 0.001)
    with progress("counting"), waiting("a lock", 60):
        terminal.wait_for("waiting for a lock")
        for answer in "first", "second":
            with waiting(f"the {answer} answer", 60):
                terminal.wait_for(f"waiting for the {answer} answer")
            time.sleep(0.02)
    said = [line.partition(",")[0] for line in terminal.getvalue().splitlines()]
    lines = ["waiting for a lock", "waiting for the first answer", "waiting for the second answer"]
    assert [line for line in said if line != "counting"] == lines


def test_a_pipe_is_told_of_no_wait(vmplug: Vmplug, image: Path) -> None:
    stderr = vmplug("detach", "--owner", "c1", "--timeout", "0.5").stderr
    assert "waiting" not in stderr
    assert stderr.startswith("vmplug: the guest did not release ")


def test_a_wait_within_a_wait_is_shown_until_it_is_over() -> None:
    told: list[tuple[str, bool]] = []

    class Hearer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((vars(record)["wait_for"], "waited_s" in vars(record)))

    log, hearer = logging.getLogger("vmplug.waiting"), Hearer()
    log.addHandler(hearer)
    log.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyError), waiting("a lock", 10), waiting("an answer", 1):
            raise KeyError
    finally:
        log.setLevel(logging.NOTSET)
        log.removeHandler(hearer)
    assert told == [("a lock", False), ("an answer", False), ("an answer", True), ("a lock", True)]


def test_progress_in_a_pipe_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("counting"):
        pass
    assert capfd.readouterr() == ("", "")


# Ctrl-C


def test_ctrl_c_in_a_wait_says_what_is_left_and_what_finishes_it(
    vmplug: Vmplug, vm: MemoryVm, image: Path
) -> None:
    words = waits_for(image)
    with session(vmplug, "detach", "--owner", "c1", "--timeout", "60", columns=200) as run:
        run.wait_for(lambda screen: bool(words.search(screen.text)))
        run.interrupt()
        screen, status = run.end()
    assert status == 130
    assert screen.rows == (
        f"vmplug: interrupted: {image} is still in VM sb1, which was asked to release it",
        "hint: the same command again, or vmplug reconcile, finishes it",
    )
    assert screen.colour_of("vmplug:") == "red"
    (hold,) = vmplug("list", "--json").json()["attachments"]
    assert hold["state"] == "detaching"
    vm.machine.wake_guest()
    assert vmplug("detach", "--owner", "c1").answer().startswith("detached ")


def test_ctrl_c_is_one_error_in_json(vmplug: Vmplug, image: Path) -> None:
    asked = ("detach", "--owner", "c1", "--timeout", "60", "--json")
    with session(vmplug, *asked, columns=2000, env={"TERM": "dumb"}) as run:
        run.wait_for(lambda screen: "waiting for the guest" in screen.text)
        run.interrupt()
        screen, status = run.end()
    assert status == 130
    error = json.loads("".join(screen.text.partition('{"version"')[1:]))["error"]
    assert error["code"] == "interrupted"
    assert error["message"].startswith(f"interrupted: {image} is still in VM sb1")
    assert "vmplug reconcile" in error["hint"]


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (State.PLUGGING, "/dev/sdb may be plugged into VM sb1 in part"),
        (State.DETACHING, "/dev/sdb is still in VM sb1, which was asked to release it"),
        (State.ATTACHED, None),
    ],
)
def test_what_is_half_done_is_in_the_journal(
    vmplug: Vmplug, state: State, what: str | None
) -> None:
    setup = Setup(state_dir=vmplug.state_dir)
    vmplug.state_dir.mkdir(0o700)
    assert list_unfinished(setup=setup) == []
    assert not any(vmplug.state_dir.iterdir())
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record())
        device = device_record("block:8:16", "/dev/sdb")
        if state is State.PLUGGING:
            journal.add_devices([device_record("block:8:16", "/dev/sdb", state=state)], [])
        else:
            attach_row(journal, device)
            if state is not State.ATTACHED:
                journal.set_state([device.id], state)
    found = list_unfinished(setup=setup)
    assert [one.what for one in found] == ([what] if what else [])
    assert all("vmplug reconcile" in one.hint for one in found)


# -v


def test_v_shows_each_qmp_command(vmplug: Vmplug, vm: MemoryVm, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    asked = ("attach", "-d", f"file:{image}", "--vm", "sb1", "--owner", "c1")
    vm.machine.sent.clear()
    done = vmplug(*asked, "-v")
    assert done.status == 0
    sent = [(command.execute, dict(command.arguments)) for command in vm.machine.sent]
    shown = shown_commands(done.stderr)
    assert [execute for execute, _ in shown] == [execute for execute, _ in sent]
    # QEMU is not sent what are its defaults; a person sees all.
    assert all(has(one, other) for (_, one), (_, other) in zip(shown, sent, strict=True))
    assert "device_add" in dict(sent)
    assert "QMP" not in done.stdout
    assert "QMP" not in vmplug("detach", "--owner", "c1").stderr


def has(whole: object, part: object) -> bool:
    """Whether `whole` has all that `part` has, at every depth."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and has(whole[key], value) for key, value in part.items())
    return whole == part


def shown_commands(stderr: str) -> list[tuple[str, dict[str, object]]]:
    """The commands in lines such as ` 0.123  QMP device_del {"id": "a"}`."""
    found = re.findall(r"^ *\d+\.\d{3}  QMP (\S+) (\{.*\})$", stderr, re.MULTILINE)
    return [(execute, json.loads(arguments)) for execute, arguments in found]


def test_v_says_how_long_a_wait_was(vmplug: Vmplug, image: Path) -> None:
    done = vmplug("detach", "--owner", "c1", "--timeout", "1", "--verbose")
    assert re.search(r"  waited \d+\.\d s for the guest of VM sb1 to release ", done.stderr)


def test_v_is_grey_and_above_what_a_wait_shows(vmplug: Vmplug, image: Path) -> None:
    asked = ("detach", "--owner", "c1", "--timeout", "60", "-v")
    words = waits_for(image)
    with session(vmplug, *asked, columns=200) as run:
        screen = run.wait_for(lambda screen: any(map(words.search, screen.rows[-1:])))
    assert any("QMP device_del" in row for row in screen.rows[:-1])
    assert not any("waiting" in row for row in screen.rows[:-1])


def test_v_shows_each_write_to_sysfs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    attribute = tmp_path / "driver_override"
    attribute.write_text("")
    with hearing(StepPrinter().hear):
        assert THIS_HOST.write_attribute(str(attribute), "vfio-pci") is None
    assert f"write 'vfio-pci' to {attribute}" in capfd.readouterr().err
    assert attribute.read_text() == "vfio-pci"


@pytest.mark.parametrize("verb", ["attach", "bind", "list", "vm start", "vm list"])
def test_every_verb_has_it(vmplug: Vmplug, verb: str) -> None:
    shown = vmplug(*verb.split(), "--help").answer()
    assert re.search(r"-v, --verbose +Show on stderr each write to\s+sysfs and each\s+QMP", shown)
    assert shown.count("--verbose") == 1
