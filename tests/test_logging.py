"""What vmplug logs above debug: who has which device, and nothing of what a tenant wrote."""

import ast
import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

import vmplug
from tests.contract.sandbox import CHANGING, Hooked
from tests.support.disks import disk_image
from tests.support.lonely_host import LonelyHost
from tests.support.source import MODULES, nodes_of
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError

PAGE = (Path(__file__).parents[1] / "docs/library.md").read_text()
EXTRAS = {"vm", "owner", "device_id"}
PLUG_STEPS = 6

HARMLESS = {
    "bound",  # addresses of functions
    "count",
    "done",  # attached, released
    "drive.id",
    "error.code",
    "error.error_class",
    "command.execute",
    "error.strerror",
    "former.bdf",
    "former.driver or 'no driver'",
    "hold.device_id",
    "hold.vm",
    "name",  # of a VM
    "plug.id",
    "record.id",
    "record.name",  # of a VM
    "self.device_id",
    "self.vm",
    "vm",
}
"""What a message above debug may name: ids, the caller's names of VMs, words of programs."""


def logs() -> Iterator[tuple[str, ast.Call]]:
    """Each call that logs above debug."""
    for module in MODULES:
        for node in nodes_of(module):
            match node:
                case ast.Call(func=ast.Attribute(value=owner, attr=level)) if level in {
                    "info",
                    "warning",
                    "error",
                    "exception",
                    "critical",
                } and re.search(r"\blog$|getLogger", ast.unparse(owner)):
                    yield f"{module}:{node.lineno}", node
                case _:
                    pass


@pytest.mark.together("source")
def test_a_message_names_nothing_that_a_tenant_wrote() -> None:
    found = dict(logs())
    assert len(found) > 8
    named = {
        f"{where}: {ast.unparse(argument)}"
        for where, call in found.items()
        for argument in call.args[1:]
        if ast.unparse(argument) not in HARMLESS
    }
    # The kernel's error for a function, which names its address; and the log of the device plugin,
    # which is the operator's of the node: who uses a device is there in one line.
    told = {text.partition(":")[0] for text in named}
    assert {module for module in told if not module.startswith("kubernetes/")} <= {
        "host/pci/bind.py"
    }


HOSTILE = "SECRET\n of-a-tenant"


@pytest.fixture
def everything(logged: BufferingHandler) -> Iterator[BufferingHandler]:
    logger = logging.getLogger("vmplug")
    logger.setLevel(logging.DEBUG)
    logged.capacity = 100_000
    yield logged
    logger.setLevel(logging.NOTSET)


def hostile_requests(tmp_path: Path) -> list[vmplug.Request]:
    """One of each kind that needs neither root nor a backend, with hostile words all over."""
    directory = tmp_path / HOSTILE
    directory.mkdir()
    image = disk_image(directory / "a.img", 1, "a")
    return [
        vmplug.DeviceInfo(
            container_path=f"/dev/{HOSTILE}",
            dev_type=vmplug.DevType.BLOCK,
            host_path=str(image),
            driver_options={"serial": "SECRET-of-a-tenant", "bps-total": "10M"},
        ),
        vmplug.RngInfo(label="SECRET of-a-tenant"),
    ]


@pytest.mark.parametrize("refused_from", [None, 1, 2, 3, 5, 7])
def test_hostile_requests_leave_only_ids_above_debug(
    tmp_path: Path, everything: BufferingHandler, refused_from: int | None
) -> None:
    """Whatever steps and undos QEMU refuses, in words that repeat what it was told."""
    machine = vmplug.FakeHypervisor()
    numbers = itertools.count(1)

    def refuse(command: Command) -> None:
        if command.execute in CHANGING and refused_from and next(numbers) >= refused_from:
            raise CommandError(command.execute, "GenericError", f"no {command.arguments}")

    machine._monitor = Hooked(machine._monitor, refuse)
    held: list[vmplug.Attachment] = []
    with (
        suppress(vmplug.HypervisorError),
        vmplug.DeviceManager.open(
            vm="sb1", host=LonelyHost("/"), hypervisor=machine, state_dir=tmp_path / "state"
        ) as devices,
    ):
        held = devices.attach_all(hostile_requests(tmp_path), owner="ctr1")
        devices.detach_owner("ctr1")
    seen = [record for record in everything.buffer if record.levelno > logging.DEBUG]
    assert [formatted(record) for record in seen if "SECRET" in formatted(record)] == []
    assert bool(held) == (refused_from is None or refused_from > PLUG_STEPS)
    if refused_from and 1 < refused_from <= PLUG_STEPS:
        assert "ignored: " in seen[0].getMessage()
    if refused_from is None:
        facts = [{name: vars(record).get(name) for name in EXTRAS} for record in seen]
        ids = [hold.device_id for hold in held]
        assert [fact["device_id"] for fact in facts] == ids * 3  # attached, unplugged, released
        assert [fact["owner"] for fact in facts] == ["ctr1"] * 2 + [None] * 2 + ["ctr1"] * 2
        assert {fact["vm"] for fact in facts} == {"sb1"}
    plain = vars(logging.makeLogRecord({})).keys() | {"message"}
    assert set().union(*(vars(record).keys() for record in seen)) - plain <= EXTRAS


def formatted(record: logging.LogRecord) -> str:
    """All that a handler may write of it."""
    return f"{record.getMessage()} {vars(record)}"


@pytest.mark.together("source")
def test_the_page_names_every_extra_and_parts_that_log() -> None:
    assert {name for name in EXTRAS if f"`{name}`" in PAGE} == EXTRAS
    parts = {where.partition("/")[0] for where, _ in logs()}
    assert {part for part in parts if f"`vmplug.{part}`" not in PAGE} == set()
