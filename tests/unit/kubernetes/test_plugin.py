"""The plugin and a kubelet that stands in, over their real sockets."""

import asyncio

from tests.support.kubelet import AdmissionError, StandInKubelet
from tests.unit.kubernetes.world import NET, NICS, Node
from vmplug.kubernetes.plugin import Plugin


def test_a_pod_gets_a_device_and_it_comes_back(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        answer = await kubelet.admit("pod1", NICS, 1)
        assert [d.host_path for d in answer.devices] == ["/dev/vfio/vfio", "/dev/vfio/27"]
        assert dict(answer.envs) == {"PCIDEVICE_EXAMPLE_COM_NIC": NET}
        assert node.states() == {"27": "started"}
        kubelet.delete("pod1")
        await until(lambda: not node.states())
        assert kubelet.devices(NICS) == {"27": "Healthy", "28": "Healthy"}

    node.run(scenario)


async def until(is_so, timeout_s: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.02)
