"""A `vmplug watch` that runs beside a test, which reads what it tells."""

import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.cli.command import Vmplug
from tests.support.journal import attach_row, device_record, vm_record
from vmplug.journal.journal import Journal

DEADLINE_S = 60.0


class Watching:
    """A `vmplug watch --json` that runs; every line has a deadline."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self.process = process
        self._stdout = process.stdout
        self._received = b""

    def next(self) -> dict[str, Any]:
        """The next notice."""
        while b"\n" not in self._received:
            ready = select.select([self._stdout], [], [], DEADLINE_S)[0]
            assert ready, "nothing is told"
            data = os.read(self._stdout.fileno(), 1 << 16)
            assert data, "it has ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        notice: dict[str, Any] = json.loads(line)
        assert notice.pop("version") == 1
        return notice

    def events(self, count: int) -> list[tuple[str, str | None]]:
        """What happened to which attachment, of the next so many."""
        notices = [self.next() for _ in range(count)]
        return [(n["event"], n["attachment"] and n["attachment"]["id"]) for n in notices]

    def catch_up(self, vmplug: Vmplug) -> None:
        """Returns when it has looked at all that the journal holds now.

        It tells of an attachment whose file was never there, made for this.
        """
        with Journal.open(vmplug.state_dir) as journal:
            journal.add_vm(vm_record("marker"))
            hold = attach_row(journal, device_record("file:/no/such", "/no/such", vm="marker"))
            assert self.events(1) == [("deleted", hold.id)]
            journal.forget_vm("marker")


@contextmanager
def watching(vmplug: Vmplug) -> Iterator[Watching]:
    """It watches when this is entered."""
    process = vmplug.begin("watch", "--json")
    try:
        made = Watching(process)
        made.catch_up(vmplug)
        yield made
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)
