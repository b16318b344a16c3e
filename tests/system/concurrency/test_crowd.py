"""Many processes, and many threads, at the same VMs."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.world import MemorySide, journal_rows, qemu_parts
from tests.support.disks import disk_image
from tests.support.vm import GuestVm, scsi_controller, start_vm
from tests.system.concurrency.audit import (
    audit,
    devices_in_journal,
    holds_by_account,
    holds_in_journal,
)
from tests.system.concurrency.crowd import (
    Account,
    Hand,
    Member,
    let_go,
    open_manager,
    request,
    run_crowd,
    step,
)
from vmplug import DeviceManager, HostRoot
from vmplug.errors import StateError
from vmplug.hypervisor.qemu.running import Qemu

HANDS = [*[Hand.KEPT] * 4, *[Hand.REOPENED] * 2, *[Hand.COMMAND] * 2]
STEPS = {Hand.KEPT: 60, Hand.REOPENED: 40, Hand.COMMAND: 8}
THREADS, THREAD_STEPS = 8, 150


@pytest.fixture
def vms(tmp_path: Path) -> Iterator[dict[str, GuestVm]]:
    with ExitStack() as stack:
        started = {}
        for name in ("one", "two"):
            logs = tmp_path / name
            logs.mkdir()
            vm = start_vm(logs, devices=scsi_controller(), guest=False, paused=True)
            started[name] = stack.enter_context(vm)
        yield started


def images(directory: Path, count: int) -> list[str]:
    return [str(disk_image(directory / f"disk{n}.img", 1, f"{n}")) for n in range(count)]


@pytest.mark.qemu
@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["one VM", "two VMs"])
def test_eight_processes_lose_nothing_and_give_nothing_away_twice(
    vms: dict[str, GuestVm], tmp_path: Path, names: list[str]
) -> None:
    state_dir = tmp_path / "state"
    vms = {name: vms[name] for name in names}
    sockets = {name: str(vm.qmp_path) for name, vm in vms.items()}
    for name, socket in sockets.items():
        open_manager(state_dir, name, socket).close()
    nothing = journal_rows(state_dir), {name: qemu_parts(vm) for name, vm in vms.items()}
    members = [
        Member(
            number=number,
            hand=hand,
            vms=sockets,
            images=images(tmp_path, 6),
            state_dir=str(state_dir),
            steps=STEPS[hand],
        )
        for number, hand in enumerate(HANDS)
    ]
    accounts = run_crowd(members)
    audit(vms, state_dir, accounts)
    assert [account.done for account in accounts] == [member.steps for member in members]
    codes = {code for account in accounts for code in account.refused}
    assert codes <= ({"wrong-state"} if len(vms) == 1 else {"wrong-state", "in-use"})
    let_go(state_dir, sockets, [account.owner for account in accounts])
    assert (
        journal_rows(state_dir),
        {name: qemu_parts(vm) for name, vm in vms.items()},
    ) == nothing


class ThreadHand:
    """One manager for all threads of a process."""

    def __init__(self, manager: DeviceManager, owner: str) -> None:
        self._manager = manager
        self._owner = owner

    def attach(self, vm: str, image: str) -> str | None:  # noqa: ARG002  there is but one
        """See Works."""
        try:
            self._manager.attach(request(image), owner=self._owner)
        except StateError as error:
            return error.state
        return None

    def detach(self, vm: str, image: str) -> None:  # noqa: ARG002  there is but one
        """See Works."""
        held = self._manager.attachments()
        mine = [h for h in held if (h.owner, h.host_path) == (self._owner, image)]
        self._manager.detach(mine[0].id)


@pytest.mark.slow
def test_eight_threads_of_one_manager_lose_nothing(tmp_path: Path) -> None:
    side, state_dir = MemorySide(), tmp_path / "state"
    before = side.parts()
    members = [
        Member(
            number=number,
            hand=Hand.KEPT,
            vms={"one": ""},
            images=images(tmp_path, 6),
            state_dir=str(state_dir),
            steps=THREAD_STEPS,
        )
        for number in range(THREADS)
    ]
    accounts = [Account(member.owner) for member in members]
    with (
        DeviceManager.open(
            vm="one", host=HostRoot("/"), hypervisor=Qemu(side.monitor()), state_dir=state_dir
        ) as manager,
        ThreadPoolExecutor(THREADS) as pool,
    ):

        def run(member: Member, account: Account) -> None:
            chance = random.Random(member.number)
            for _ in range(member.steps):
                step(member, ThreadHand(manager, member.owner), account, chance)

        list(pool.map(run, members, accounts))
        assert holds_in_journal(state_dir) == holds_by_account(accounts)
        held = devices_in_journal(state_dir)
        assert side.parts().vmplugs() == {f"vmplug-{i}" for i in held}
        assert len({place for _, _, place in held.values()}) == len(held)
        assert {state for account in accounts for state in account.refused} <= {"detaching"}
        for owner in {account.owner for account in accounts if +account.held}:
            manager.detach_owner(owner)
    assert side.parts() == before
    assert holds_in_journal(state_dir) == {}
