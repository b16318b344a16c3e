"""GPUs for Kata's agent: each container is told which of the guest's GPUs came for it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.tree import HostTree
from vmplug.address import PciPath
from vmplug.cli.render.kata_agent import agent_json
from vmplug.drivers.place import GuestAddress, GuestFunction
from vmplug.host.kind import DeviceType
from vmplug.journal.records import Attachment
from vmplug.journal.state import State
from vmplug.manager.kata.annotations import find_agent_annotations

GUEST = {"mode": "guest-kernel"}
GPU, COMPUTE, AUDIO, OTHER = "0x030000", "0x030200", "0x040300", "0x030000"
GUEST_ONLY: Mapping[str, str] = GUEST


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    tree = HostTree(tmp_path / "host")
    for number in range(12):
        add(tree, f"0000:3b:00.{number % 8}" if number < 8 else f"0000:3c:00.{number % 8}", GPU)
    return tree


def add(tree: HostTree, bdf: str, class_code: str, vendor: str = "0x10de") -> None:
    directory = f"/sys/bus/pci/devices/{bdf}"
    tree.file(f"{directory}/vendor", f"{vendor}\n").file(f"{directory}/class", f"{class_code}\n")


def hold(
    hold_id: str,
    *functions: tuple[str, str],
    vm: str = "sb1",
    owner: str = "c1",
    node: str | None = None,
    name: str | None = None,
    options: Mapping[str, str] = GUEST_ONLY,
    device: str | None = None,
) -> Attachment:
    node = node or f"/dev/vfio/{device or hold_id}"
    placed = [GuestFunction(bdf, PciPath.parse(path)) for bdf, path in functions]
    return Attachment(
        id=hold_id,
        vm=vm,
        owner=owner,
        name=name or node,
        host_path=node,
        kind=DeviceType.VFIO,
        read_only=False,
        count=1,
        state=State.ATTACHED,
        guest_address=GuestAddress(pci_path=placed[0].pci_path, functions=tuple(placed)),
        device_id=device or f"device-{hold_id}",
        options=options,
    )


def values(tree: HostTree, *holds: Attachment) -> dict[str, str]:
    found = find_agent_annotations(holds, tree.root)
    return {hold_id: value for hold_id, each in found.items() for value in each.values()}


def test_gpus_are_numbered_in_the_order_of_buses_and_not_of_plugging(tree: HostTree) -> None:
    """More than ten, whose slots would sort otherwise as decimal text."""
    slots = [0x10, 2, 9, 0xA, 0x1F, 3, 0x11, 4, 5, 6, 7]
    holds = [hold(str(slot), ("0000:3b:00.0", f"{slot:02x}/00")) for slot in slots]
    ordered = sorted(slots)
    expected = {str(slot): f"nvidia.com/gpu={ordered.index(slot)}" for slot in slots}
    assert values(tree, *holds) == expected


def test_a_bus_has_its_number_on_the_way_down(tree: HostTree) -> None:
    """Bus 0 comes first whatever its slots; a switch's buses come before the next port's."""
    paths = {"bus0": "1f", "switch": "02/00/03/00", "port": "03/00", "expander": "20:00/00"}
    holds = [hold(name, ("0000:3b:00.0", path)) for name, path in paths.items()]
    assert values(tree, *holds) == {
        name: f"nvidia.com/gpu={number}" for number, name in enumerate(paths)
    }


def test_the_key_has_the_number_of_the_group_or_cdev(tree: HostTree) -> None:
    function = ("0000:3b:00.0", "02/00")
    holds = [
        hold("group", function, node="/dev/vfio/26", name="vfio:gpu0"),
        hold("cdev", function, node="/dev/vfio/devices/vfio3"),
        hold("named", function, name="/dev/vfio/41"),
    ]
    found = find_agent_annotations(holds, tree.root)
    keys = [key for each in found.values() for key in each]
    assert keys == ["cdi.k8s.io/vfio26", "cdi.k8s.io/vfio3", "cdi.k8s.io/vfio41"]


def test_each_function_of_a_group_has_a_name(tree: HostTree) -> None:
    add(tree, "0000:3b:00.1", AUDIO)
    add(tree, "0000:3b:00.2", COMPUTE)
    group = hold(
        "group",
        ("0000:3b:00.0", "02/00"),
        ("0000:3b:00.1", "02/00.1"),
        ("0000:3b:00.2", "02/00.2"),
    )
    assert values(tree, group) == {"group": "nvidia.com/gpu=0,nvidia.com/gpu=1"}


def test_a_group_and_a_cdev_of_one_number_share_an_annotation(tree: HostTree) -> None:
    """Whoever puts both into a container's annotations loses none."""
    group = hold("group", ("0000:3b:00.0", "02/00"), node="/dev/vfio/3")
    cdev = hold("cdev", ("0000:3b:00.1", "03/00"), node="/dev/vfio/devices/vfio3")
    other = hold("other", ("0000:3b:00.2", "04/00"), node="/dev/vfio/devices/vfio3", owner="c2")
    found = find_agent_annotations([cdev, other, group], tree.root)
    assert found["group"] == found["cdev"]
    assert set(found["group"]["cdi.k8s.io/vfio3"].split(",")) == {
        "nvidia.com/gpu=0",
        "nvidia.com/gpu=1",
    }
    assert found["other"] == {"cdi.k8s.io/vfio3": "nvidia.com/gpu=2"}


def test_two_holds_of_one_gpu_have_its_one_number(tree: HostTree) -> None:
    function = ("0000:3b:00.0", "02/00")
    holds = [hold("a", function, device="d"), hold("b", function, device="d")]
    other = hold("c", ("0000:3b:00.1", "03/00"))
    assert values(tree, *holds, other) == {
        "a": "nvidia.com/gpu=0",
        "b": "nvidia.com/gpu=0",
        "c": "nvidia.com/gpu=1",
    }


def test_each_vm_counts_for_itself(tree: HostTree) -> None:
    holds = [hold(vm, ("0000:3b:00.0", "02/00"), vm=vm) for vm in ("sb1", "sb2")]
    assert set(values(tree, *holds).values()) == {"nvidia.com/gpu=0"}


def test_what_the_agent_does_not_wait_for_has_none_and_counts_not(tree: HostTree) -> None:
    add(tree, "0000:3d:00.0", GPU, vendor="0x1002")
    add(tree, "0000:3e:00.0", AUDIO)
    function = ("0000:3b:00.0", "02/00")
    others = [
        hold("amd", ("0000:3d:00.0", "01/00")),
        hold("audio", ("0000:3e:00.0", "01/00")),
        hold("gone", ("0000:ff:00.0", "01/00")),
        hold("vfio", function, options={}),
    ]
    gpu = hold("gpu", ("0000:3b:00.1", "09/00"))
    assert values(tree, *others, gpu) == {"gpu": "nvidia.com/gpu=0"}


def test_the_agent_is_told_beside_the_device(tree: HostTree) -> None:
    gpu = hold("gpu", ("0000:3b:00.0", "02/00"), node="/dev/vfio/26")
    told = agent_json(gpu, find_agent_annotations([gpu], tree.root))
    assert told is not None
    assert told["annotations"] == {"cdi.k8s.io/vfio26": "nvidia.com/gpu=0"}
    assert "annotations" not in (agent_json(gpu) or {})
