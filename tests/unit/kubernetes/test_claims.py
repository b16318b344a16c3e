"""A disk that is offered is claimed by nobody: not by vmplug either, until a pod is to get it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import disk_image, loop_device
from tests.support.journal import lay_journal
from vmplug.errors import InUse
from vmplug.host.finding import Code
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.kubernetes.config import read_config
from vmplug.kubernetes.health import Health, UnitState
from vmplug.kubernetes.keeper import Keeper

pytestmark = pytest.mark.root
DISKS = "example.com/disk"


class ThisHost(HostRoot):
    """This host, where udev has a name for one disk; `claims` are the exclusive opens of it."""

    def __init__(self, node: Path) -> None:
        super().__init__("/")
        self._node = str(node)
        number = node.stat().st_rdev
        self._udev = f"/run/udev/data/b{os.major(number)}:{os.minor(number)}"
        self.claims = 0

    def read_text(self, path: str) -> str | None:
        return "S:disk/by-id/one\n" if path == self._udev else super().read_text(path)

    def open_errno(self, path: str, flags: int) -> int | None:
        self.claims += (path, bool(flags & os.O_EXCL)) == (self._node, True)
        return super().open_errno(path, flags)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    with loop_device(disk_image(tmp_path / "disk.img", 8, "x")) as node:
        yield node


@pytest.fixture
def host(node: Path) -> ThisHost:
    return ThisHost(node)


@pytest.fixture
def keeper(host: ThisHost, tmp_path: Path) -> Iterator[Keeper]:
    file = tmp_path / "device-plugin.toml"
    file.write_text(f'[[resource]]\nname = "{DISKS}"\npaths = ["/dev/disk/by-id/one"]\n')
    file.chmod(0o644)
    lay_journal(tmp_path / "state")
    with Journal.open(tmp_path / "state", host=host) as journal:
        yield Keeper(read_config(file), journal, host)


def health(keeper: Keeper, *, may_claim: bool = False) -> Health:
    (offer,) = keeper.look(may_claim=may_claim).offers
    return offer.health


def test_looking_claims_nothing(keeper: Keeper, host: ThisHost) -> None:
    for _ in range(3):
        assert health(keeper).state is UnitState.FREE
    assert host.claims == 0
    keeper.allocate(DISKS, ["one"])
    assert host.claims == 1


def test_a_disk_that_only_a_claim_shows_to_be_used_is_refused_and_then_unhealthy_until_it_is_free(
    keeper: Keeper, host: ThisHost, node: Path
) -> None:
    holder = os.open(node, os.O_RDONLY | os.O_EXCL)  # as ZFS does: no process shows it
    try:
        assert health(keeper).state is UnitState.FREE
        assert health(keeper, may_claim=True).code is Code.OPEN_EXCLUSIVELY
        with pytest.raises(InUse, match="is open exclusively"):
            keeper.allocate(DISKS, ["one"])
        for _ in range(2):
            found = health(keeper)
            assert (found.state, found.code) == (UnitState.USED, Code.OPEN_EXCLUSIVELY)
    finally:
        os.close(holder)
    assert health(keeper).state is UnitState.FREE
    claims = host.claims
    assert health(keeper).state is UnitState.FREE
    assert host.claims == claims
