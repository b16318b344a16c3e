"""Text that a tenant chose arrives as it is, or is refused: never as an option, a line, a colour.

Names of devices, files, tags, owners and values of options go through the terminal, the journal,
QMP and QEMU's command line.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Result, Vmplug, config, first_in_path
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image

NAMES = (
    "a,b=c,readonly=off",
    "a,,b",
    "-o",
    "--help",
    "a'b\"c`d",
    "$(touch pwned);${HOME}|&",
    "%s%n%(x)s{0}",
    "new\nline: ok, may be handed over",
    "\x1b[2J\x1b]0;title\x07",
    "tab\tcr\rbs\x08del\x7f",
    "c1\x9b31m",
    "bidi\u202egmi.\u2066",
    "zero\u200bwidth\ufeff",
    'json"},{"x":\\',
    "é\U0001f525",
)
"""None has a '/', and each is what a file may be called."""

TAGS = tuple(name for name in NAMES if name.isprintable())
CHARS = "".join(chr(code) for code in (*range(0x20), 0x7F, *range(0x80, 0xA0), 0x202E, 0x2066))


def shown(done: Result) -> str:
    """What reached the terminal; nothing in it moves a cursor or ends a line too early."""
    text = done.stdout + done.stderr
    assert not set(text) & (set(CHARS) - {"\n"}), repr(text)
    assert "a bug of vmplug" not in text
    return text


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for index, name in enumerate(NAMES):
        disk_image(tmp_path / name, 1, f"disk {index}")
        (tmp_path / "shares" / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def vm(vmplug: Vmplug) -> Iterator[MemoryVm]:
    socket = vmplug.state_dir.with_name("qmp.sock")
    with MemoryVm(socket, root_ports=len(NAMES)) as made:
        vmplug("vm", "adopt", "sb1", "--qmp", socket).answer()
        yield made


def files(directory: Path) -> list[str]:
    """Requests for all disks, on the command line."""
    words = (("--device", f"file:{directory / name}:/dev/{name}") for name in NAMES)
    return [word for pair in words for word in pair]


def asked(directory: Path) -> str:
    """A bundle that has them wherever a bundle has text."""
    devices = [{"path": f"/dev/{n}", "type": "c", "major": 1, "minor": 3} for n in NAMES]
    mounts: list[Mapping[str, object]] = [
        {"destination": f"/m/{n}", "source": str(directory / n)} for n in NAMES
    ]
    shares = {
        f"org.vmplug.share.{tag}": json.dumps({"source": str(directory / "shares" / tag)})
        for tag in TAGS
        if len(tag.encode()) <= 36
    }
    return config(*devices, mounts=mounts, annotations=shares | {name: name for name in NAMES})


@pytest.mark.parametrize("verb", ["info", "resolve", "check"])
def test_no_verb_that_reads_is_moved_by_a_name(vmplug: Vmplug, directory: Path, verb: str) -> None:
    text = shown(vmplug(verb, "-", stdin=asked(directory)))
    assert "\\x1b[2J" in text
    assert "\\nline" in text
    lines = [line for line in text.splitlines() if "may be handed over" in line]
    assert not any(line.startswith("line:") for line in lines)
    told = json.loads(vmplug(verb, "-", "--json", stdin=asked(directory)).stdout)
    names = {found["container_path"] for found in told.get("devices", [])}
    if verb != "check":
        assert names >= {f"/dev/{name}" for name in NAMES}


REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a NUL in a path", {"devices": [("/dev/a\0b", "c")]}),
    ("a type that is none", {"devices": [("/dev/a", "\x1b[31m\n")]}),
    ("a tag of two lines", {"annotations": {"org.vmplug.share.a\nb": '{"source": "/srv"}'}}),
    ("a tag with a colour", {"annotations": {"org.vmplug.share.\x1b[1m": '{"source": "/srv"}'}}),
    ("a kind that is none", {"annotations": {"org.vmplug.\x1b[1m\n.x": "{}"}}),
    ("no JSON", {"annotations": {"org.vmplug.rng.a": "\x1b[1m\n\u202e"}}),
    ("an option", {"annotations": {"org.vmplug.rng.a": '{"max-\\u001b\\nbytes": 1}'}}),
    ("a value", {"annotations": {"org.vmplug.rng.a": '{"max-bytes": "\\u001b[1m\\n"}'}}),
    ("a NUL in a source", {"annotations": {"org.vmplug.share.a": '{"source": "/a\\u0000b"}'}}),
    ("a source that is none", {"annotations": {"org.vmplug.rng.a": '{"source": "/\\u001b\\n"}'}}),
    ("half a character", {"annotations": {"org.vmplug.rng.a": '{"source": "/\\ud800"}'}}),
)


@pytest.mark.parametrize(("what", "parts"), REFUSED, ids=[what for what, _ in REFUSED])
def test_what_is_refused_is_told_in_one_line(
    vmplug: Vmplug, what: str, parts: dict[str, Any]
) -> None:
    devices = [
        {"path": path, "type": kind, "major": 1, "minor": 3}
        for path, kind in parts.get("devices", [])
    ]
    text = config(*devices, annotations=parts.get("annotations", {}))
    done = vmplug("check", "-", stdin=text)
    assert done.status in {3, 4}, what
    assert len(shown(done).splitlines()) <= 2


def test_half_a_character_is_no_text_of_a_spec(vmplug: Vmplug) -> None:
    """JSON can write it, and UTF-8, which QMP, the journal and the kernel's paths are in, not."""
    for text in ('{"annotations": {"org.vmplug.rng.\\udc80": "{}"}}', '{"mounts": "\\ud800"}'):
        done = vmplug("check", "-", stdin=text)
        assert done.status == 3
        shown(done)


