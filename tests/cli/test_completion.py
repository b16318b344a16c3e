"""What <Tab> offers; bash itself is asked at a terminal, as it splits words at ':' and '='."""

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import VMPLUG, Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image

PATIENCE_S = 60.0


def offered(vmplug: Vmplug, line: str) -> list[str]:
    """The words that <Tab> offers at the end of a line."""
    asked = {"_VMPLUG_COMPLETE": "bash_complete", "COMP_WORDS": line}
    shown = vmplug(env=asked)
    assert (shown.stderr, shown.status) == ("", 0)
    return [entry.partition(",")[2] for entry in shown.stdout.splitlines() if entry]


def test_cdi_names_are_offered_as_devices(vmplug: Vmplug, tmp_path: Path) -> None:
    policy, specs = tmp_path / "policy.toml", tmp_path / "cdi"
    specs.mkdir()
    edits = {"deviceNodes": [{"path": "/dev/null"}]}
    devices = [{"name": name, "containerEdits": edits} for name in ("a", "b:c")]
    spec = {"cdiVersion": "0.5.0", "kind": "vendor.com/disk", "devices": devices}
    (specs / "a.json").write_text(json.dumps(spec))
    policy.write_text(f'[cdi]\ndirectories = ["{specs}"]\n')
    policy.chmod(0o600)
    names = ["vendor.com/disk=a", "vendor.com/disk=b:c"]
    line = f"vmplug check --policy {policy} --device "
    assert offered(vmplug, f"{line}vendor") == names
    assert set(offered(vmplug, line)) >= {*names, "vfio:"}
    policy.write_text("[cdi]\ndirectories = []\n")
    assert offered(vmplug, f"{line}vendor") == []
    policy.write_text("wrong")
    assert offered(vmplug, f"{line}vendor") == []


