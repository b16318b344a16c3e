"""What kubelet and containers are given: lists, choices, nodes, names of CDI, environment."""

import json
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.kubelet import AdmissionError, StandInKubelet
from tests.unit.kubernetes.world import DISK_LINES, DISKS, NET, NIC_LINES, NICS, OTHER_NET, Node
from vmplug.cdi import read_directories
from vmplug.errors import StateError
from vmplug.kubernetes.answer import list_devices, prefer
from vmplug.kubernetes.picture import Offer
from vmplug.kubernetes.plugin import Plugin
from vmplug.kubernetes.units import make_id

CDI = 'given = "cdi-annotations"\n'
FILE = "vmplug-kubernetes-example.com-nic.yaml"


def offers(node: Node, lines: str = NIC_LINES) -> tuple[Offer, ...]:
    with node.journal() as journal:
        return node.keeper(lines, journal=journal).look().offers


def on_nodes(node: Node, *numbers: int | None) -> list[Offer]:
    """Devices 0, 1, 2, ... of these NUMA nodes."""
    (one, _) = offers(node)
    assert one.unit
    return [
        replace(one, id=str(place), unit=replace(one.unit, id=str(place), numa_node=number))
        for place, number in enumerate(numbers)
    ]


@pytest.mark.parametrize(
    ("numbers", "told"),
    [([0, 1], [0, 1]), ([0, None], None), ([None, None], None), ([0, 0], [0, 0])],
)
def test_all_devices_have_a_numa_node_or_none(
    node: Node, numbers: list[int | None], told: list[int] | None
) -> None:
    devices = list_devices(on_nodes(node, *numbers))
    topologies = [device.topology for device in devices if device.HasField("topology")]
    assert ([t.nodes[0].ID for t in topologies] or None) == told


@pytest.mark.parametrize(
    ("numbers", "available", "must", "size", "chosen"),
    [
        ([0, 1, 1], "012", "", 2, "12"),  # one node is enough
        ([0, 0, 0, 1, 1], "01234", "", 2, "34"),  # the smaller that has enough
        ([0, 1, 0, 1], "0123", "1", 2, "13"),  # beside what must be
        ([0, 1, 0, 1], "0123", "3", 3, "310"),
        ([0, 0, 1, 1, 1, 2], "012345", "", 4, "2345"),  # two nodes, not three
        ([0, 0], "1", "", 1, "1"),
        ([0, 0], "01", "", 5, "01"),
        ([None, None], "01", "1", 2, "10"),
    ],
)
def test_the_choice_is_of_the_fewest_numa_nodes(
    node: Node,
    numbers: list[int | None],
    available: str,
    must: str,
    size: int,
    chosen: str,
) -> None:
    answers = {
        "".join(prefer(on_nodes(node, *numbers), set(available), list(must), size))
        for _ in range(3)
    }
    assert answers == {chosen}


def test_kubelet_asks_for_the_choice(node: Node) -> None:
    node.function("0000:3e:00.0", 29, numa_node=1)

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=3)
        await kubelet.admit("pod1", NICS, 2)
        assert kubelet.pods() == {"pod1": {NICS: ("28", "29")}}

    node.run(scenario)


def test_a_cdev_is_given_by_its_own_name(node: Node) -> None:
    node.tree.file("/dev/iommu")
    node.tree.vfio_cdev(NET, 0)
    node.tree.file("/dev/vfio/devices/vfio0")
    (cdev, group) = (
        offer.unit for offer in sorted(offers(node), key=lambda o: o.id, reverse=True)
    )
    assert cdev
    assert group
    assert (cdev.id, [n.host_path for n in cdev.nodes]) == ("vfio0", ["/dev/vfio/devices/vfio0"])
    assert (group.id, len(group.nodes)) == ("28", 2)
    managed = {offer.id for offer in offers(node, NIC_LINES + 'managed = "start"\n')}
    assert managed == {"27", "28"}  # a cdev exists only after the binding


