"""Processes that attach and detach at random on common VMs, each keeping its own account.

What one of them holds nobody else may take away: an attach may be refused, a detach never.
"""

import multiprocessing
import random
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tests.cli.command import Vmplug
from vmplug import DeviceInfo, DeviceManager, DevType, HostRoot, Qemu
from vmplug.errors import DeviceError, InUse, StateError
from vmplug.journal.state import State

Slot = tuple[str, str]
"""A VM and an image."""

_CHANCE_TO_DETACH = 0.5
_MOST_HELD = 6


class Hand(StrEnum):
    """How a process works: one manager, one for each step, or the command."""

    KEPT = "kept"
    REOPENED = "reopened"
    COMMAND = "command"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process: what it works on, and how much it does."""

    number: int
    hand: Hand
    vms: Mapping[str, str]
    images: Sequence[str]
    state_dir: str
    steps: int

    @property
    def owner(self) -> str:
        """Whose holds its are."""
        return f"member{self.number}"


@dataclass(slots=True)
class Account:
    """What a member did: how often it holds each image, and how often it was refused and why."""

    owner: str
    held: Counter[Slot] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    done: int = 0


def run_crowd(members: Sequence[Member]) -> list[Account]:
    """Let all of them work at the same time; raises what one of them did not expect."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(members), mp_context=spawn) as pool:
        return list(pool.map(work, members))


def work(member: Member) -> Account:
    """All steps of a member."""
    account = Account(member.owner)
    chance = random.Random(member.number)
    with ExitStack() as stack:
        tools = Tools(member, stack)
        try:
            for _ in range(member.steps):
                step(member, tools.hand(), account, chance)
        except DeviceError as error:  # none of ours travels between processes
            where = "".join(traceback.format_exception(error))
            raise AssertionError(f"{member.owner}, step {account.done}: {where}") from None
    return account


def let_go(state_dir: Path, vms: Mapping[str, str], owners: Sequence[str]) -> None:
    """Everything that they hold is given back."""
    for vm in vms:
        with open_manager(state_dir, vm, vms[vm]) as manager:
            held = [hold.id for hold in manager.attachments() if hold.owner in owners]
            manager.detach_all(held, whole=True)


class Works(Protocol):
    """A way to attach and detach."""

    def attach(self, vm: str, image: str) -> str | None:
        """None when it is held, or why it was refused."""

    def detach(self, vm: str, image: str) -> None:
        """One count less."""


def step(member: Member, hand: Works, account: Account, chance: random.Random) -> None:
    """One attach or detach."""
    held = sorted(account.held.elements())
    is_full = len(held) >= _MOST_HELD
    if held and (is_full or chance.random() < _CHANCE_TO_DETACH):
        slot = chance.choice(held)
        hand.detach(*slot)
        account.held[slot] -= 1
    else:
        slot = chance.choice(sorted(member.vms)), chance.choice(member.images)
        why = hand.attach(*slot)
        account.refused.update([why] if why else [])
        account.held[slot] += why is None
    account.done += 1


class Tools:
    """Makes what a member works with, once or for every step."""

    def __init__(self, member: Member, stack: ExitStack) -> None:
        self._member = member
        self._stack = stack
        self._kept: Works | None = None

    def hand(self) -> Works:
        """What the next step is done with."""
        match self._member.hand:
            case Hand.COMMAND:
                return CommandHand(self._member)
            case Hand.REOPENED:
                return LibraryHand(self._member, None)
            case Hand.KEPT:
                self._kept = self._kept or LibraryHand(self._member, self._stack)
                return self._kept


def open_manager(state_dir: Path | str, vm: str, socket: str) -> DeviceManager:
    """The manager of one VM; with seven others before one, a turn may take its time."""
    qemu = Qemu.connect(socket, timeout_s=60)
    return DeviceManager.open(vm=vm, host=HostRoot("/"), hypervisor=qemu, state_dir=state_dir)


def request(image: str) -> DeviceInfo:
    """A request for an image as a SCSI disk, which a paused VM lets go."""
    return DeviceInfo(
        container_path=f"/dev/{Path(image).stem}",
        dev_type=DevType.BLOCK,
        host_path=image,
        driver_options={"block-driver": "virtio-scsi"},
    )


class LibraryHand:
    """Managers that last as long as `stack`, or as one step."""

    def __init__(self, member: Member, stack: ExitStack | None) -> None:
        self._member = member
        self._stack = stack
        self._managers: dict[str, DeviceManager] = {}

    def attach(self, vm: str, image: str) -> str | None:
        """See Works."""
        with self._manager(vm) as manager:
            try:
                attachment = manager.attach(request(image), owner=self._member.owner)
            except (InUse, StateError) as error:
                return error.code
            assert attachment.state is State.ATTACHED
        return None

    def detach(self, vm: str, image: str) -> None:
        """See Works."""
        with self._manager(vm) as manager:
            (hold,) = (
                hold
                for hold in manager.attachments()
                if (hold.owner, hold.host_path) == (self._member.owner, image)
            )
            manager.detach(hold.id)

    @contextmanager
    def _manager(self, vm: str) -> Iterator[DeviceManager]:
        member = self._member
        if self._stack is None:
            with open_manager(member.state_dir, vm, member.vms[vm]) as manager:
                yield manager
            return
        if vm not in self._managers:
            manager = open_manager(member.state_dir, vm, member.vms[vm])
            self._managers[vm] = self._stack.enter_context(manager)
        yield self._managers[vm]


class CommandHand:
    """`vmplug` as an operator runs it."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._vmplug = Vmplug(Path(member.state_dir))

    def attach(self, vm: str, image: str) -> str | None:
        """See Works."""
        what = [
            "--device",
            f"file:{image}:/dev/{Path(image).stem}",
            "-o",
            "block-driver=virtio-scsi",
        ]
        result = self._vmplug("attach", *what, "--vm", vm, "--owner", self._member.owner, "--json")
        if result.status == 0:
            return None
        code = str(result.error()["code"])
        assert code in {"in-use", "wrong-state"}, result
        return code

    def detach(self, vm: str, image: str) -> None:
        """See Works."""
        listed = self._vmplug("list", "--vm", vm, "--json").json()
        (mine,) = (
            hold["id"]
            for hold in listed["attachments"]
            if (hold["owner"], hold["host_path"]) == (self._member.owner, image)
        )
        self._vmplug("detach", mine, "--json").json()
