"""A second reader of everything that a refused command must leave as it was."""

import os
from collections.abc import Iterable
from contextlib import suppress
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
    """Each loop device on a file below `directory`: its node, file, offset, whether read-only.

    None is opened: one that somebody has open is not free when another test detaches it.
    """
    found = set()
    for loop in Path("/sys/block").glob("loop*/loop"):
        with suppress(OSError):  # it was just detached
            paths = (loop / "backing_file", loop / "offset", loop.with_name("ro"))
            found.add((loop.parent.name, *(path.read_text().rstrip("\n") for path in paths)))
    return frozenset(each for each in found if each[1].startswith(f"{directory}/"))


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
    there = processes_below(directory)
    keepers = find_marked(KEEPER_MARK)  # looked for later: its dd is a new one now and then
    still_there = processes_below(directory)
    return [pid for pid in there if pid not in keepers and pid in still_there]