def test_a_disk_is_given_by_its_stable_name(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(DISKS, allocatable=2)
        answer = await kubelet.admit("pod1", DISKS, 1)
        (disk,) = answer.devices
        path = "/dev/disk/by-id/nvme-disk_S1"
        assert (disk.host_path, disk.container_path) == ("/dev/nvme0n1", path)
        assert not answer.envs

    node.run(scenario, DISK_LINES)


@pytest.mark.parametrize(
    "name", ["nvme-a+b:c", "x" * 200, "-", "wwn-0x5000", "a" * 56, "a" * 57, "日本"]
)
def test_an_id_is_short_and_plain(name: str) -> None:
    id_ = make_id(name)
    assert 0 < len(id_) <= 56
    assert set(id_) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert id_[0].isalnum()
    assert id_[-1].isalnum()
    assert make_id(name + "x") != id_


def test_kubevirt_has_its_variable_too(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        answer = await kubelet.admit("pod1", NICS, 2)
        both = f"{NET},{OTHER_NET}"
        assert dict(answer.envs) == {
            "PCIDEVICE_EXAMPLE_COM_NIC": both,
            "PCI_RESOURCE_EXAMPLE_COM_NIC": both,
        }

    node.run(scenario, NIC_LINES + "pci-resource-env = true\n")


@pytest.mark.parametrize("given", ["cdi-annotations", "cdi-cri"])
def test_a_name_of_cdi_stands_for_the_same_device(node: Node, given: str) -> None:
    """cdi-cri: the field is of Kubernetes 1.28; the kubelet of 1.20 drops it."""

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        answer = await kubelet.admit("pod1", NICS, 2)
        assert not answer.devices
        names = ["example.com/nic=27", "example.com/nic=28"]
        if given == "cdi-cri":
            assert [device.name for device in answer.cdi_devices] == names
        else:
            assert dict(answer.annotations) == {"cdi.k8s.io/vmplug_27": ",".join(names)}
        registry = read_directories([str(node.path / "cdi")])
        (file,) = registry.files
        assert file.spec.kind == NICS
        nodes = [
            [edit.path for edit in device.container_edits.device_nodes]
            for device in file.spec.devices
        ]
        assert nodes == [["/dev/vfio/vfio", f"/dev/vfio/{n}"] for n in (27, 28)]

    node.run(scenario, NIC_LINES + f'given = "{given}"\n')


def test_the_file_of_cdi_is_there_before_the_list_and_made_again(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        file = node.path / "cdi" / FILE
        assert file.exists()  # nothing is registered yet
        await kubelet.wait_for(NICS, allocatable=2)
        file.unlink()
        await kubelet.admit("pod1", NICS, 1)
        assert file.exists()

    node.run(scenario, NIC_LINES + CDI)


def test_the_name_of_a_device_that_has_gone_stays_while_a_pod_has_it(node: Node) -> None:
    file = node.path / "cdi" / FILE
    with node.journal() as journal:
        keeper = node.keeper(NIC_LINES + CDI, journal=journal)
        keeper.write_specs()
        keeper.allocate(NICS, ["27"])
        for bdf in (NET, OTHER_NET):
            node.kernel._remove_function(bdf)
        keeper.look()
        keeper.write_specs()
        assert device_names(file) == ["27"]


def device_names(file: Path) -> list[str]:
    text = "".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    return [device["name"] for device in json.loads(text)["devices"]]


def test_a_foreign_file_that_defines_a_device_makes_it_unhealthy(node: Node) -> None:
    foreign = node.path / "cdi" / "other.json"
    edits = {"env": ["A=B"]}
    device = {"name": "27", "containerEdits": edits}
    foreign.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": NICS, "devices": [device]}))

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=1)
        with pytest.raises(AdmissionError, match=f"{foreign} defines example.com/nic=27 too"):
            await kubelet.allocate(NICS, ["27"])
        foreign.unlink()
        plugin.look_soon()
        await kubelet.wait_for(NICS, allocatable=2)

    node.run(scenario, NIC_LINES + CDI)


def test_a_file_that_somebody_edited_is_left_alone(node: Node) -> None:
    file = node.path / "cdi" / FILE
    with node.journal() as journal:
        keeper = node.keeper(NIC_LINES + CDI, journal=journal)
        keeper.write_specs()
        edited = file.read_text() + "# mine\n"
        os.unlink(file)
        file.write_text(edited)
        with pytest.raises(StateError, match="is not as vmplug wrote it"):
            keeper.write_specs()
        assert file.read_text() == edited
