"""Who plugs the same device meanwhile is waited for, as long as somebody does."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.unit.journal.test_journal import DISK, SCSI_DISK, hold
from vmplug.errors import StateError
from vmplug.journal.journal import Journal
from vmplug.journal.state import State, on_its_way
from vmplug.manager.commit import plan_and_journal
from vmplug.manager.plan import Plan


class PlannedAgain(Exception):
    """The plan was made anew after a wait."""


@pytest.mark.parametrize("is_one_alive", [True, False])
def test_a_device_that_plugs_is_waited_for_while_any_process_plugs(
    tmp_path: Path, *, is_one_alive: bool
) -> None:
    plans = 0

    def plan_now() -> Plan:
        nonlocal plans
        plans += 1
        if plans > 1:
            raise PlannedAgain
        raise on_its_way(DISK.vm, DISK.host_path, State.PLUGGING)

    with Journal.open(tmp_path) as journal:
        own = journal.worker
        ended = replace(own, boot_id="an-earlier-boot")
        for device, worker in ((SCSI_DISK, ended), (DISK, own if is_one_alive else ended)):
            journal.worker = worker
            journal.add_devices([replace(device, state=State.PLUGGING)], [hold(device)])
        with pytest.raises(PlannedAgain if is_one_alive else StateError):
            plan_and_journal(plan_now, journal, nullcontext(), vm=DISK.vm)