@pytest.fixture
def holds(vmplug: Vmplug, tmp_path: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Attachments by their owners: two of one device, and one in another VM."""
    image, other = (str(disk_image(tmp_path / name, 1, name)) for name in ("a.img", "b.img"))
    sockets = {name: vmplug.state_dir.with_name(f"{name}.sock") for name in ("sb1", "sb2")}
    with MemoryVm(sockets["sb1"]), MemoryVm(sockets["sb2"]):
        for name, socket in sockets.items():
            vmplug("vm", "adopt", name, "--qmp", socket).answer()
        asked = (("ctr1", "sb1", image), ("ctr2", "sb1", image), ("other", "sb2", other))
        yield {
            owner: vmplug(
                *("attach", "-d", f"file:{path}", "--vm", vm, "--owner", owner, "--json")
            ).json()["attachments"][0]
            for owner, vm, path in asked
        }


def test_ids_of_attachments_and_their_devices_are_offered(
    vmplug: Vmplug, holds: dict[str, dict[str, Any]]
) -> None:
    ids = {owner: hold["id"] for owner, hold in holds.items()}
    rows = vmplug("list", "--json").json()["attachments"]
    devices = {row["device_id"] for row in rows if "device_id" in row}
    for verb in ("detach", "resize"):
        assert set(offered(vmplug, f"vmplug {verb} ")) >= {*ids.values(), *devices}
    assert ids["ctr1"] in offered(vmplug, f"vmplug resize {ids['ctr1'][:4]}")
    again = offered(vmplug, f"vmplug detach {ids['ctr1']} ")
    assert ids["ctr1"] not in again
    assert ids["other"] in again


def test_owners_and_vms_are_offered(vmplug: Vmplug, holds: dict[str, dict[str, Any]]) -> None:
    assert set(offered(vmplug, "vmplug detach --owner ")) == set(holds)
    for line in ("detach --vm sb1 --owner ", "attach --vm sb1 --owner ct"):
        assert offered(vmplug, f"vmplug {line}") == ["ctr1", "ctr2"]
    assert offered(vmplug, "vmplug vm stop ") == ["sb1", "sb2"]


def test_codes_of_allow_are_offered_once(vmplug: Vmplug) -> None:
    assert offered(vmplug, "vmplug check --allow mounted") == ["mounted-on-host"]
    said = offered(vmplug, "vmplug attach --allow mounted-on-host --allow ")
    assert "mounted-on-host" not in said
    refused = vmplug("check", "-d", "b:8:99", "--allow", "all").stderr
    assert {*said, "mounted-on-host"} == set(refused.split("hint: one of ")[1].strip().split(", "))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-o ca", ["cache=", "cache-size="]),
        ("-o cache=w", ["cache=writeback", "cache=writethrough"]),
        ("-d b:8:16 -o ca", ["cache="]),
        ("-d /dev/sdb -o discard=", ["discard=unmap", "discard=ignore"]),
        ("-d share:/srv:a -o ", ["filesystem=", "cache=", "cache-size=", "queue-size="]),
        ("-d share:/srv:a -o cache=n", ["cache=none", "cache=never"]),
        ("-d vfio:3b:00.0 -o rom=", ["rom=on", "rom=off"]),
        ("-d rng -o period=1 -o ", ["max-bytes="]),
        ("-d file:/a.img -o serial=", []),
        ("-o frobnicate=", []),
    ],
)
def test_keys_and_values_of_options_are_offered(
    vmplug: Vmplug, words: str, expected: list[str]
) -> None:
    assert offered(vmplug, f"vmplug attach {words}") == expected


def block_devices() -> set[str]:
    found = set()
    for file in Path("/sys/class/block").glob("*/dev"):
        with suppress(OSError):  # it has just gone
            found.add(f"b:{file.read_text().strip()}")
    return found


def test_devices_are_offered(vmplug: Vmplug) -> None:
    assert offered(vmplug, "vmplug check -d vfi") == ["vfio:"]
    assert offered(vmplug, "vmplug check -d vfio:") == [
        f"vfio:{name}" for name in sorted(os.listdir("/sys/bus/pci/devices"))
    ]
    before = block_devices()
    said, after = set(offered(vmplug, "vmplug check -d b:")), block_devices()
    assert before & after <= said <= before | after  # another's loop device may come or go
    asked = {"_VMPLUG_COMPLETE": "bash_complete"}
    for word, path in (("/dev/sd", "/dev/sd"), ("file:/sr", "/sr"), ("share:/sr", "/sr")):
        line = {**asked, "COMP_WORDS": f"vmplug check -d {word}"}
        assert vmplug(env=line).answer() == f"file,{path}\n"


def test_verbs_of_help_are_offered(vmplug: Vmplug) -> None:
    assert offered(vmplug, "vmplug help vm st") == ["start", "stop"]
    assert offered(vmplug, "vmplug help vm start ") == []


@contextmanager
def bash(environment: dict[str, str]) -> Iterator[int]:
    """An interactive bash that has the script; Ctrl-G prints its line between marks."""
    terminal, end = pty.openpty()
    words = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        words, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True
    ) as shell:
        os.close(end)
        try:
            script = f"source <({VMPLUG} completion bash)"
            bind = """bind -x '"\\C-g": printf "<%s>\\n" "$READLINE_LINE"'"""
            os.write(terminal, f"{script}; {bind}; echo 're'ady\n".encode())
            read_until(terminal, b"ready\r\n")
            yield terminal
        finally:
            shell.kill()
            os.close(terminal)


def read_until(terminal: int, mark: bytes) -> str:
    shown, deadline = b"", time.monotonic() + PATIENCE_S
    while mark not in shown:
        left = deadline - time.monotonic()
        assert left > 0, f"no {mark!r} in {shown!r}"
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown.decode()


def typed(terminal: int, keys: str) -> str:
    """The line of bash after these keys; it is empty afterwards."""
    os.write(terminal, f"{keys}\x07".encode())
    shown = read_until(terminal, b">\r\n")
    os.write(terminal, b"\x15")
    return shown.rpartition("<")[2].partition(">")[0]


@pytest.mark.slow
def test_a_real_bash_completes_words_with_colons_and_equals_signs(vmplug: Vmplug) -> None:
    functions = os.listdir("/sys/bus/pci/devices")
    environment = {**vmplug.environment, "TERM": "dumb", "COLUMNS": "300"}
    with bash(environment) as terminal:
        for keys, line in (
            ("vmplug atta\t", "vmplug attach "),
            ("vmplug attach -o cac\t", "vmplug attach -o cache"),
            ("vmplug attach -o cache=n\t", "vmplug attach -o cache=none "),
            ("vmplug attach --option=cache=n\t", "vmplug attach --option=cache=none "),
            ("vmplug check -d vf\t", "vmplug check -d vfio:"),
            *(
                (f"vmplug check -d vfio:{name}\t", f"vmplug check -d vfio:{name} ")
                for name in functions[:1]
            ),
            ("vmplug check -d file:/etc/hostn\t", "vmplug check -d file:/etc/hostname "),
        ):
            assert typed(terminal, keys) == line