def test_names_reach_the_journal_as_they_are_and_qmp_not_at_all(
    vmplug: Vmplug, vm: MemoryVm, directory: Path
) -> None:
    owner = "own,er\x1b[1m\n$(x)"
    words = ("--vm", "sb1", "--owner", owner)
    plan = shown(vmplug("plan", *files(directory), *words))
    assert len(plan.splitlines()) == 2 * 2 * len(NAMES)
    shown(vmplug("attach", *files(directory), *words))
    opened = {node["file"]["filename"] for node in vm.machine.nodes.values()}
    assert {os.path.dirname(name) for name in opened} == {"/dev/fdset"}
    shown(vmplug("list"))
    held = vmplug("list", "--json").json()["attachments"]
    assert {hold["container_path"] for hold in held} == {f"/dev/{name}" for name in NAMES}
    assert {hold["owner"] for hold in held} == {owner}
    for word in ("%", "own*", "own,er"):
        assert vmplug("detach", "--owner", word).status == 6
    assert vmplug("list", "--json").json()["attachments"] == held
    shown(vmplug("detach", "--owner", owner))
    assert not vm.machine.nodes


@pytest.fixture
def arguments(directory: Path) -> Path:
    """A program in QEMU's place that notes its arguments and what it has open, and ends."""
    programs = directory / "bin"
    programs.mkdir()
    fake = programs / "qemu-system-x86_64"
    note = f"printf '%s\\0' \"$@\" > {directory}/arguments"  # of a start, not of a question
    opened = f"readlink -z /proc/$$/fd/* > {directory}/opened"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *-kernel*) {note}; {opened} ;; esac\nexit 1\n')
    fake.chmod(0o755)
    return directory / "arguments"


def test_names_reach_qemus_command_line_as_they_are(
    vmplug: Vmplug, directory: Path, arguments: Path
) -> None:
    shares = [
        word
        for index, name in enumerate(NAMES)
        for word in ("--device", f"share:{directory / 'shares' / name}:tag{index}")
    ]
    path = first_in_path(directory / "bin")
    kernel = directory / NAMES[0]
    words = ("--kernel", kernel, "--append", NAMES[7], "--owner", "c1", "--ports", "20")
    for devices in (files(directory), [*shares, "-o", "filesystem=virtio-9p"]):
        is_share = devices != files(directory)
        done = vmplug("vm", "start", "sb1", *words, *devices, env=path)
        assert done.status == 5, done
        shown(done)
        said = arguments.read_bytes().decode().split("\0")
        assert said[said.index("-kernel") + 1] == str(kernel)
        assert said[said.index("-append") + 1] == NAMES[7]
        opened = arguments.with_name("opened").read_bytes().decode().split("\0")
        below = directory / "shares" if is_share else directory
        # QEMU inherits the directories, and is told no name of theirs.
        texts = opened if is_share else json_values(said)
        assert {str(below / name) for name in NAMES} <= set(texts)
        for word in said:
            if is_share or not word.startswith("{"):
                assert str(below) not in word or word == str(kernel)
    assert not list(directory.glob("**/pwned"))
    assert not Path("pwned").exists()


def json_values(words: list[str]) -> list[str]:
    """Every text in arguments that are JSON."""
    found: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, str):
            found.append(value)

    for word in words:
        if word.startswith("{"):
            walk(json.loads(word))
    return found
