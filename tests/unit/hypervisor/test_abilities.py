"""What a QEMU can do is asked of it; here of programs that answer as one does, or do not."""

import json
from pathlib import Path

import pytest

from vmplug.errors import HypervisorError, ProtocolError
from vmplug.host import program
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.hypervisor.qemu.abilities import has_firmware, of_program

PROGRAM = "qemu-system-x86_64"
GREETING: dict[str, object] = {"QMP": {"version": {}, "capabilities": []}}
BYE = {"event": "SHUTDOWN", "data": {"guest": False}}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program is looked for first."""
    monkeypatch.setattr(program, "PROGRAM_PATH", f"{tmp_path}:{program.PROGRAM_PATH}")
    return tmp_path


def install(directory: Path, script: str) -> None:
    file = directory / PROGRAM
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def answering(answer: object) -> str:
    """A script that writes down what it is asked, and gives this answer."""
    said = [GREETING, {"return": {}}, {"return": answer}, BYE, {"return": {}}]
    lines = "\n".join(json.dumps(line) for line in said)
    return f"cat >$(dirname $0)/asked\ncat <<'END'\n{lines}\nEND"


@pytest.mark.parametrize("names", [["reconnect"], ["reconnect", "reconnect-ms"], []])
def test_the_program_says_which_options_a_chardev_has(directory: Path, names: list[str]) -> None:
    option = {"option": "chardev", "parameters": [{"name": name} for name in ["path", *names]]}
    install(directory, answering([option]))
    assert of_program(PROGRAM).reconnect_ms == ("reconnect-ms" in names)
    asked = [json.loads(line) for line in (directory / "asked").read_text().splitlines()]
    assert asked[1] == {
        "execute": "query-command-line-options",
        "arguments": {"option": "chardev"},
    }
    assert [command["execute"] for command in (asked[0], asked[2])] == ["qmp_capabilities", "quit"]


@pytest.mark.parametrize("types", [[], [{"name": "iommufd", "parent": "object"}]])
def test_the_program_says_whether_it_has_iommufd(directory: Path, types: list[object]) -> None:
    install(directory, answering(types))
    assert of_program(PROGRAM).iommufd == bool(types)


@pytest.mark.parametrize("names", [["host"], ["host", "vf-token"]])
def test_the_program_says_whether_a_device_takes_a_vf_token(
    directory: Path, names: list[str]
) -> None:
    install(directory, answering([{"name": name, "type": "str"} for name in names]))
    assert of_program(PROGRAM).vf_token == ("vf-token" in names)


def test_nothing_is_asked_before_it_is_needed(directory: Path) -> None:
    install(directory, "exit 1")
    of_program(PROGRAM)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no memory >&2; exit 1", "no memory"),
        ("exit 1", "ended with status 1"),
        ("cat >/dev/null; echo hello", "ended with status 0"),
        ("exec true", "ended with status 0"),
    ],
)
def test_a_program_that_does_not_answer_is_told(directory: Path, script: str, words: str) -> None:
    install(directory, script)
    with pytest.raises(HypervisorError) as told:
        _ = of_program(PROGRAM).reconnect_ms
    assert str(told.value).startswith(f"{PROGRAM} does not report its abilities: ")
    assert words in str(told.value)


def test_a_program_that_is_not_there_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "PROGRAM_PATH", str(tmp_path))
    with pytest.raises(HypervisorError) as told:
        _ = of_program(PROGRAM).iommufd
    assert f"the program {PROGRAM} is not installed" in str(told.value)
    assert told.value.hint == "on Debian: apt install qemu-system-x86"


def test_an_answer_of_another_shape_is_refused(directory: Path) -> None:
    install(directory, answering([{"parameters": "reconnect-ms"}]))
    with pytest.raises(ProtocolError):
        _ = of_program(PROGRAM).reconnect_ms


@pytest.mark.parametrize(("name", "is_there"), [("qboot.rom", True), ("other.rom", False)])
def test_firmware_is_looked_for_where_the_program_does(
    directory: Path, name: str, *, is_there: bool
) -> None:
    (directory / "qboot.rom").touch()
    install(directory, f"[ $1 = -L ] && [ $2 = help ] && echo /nowhere && echo {directory}")
    assert has_firmware(PROGRAM, name) == is_there


def test_a_program_that_is_not_there_has_no_firmware() -> None:
    assert not has_firmware("no-such-qemu", "qboot.rom")


def test_an_ability_is_asked_for_once() -> None:
    memory = FakeHypervisor()
    memory.monitor.iommufd = True
    for _ in range(2):
        assert memory.abilities.reconnect_ms
        assert memory.abilities.iommufd
        assert not memory.abilities.vf_token
    assert [command.execute for command in memory.monitor.sent] == [
        "query-command-line-options",
        "qom-list-types",
        "device-list-properties",
    ]
