"""What a slot of several functions does, in memory and in QEMU: with the tests' own commands.

The devices are pci-testdev, as no VFIO is here; to a slot every device is the same.
"""

import pytest

from tests.contract.world import Refusal, Side
from vmplug.drivers.ports import Command

PERIPHERAL = "/machine/peripheral"


def add(side: Side, name: str, address: str, *, multifunction: bool = True) -> object:
    arguments = {"driver": "pci-testdev", "id": name, "bus": "rp0", "addr": address}
    return side.ask(Command("device_add", {**arguments, "multifunction": multifunction}))


def names(side: Side) -> set[str]:
    return {name for name in side.parts().devices if name.startswith("function")}


def test_other_functions_may_come_before_function_0(side: Side) -> None:
    for name, address in (("function2", "0x0.2"), ("function1", "0x0.1"), ("function0", "0x0")):
        assert not isinstance(add(side, name, address), Refusal)
    assert names(side) == {"function0", "function1", "function2"}


def test_a_function_that_is_taken_is_refused_by_its_number(side: Side) -> None:
    add(side, "function1", "0x0.1")
    refusal = add(side, "function9", "0x0.1")
    assert isinstance(refusal, Refusal)
    assert refusal.desc == (
        "PCI: slot 0 function 1 not available for pci-testdev, in use by pci-testdev,id=function1"
    )


def test_function_0_must_say_that_there_are_others(side: Side) -> None:
    add(side, "function1", "0x0.1")
    refusal = add(side, "function0", "0x0", multifunction=False)
    assert isinstance(refusal, Refusal)
    assert refusal.desc == "PCI: 0.0 indicates single function, but 0.1 is already populated."
    assert names(side) == {"function1"}


@pytest.mark.parametrize("asked", ["function0", "function1"])
def test_one_function_takes_all_of_its_slot_along(awake: Side, asked: str) -> None:
    add(awake, "function1", "0x0.1")
    add(awake, "function0", "0x0")
    awake.ask(Command("device_del", {"id": asked}))
    for name in ("function0", "function1"):
        awake.wait_gone(name)
    assert names(awake) == set()
