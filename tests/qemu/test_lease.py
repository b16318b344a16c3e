"""A QEMU that vmplug did not start, with devices that vmplug leased to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.support.disks import disk_image

pytestmark = pytest.mark.qemu
EXAMPLE = Path(__file__).parents[2] / "examples/lease.py"
PLAIN = ("-machine", "q35,accel=tcg", "-m", "64", "-S")


def test_the_example_says_what_happens(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "leased")
    done = subprocess.run(
        [sys.executable, EXAMPLE, image, tmp_path / "state", *PLAIN],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        "QEMU runs: True",
        f"{image} is held by {PROGRAM}",
        f"job-18 is refused: /dev/xvda: {image} is held by lease job-17",
        "leases left: 0",
    ]


PROGRAM = "qemu-system-x86"
"""The kernel keeps 15 characters of a program's name."""


def test_qemu_locks_the_disk_itself_where_the_lease_does_not(tmp_path: Path) -> None:
    """By its path: a lease never shuts out its own VMM."""
    image = disk_image(tmp_path / "a.img", 2, "leased")
    vmplug = Vmplug(tmp_path / "state")
    words = ("qemu-system-x86_64", "-nodefaults", "-display", "none", *PLAIN, "-qmp", "stdio")
    node = '{"driver":"raw","node-name":"d0","file":{"driver":"file","filename":"%s"}}'
    node %= "{block.host_path}"
    quit_it = '{"execute":"qmp_capabilities"}{"execute":"quit"}'
    done = vmplug.as_process(
        *("lease", "--device", f"file:{image}", "--"),
        *(*words, "-blockdev", node, "-device", "virtio-blk-pci,drive=d0"),
        stdin=quit_it,
    )
    assert (done.stderr, done.status) == ("", 0)
    assert '"QMP"' in done.stdout
    assert vmplug("lease", "list").answer() == "nothing is leased\n"


def test_the_command_has_its_devices_by_words_that_vmplug_writes(tmp_path: Path) -> None:
    """Behind and before other words; QEMU says which disks it has."""
    image = disk_image(tmp_path / "a, b.img", 2, "leased")
    vmplug = Vmplug(tmp_path / "state")
    asked = '{"execute":"qmp_capabilities"}{"execute":"query-block"}{"execute":"quit"}'
    done = vmplug.as_process(
        *("lease", "--device", f"file:{image}", "--device", "rng", "--"),
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "{qemu-args}"),
        *(*PLAIN, "-qmp", "stdio"),
        stdin=asked,
    )
    assert (done.stderr, done.status) == ("", 0)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    (blocks,) = [answer["return"] for answer in answers if answer.get("return")]
    (node,) = [block["inserted"] for block in blocks if "inserted" in block]
    assert node["image"]["virtual-size"] == 2 << 20
    assert node["file"].startswith("/dev/fdset/")
    assert vmplug("lease", "list").answer() == "nothing is leased\n"


def test_locks_of_the_lease_shut_out_a_qemu_that_takes_its_own(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "leased")
    vmplug = Vmplug(tmp_path / "state")
    node = '{"driver":"raw","node-name":"d0","file":{"driver":"file","filename":"%s"%s}}'
    for locking, status in (("", 1), (',"locking":"off"', 0)):
        done = vmplug.as_process(
            *("lease", "--device", f"file:{image}", "--lock", "full", "--"),
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", *PLAIN, "-qmp", "stdio"),
            *("-blockdev", node % ("{block.host_path}", locking)),
            *("-device", "virtio-blk-pci,drive=d0"),
            stdin='{"execute":"qmp_capabilities"}{"execute":"quit"}',
        )
        assert done.status == status, done
    assert os.listdir(tmp_path / "state")
    assert vmplug("lease", "list").answer() == "nothing is leased\n"
