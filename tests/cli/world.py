"""A second reader of everything that a refused command must leave as it was."""

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.contract.world import Rows, journal_rows
from tests.support.raw_qmp import RawQmp
from vmplug.host.process import find_marked
from vmplug.hypervisor.keeper import KEEPER_MARK


@dataclass(frozen=True, slots=True)
class Picture:
    """The journal's rows, the names in each VM, the loop devices on files below a directory."""

    rows: Rows
    names: tuple[frozenset[str], ...]
    loops: frozenset[tuple[str, ...]] = frozenset()


def take_picture(state_dir: Path, vms: Iterable[RawQmp], images: Path) -> Picture:
    """All of that now."""
    names = tuple(names_in_qemu(vm) for vm in vms)
    return Picture(journal_rows(state_dir), names, loops_below(images))


def names_in_qemu(oracle: RawQmp) -> frozenset[str]:
    """Everything in a QEMU that has a name: devices, block nodes, objects."""
    nodes = oracle.execute("query-named-block-nodes", flat=True)
    names = {node["node-name"] for node in nodes}
    for path in ("/machine/peripheral", "/objects"):
        entries = oracle.execute("qom-list", path=path)
        names |= {entry["name"] for entry in entries if entry["type"].startswith("child<")}
    return frozenset(names)


def loops_below(directory: Path) -> frozenset[tuple[str, ...]]:
    """Each loop device on a file below `directory`: its node, file, offset, whether read-only."""
    columns = "NAME,BACK-FILE,OFFSET,RO"
    command = ["losetup", "--list", "--json", "--output", columns]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    loops = json.loads(listed)["loopdevices"] if listed else []
    found = [tuple(str(value) for value in loop.values()) for loop in loops]
    return frozenset(loop for loop in found if loop[1].startswith(f"{directory}/"))


def processes_below(directory: Path) -> list[int]:
    """The processes that work in a directory below `directory`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            working_directory = os.readlink(f"/proc/{pid}/cwd")
        except OSError:  # it has ended, or is somebody else's
            continue
        if working_directory.startswith(f"{directory}/"):
            found.append(int(pid))
    return found


def qemus_below(directory: Path) -> list[int]:
    """Those of them that are not the keeper of a VM's console."""
    keepers = find_marked(KEEPER_MARK)
    return [pid for pid in processes_below(directory) if pid not in keepers]
