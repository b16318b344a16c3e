"""Groups and nodes of a real kernel, offered to a kubelet that stands in, and given back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lab import topology
from tests.lab.conftest import HAS_IOMMUFD
from tests.support.kubelet import AdmissionError, StandInKubelet
from tests.unit.kubernetes.world import running, until
from vmplug.address import Bdf
from vmplug.host.pci.bind import read_driver
from vmplug.host.pci.iommu import find_group
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.kubernetes.config import Config, read_config
from vmplug.manager.binding.binder import Binder

CARDS = "lab.example.com/card"
MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)
HOST = HostRoot()
LONG_S = 120.0
"""An emulated CPU takes seconds for one look."""


@pytest.fixture
def kubelet_directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="k") as name:
        yield Path(name)


def configured(tmp_path: Path, kubelet_directory: Path, lines: str) -> Config:
    file = tmp_path / "device-plugin.toml"
    file.write_text(
        f'kubelet-directory = "{kubelet_directory}"\ncdi-directory = "{tmp_path}/cdi"\n'
        f'reconcile-seconds = 2\n[[resource]]\nname = "{CARDS}"\n{lines}'
    )
    return read_config(file)


@asynccontextmanager
async def opened(node: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has a node open. Kubelet is in the same loop, which goes on meanwhile."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'exec <>"$0"; echo; exec sleep 1000', node),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout
        await process.stdout.readline()
        yield process
    finally:
        process.kill()
        await process.wait()


def drivers(bdfs: tuple[str, ...]) -> list[str | None]:
    return [read_driver(Bdf.parse(bdf), HOST) for bdf in bdfs]


@pytest.mark.parametrize(
    ("members", "lines"),
    [
        ((topology.NIC,), 'pci = ["8086:10d3"]\n'),
        (MULTI, 'pci = ["1b36:0010", "1234:11e8", "8086:10d3"]\n'),
    ],
    ids=["one function", "three"],
)
def test_a_group_is_bound_for_a_pod_and_given_back(
    tmp_path: Path, kubelet_directory: Path, members: tuple[str, ...], lines: str
) -> None:
    before = drivers(members)
    id_ = str(find_group(f"/sys/bus/pci/devices/{members[0]}", HOST))
    config = configured(tmp_path, kubelet_directory, lines + 'managed = "pre-start"\n')

    async def play() -> None:
        async with (
            StandInKubelet(kubelet_directory) as kubelet,
            running(config, HOST, tmp_path / "state"),
        ):
            await kubelet.wait_for(CARDS)
            assert kubelet.devices(CARDS)[id_] == "Healthy"
            assert drivers(members) == before
            answer = await kubelet.admit("pod1", CARDS, 1, must_include=[id_])
            node = f"/dev/vfio/{id_}"
            assert [device.host_path for device in answer.devices] == ["/dev/vfio/vfio", node]
            assert {*drivers(members)} == {"vfio-pci"}
            async with opened(node) as process:
                with pytest.raises(AdmissionError, match=rf"is open in process {process.pid} "):
                    await kubelet.allocate(CARDS, [id_])
                kubelet.delete("pod1")
                await until(lambda: kubelet.devices(CARDS)[id_] == "Unhealthy", LONG_S)
                assert {*drivers(members)} == {"vfio-pci"}
            await until(lambda: drivers(members) == before, LONG_S)
            await until(lambda: kubelet.devices(CARDS)[id_] == "Healthy", LONG_S)

    asyncio.run(play())


@pytest.mark.skipif(not HAS_IOMMUFD, reason="this kernel has no nodes for single devices")
def test_a_cdev_is_offered_by_its_name(tmp_path: Path, kubelet_directory: Path) -> None:
    config = configured(tmp_path, kubelet_directory, 'drivers = ["vfio-pci"]\n')

    async def play() -> None:
        async with (
            StandInKubelet(kubelet_directory) as kubelet,
            running(config, HOST, tmp_path / "state"),
        ):
            await kubelet.wait_for(CARDS, allocatable=1)
            (id_,) = kubelet.devices(CARDS)
            assert id_.startswith("vfio")
            node = f"/dev/vfio/devices/{id_}"
            answer = await kubelet.admit("pod1", CARDS, 1)
            assert [device.host_path for device in answer.devices] == [node]
            assert dict(answer.envs) == {"PCIDEVICE_LAB_EXAMPLE_COM_CARD": topology.NIC}
            async with opened(node) as process:
                with pytest.raises(AdmissionError, match=rf"process {process.pid} "):
                    await kubelet.allocate(CARDS, [id_])
                kubelet.delete("pod1")
                await until(lambda: kubelet.devices(CARDS)[id_] == "Unhealthy", LONG_S)
            await until(lambda: kubelet.devices(CARDS)[id_] == "Healthy", LONG_S)

    with Journal.open(tmp_path / "by-hand", host=HOST) as journal:
        binder = Binder(journal, HOST)
        group = find_vfio_device(topology.NIC, HOST)
        binder.bind(group)
        try:
            asyncio.run(play())
        finally:
            binder.unbind(group)
