"""The work for each device is the same whether there are tens of them or hundreds."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.journal import vm_record
from tests.support.work import count_lines, count_looks
from vmplug.host.events import HostEvents
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.journal.journal import Journal
from vmplug.journal.naming import choose_holds
from vmplug.journal.state import not_attached
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import Setup
from vmplug.manager.watching.watch import Watch
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.vms.listing import list_attachments

FEW, MANY = 40, 400
MORE_MAX = 1.05
"""What is done once for a request makes the work for each of a few devices more, not less."""


def disks(directory: Path, count: int) -> list[DeviceInfo]:
    images = [directory / f"{index}.img" for index in range(count)]
    for image in images:
        image.touch()
        os.truncate(image, 1 << 20)
    return [
        DeviceInfo(
            container_path=f"/dev/{image.stem}",
            dev_type=DevType.BLOCK,
            host_path=str(image),
            driver_options={"block-driver": "virtio-scsi"},
        )
        for image in images
    ]


class World:
    """A VM in memory with its journal, and disks that it does not have yet."""

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir()
        self.infos = disks(directory, count)
        self.state_dir = directory / "state"
        with Journal.open(self.state_dir) as journal:
            journal.add_vm(vm_record("vm1"))
        self.manager = DeviceManager.open(
            vm="vm1",
            host=HostRoot("/"),
            hypervisor=FakeHypervisor(),
            state_dir=self.state_dir,
        )

    def attach(self) -> None:
        assert len(self.manager.attach_all(self.infos)) == len(self.infos)

    def check(self) -> None:
        checked = self.manager.check_places(self.infos)
        assert not any(one.is_refused for one in checked)

    def plan(self) -> None:
        assert len(self.manager.plan(self.infos)) == 2 * len(self.infos)

    def list(self) -> None:
        listed = list_attachments(setup=Setup(state_dir=self.state_dir))
        assert len(listed.health) == len(self.infos)

    def reconcile(self) -> None:
        assert self.manager.reconcile() == []

    def choose(self) -> None:
        held = self.manager.attachments()
        ids = [hold.id for hold in held]
        assert choose_holds(ids, held, partial(not_attached, vm="vm1", has_ended=False)) == held

    def watch(self) -> None:
        """Once all are there, and once all of them have gone."""
        with Watch(Journal.open(self.state_dir), HostEvents(), host=HostRoot("/")) as watch:
            watch._look([])
            assert watch.looked.devices == len(self.infos)
            for info in self.infos:
                assert info.host_path
                os.unlink(info.host_path)
            watch._look([])
            assert len(watch._waiting) == len(self.infos)


@contextmanager
def world(directory: Path, count: int) -> Iterator[World]:
    made = World(directory, count)
    with made.manager:
        yield made


def cost_of_each(
    directory: Path, act: Callable[[World], None], prepare: Sequence[Callable[[World], None]] = ()
) -> tuple[float, float]:
    """Lines of Python for each of a few devices, and for each of many."""
    costs = []
    for count in (3, FEW, MANY):  # the first one fills what is read once for all
        with world(directory / str(count), count) as made:
            for step in prepare:
                step(made)
            costs.append(count_lines(partial(act, made)) / count)
    return costs[1], costs[2]


@pytest.mark.slow
@pytest.mark.parametrize("act", [World.check, World.plan, World.attach])
def test_a_request_costs_as_much_for_each_of_many_devices(
    tmp_path: Path, act: Callable[[World], None]
) -> None:
    few, many = cost_of_each(tmp_path, act)
    assert many < few * MORE_MAX


@pytest.mark.slow
@pytest.mark.parametrize("act", [World.list, World.reconcile, World.choose, World.watch])
def test_what_a_vm_has_costs_as_much_for_each_of_many_devices(
    tmp_path: Path, act: Callable[[World], None]
) -> None:
    few, many = cost_of_each(tmp_path, act, [World.attach])
    assert many < few * MORE_MAX


@pytest.mark.parametrize("act", [World.check, World.attach])
def test_a_request_looks_at_the_host_as_often_for_each_of_many_devices(
    tmp_path: Path, act: Callable[[World], None]
) -> None:
    looks = []
    for count in (3, 10, 100):
        with world(tmp_path / str(count), count) as made:
            looks.append(count_looks(partial(act, made)))
    for_ten, for_ninety_more = looks[1], looks[2] - looks[1]
    assert for_ninety_more.total() / 90 <= for_ten.total() / 10


@pytest.mark.slow
def test_one_more_device_costs_about_as_much_in_a_vm_that_has_hundreds(tmp_path: Path) -> None:
    """The journal names them, and no row of one that is not asked for is read."""
    lines = []
    for count in (3, FEW, MANY):  # the first one fills what is read once for all
        with world(tmp_path / str(count), count) as made:
            *others, last = made.infos
            made.manager.attach_all(others)
            lines.append(count_lines(partial(made.manager.attach, last)))
    for_each_that_is_there = (lines[2] - lines[1]) / (MANY - FEW)
    assert for_each_that_is_there < 40
