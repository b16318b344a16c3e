"""What could grow: everything that QEMU, this process and the journal hold, as numbers."""

import gc
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import connect

from tests.contract.world import journal_rows, qemu_parts
from tests.support.vm import GuestVm

MIB = 1 << 20

MAY_GROW = {
    "qemu_rss_bytes": 12 * MIB,
    "own_rss_bytes": 6 * MIB,
    "qemu_descriptors": 1,  # a conversation lasts a moment: it is measured or not
    "own_descriptors": 2,
    "own_objects": 2000,
    "journal_bytes": 64 << 10,
    "wal_bytes": 5 * MIB,
}
"""Where one measurement differs from the next; everything else must stay what it was.

SQLite writes its log back every 1000 pages, which are 4 MiB. Source: sqlite.org/wal.html.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One measurement; `own` is of this process."""

    qemu_devices: int
    qemu_objects: int
    qemu_nodes: int
    qemu_chardevs: int
    qemu_fdsets: int
    qemu_descriptors: int
    qemu_rss_bytes: int
    own_descriptors: int
    own_threads: int
    own_objects: int
    own_rss_bytes: int
    journal_rows: int
    journal_bytes: int
    wal_bytes: int


def measure(vm: GuestVm, state_dir: Path) -> Figures:
    """Everything now."""
    gc.collect()
    parts = qemu_parts(vm)
    journal = state_dir / "journal.db"
    return Figures(
        qemu_devices=len(parts.devices),
        qemu_objects=len(parts.objects),
        qemu_nodes=len(parts.nodes),
        qemu_chardevs=len(parts.chardevs),
        qemu_fdsets=len(vm.oracle.execute("query-fdsets")),
        qemu_descriptors=_descriptors(vm.pid),
        qemu_rss_bytes=_rss_bytes(vm.pid),
        own_descriptors=_descriptors(os.getpid()),
        own_threads=len(os.listdir("/proc/self/task")),
        own_objects=len(gc.get_objects()),
        own_rss_bytes=_rss_bytes(os.getpid()),
        journal_rows=sum(len(rows) for rows in journal_rows(state_dir).values()),
        journal_bytes=journal.stat().st_size,
        wal_bytes=_size(journal.with_name("journal.db-wal")),
    )


def grown(before: Figures, after: Figures) -> Mapping[str, tuple[int, int]]:
    """What has grown by more than measurements differ: what it was, and what it is."""
    was, now = asdict(before), asdict(after)
    return {
        name: (was[name], now[name])
        for name in was
        if now[name] - was[name] > MAY_GROW.get(name, 0)
    }


def table(title: str, columns: Mapping[str, Figures]) -> Iterator[str]:
    """The measurements side by side."""
    yield f"{title:24}" + "".join(f"{name:>16}" for name in columns)
    rows = [asdict(figures) for figures in columns.values()]
    for name in rows[0]:
        is_memory = name.endswith("_bytes")
        values = [f"{row[name] / MIB:.2f} MiB" if is_memory else str(row[name]) for row in rows]
        words = name.removesuffix("_bytes").replace("_", " ")
        yield f"{words:24}" + "".join(f"{value:>16}" for value in values)


def is_whole(state_dir: Path) -> bool:
    """Whether SQLite finds nothing wrong with the journal."""
    with closing(connect(state_dir / "journal.db")) as db:
        found: list[tuple[str]] = db.execute("PRAGMA integrity_check").fetchall()
    return found == [("ok",)]


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _rss_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s*([0-9]+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) << 10


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
