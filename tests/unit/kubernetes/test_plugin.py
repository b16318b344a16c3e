"""The plugin and a kubelet that stands in, over their real sockets."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import pytest
from grpclib.const import Status

from tests.support.journal import lay_journal
from tests.support.kubelet import AdmissionError, StandInKubelet, StartError
from tests.unit.kubernetes.world import (
    DISK_LINES,
    DISKS,
    GPU,
    GPUS,
    MANAGED_LINES,
    NET,
    NIC_LINES,
    NICS,
    OTHER_NET,
    SOUND,
    Node,
    lists,
    running,
    until,
)
from vmplug.errors import HostError
from vmplug.kubernetes.kubelet import list_pods, register
from vmplug.kubernetes.plugin import Plugin

HEALTHY = {"27": "Healthy", "28": "Healthy"}


def test_a_pod_gets_a_device_and_it_comes_back(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        answer = await kubelet.admit("pod1", NICS, 1)
        assert [d.host_path for d in answer.devices] == ["/dev/vfio/vfio", "/dev/vfio/27"]
        assert {d.permissions for d in answer.devices} == {"mrw"}
        assert dict(answer.envs) == {"PCIDEVICE_EXAMPLE_COM_NIC": NET}
        assert node.states() == {"27": "started"}
        kubelet.delete("pod1")
        await until(lambda: not node.states())
        assert kubelet.devices(NICS) == HEALTHY

    node.run(scenario)


def test_what_another_process_has_is_unhealthy_and_refused_in_its_name(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        node.open("/dev/vfio/27", name="dpdk-app")
        with pytest.raises(AdmissionError, match=r"FailedPrecondition.*process 4711 \(dpdk-app\)"):
            await kubelet.allocate(NICS, ["27"])  # before kubelet knows
        assert node.states() == {}
        plugin.look_soon()
        await kubelet.wait_for(NICS, allocatable=1)
        assert kubelet.devices(NICS) == {"27": "Unhealthy", "28": "Healthy"}
        (offer, _) = plugin.board.of(NICS)
        assert "dpdk-app" in offer.health.reason
        node.end()
        plugin.look_soon()
        await kubelet.wait_for(NICS, allocatable=2)  # it recovers

    async def registered(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await scenario(kubelet, plugin)

    node.run(registered)


def test_the_name_of_a_process_is_escaped(node: Node, log_text: Callable[[], str]) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        node.open("/dev/vfio/27", name="a\x1b[31mb")
        with pytest.raises(AdmissionError) as caught:
            await kubelet.allocate(NICS, ["27"])
        for text in (str(caught.value), *log_text().split("\n")):
            assert text.isprintable()
        assert "[31mb" in str(caught.value)

    node.run(scenario)


def test_the_pods_own_vm_keeps_its_device_healthy(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await kubelet.admit("pod1", NICS, 1)
        node.open("/dev/vfio/27")
        await lists(kubelet, 3)
        assert kubelet.devices(NICS) == HEALTHY
        with pytest.raises(AdmissionError, match=r"is open in process 4711 \(qemu\)"):
            await kubelet.allocate(NICS, ["27"])
        await kubelet.start_container("pod1")  # a container that starts again
        assert node.states() == {"27": "started"}

    node.run(scenario)


def test_a_pod_that_is_deleted_by_force_leaves_its_vm_with_the_device(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await kubelet.admit("pod1", NICS, 1)
        node.open("/dev/vfio/27")
        kubelet.delete("pod1")
        await kubelet.wait_for(NICS, allocatable=1)
        reason = plugin.board.of(NICS)[0].health.reason
        assert "process 4711 (qemu); the pod that had it has gone" in reason
        await lists(kubelet, 3)
        assert node.states() == {"27": "started"}  # not given back under its feet
        node.end()
        await kubelet.wait_for(NICS, allocatable=2)
        await until(lambda: not node.states())

    node.run(scenario)


def test_a_list_that_fails_or_is_suddenly_empty_frees_nothing(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await kubelet.admit("pod1", NICS, 1)
        await lists(kubelet, 2)
        kubelet.list_error = Status.UNAVAILABLE
        await lists(kubelet, 4)
        assert node.states() == {"27": "started"}
        kubelet.list_error = None
        await lists(kubelet, 1)
        kubelet.forgets = True
        await lists(kubelet, 1)
        kubelet.forgets = False
        await lists(kubelet, 3)
        assert node.states() == {"27": "started"}

    node.run(scenario)


def test_one_list_that_does_not_name_it_frees_nothing(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await kubelet.admit("pod1", NICS, 1)
        await lists(kubelet, 2)
        (kept,) = kubelet.assignments
        for _ in range(3):
            kubelet.assignments = []
            await lists(kubelet, 1)
            kubelet.assignments = [kept]
            await lists(kubelet, 1)
        assert node.states() == {"27": "started"}

    node.run(scenario)


def test_a_pod_that_has_ended_is_named_and_keeps_its_device_until_it_is_not(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await kubelet.admit("pod1", NICS, 1)
        kubelet.names_ended = True
        kubelet.end("pod1")
        await lists(kubelet, 4)
        assert node.states() == {"27": "started"}
        await kubelet.admit("pod2", NICS, 2)  # kubelet may give it to the next one meanwhile
        assert node.states() == {"27": "started", "28": "started"}

    node.run(scenario)


def test_a_kubelet_that_starts_again_gets_the_whole_list_first(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        await kubelet.admit("pod1", NICS, 1)
        node.open("/dev/vfio/27")
        for _ in range(2):
            kubelet.forgets = True
            await kubelet.restart()
            await kubelet.wait_for(NICS, allocatable=2)
            assert len(kubelet.endpoints[NICS].lists[0]) == 2
            assert kubelet.killed == {}
            kubelet.forgets = False
        assert node.states() == {"27": "started"}

    node.run(scenario)


def test_a_plugin_that_starts_again_knows_what_pods_have(node: Node) -> None:
    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet:
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS, allocatable=2)
                await kubelet.admit("pod1", NICS, 1)
                node.open("/dev/vfio/27")
            await kubelet.wait_gone(NICS)
            assert kubelet.allocatable(NICS) == 0
            kubelet.list_error = Status.UNAVAILABLE  # the journal alone is enough
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS, allocatable=2)
                assert len(kubelet.endpoints[NICS].lists[0]) == 2

    asyncio.run(play())


def test_the_end_closes_the_stream_and_sends_no_list(node: Node) -> None:
    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet:
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS, allocatable=2)
                sent = len(kubelet.endpoints[NICS].lists)
            await kubelet.wait_gone(NICS)
            assert len(kubelet.endpoints[NICS].lists) == sent
            assert [p.name for p in kubelet.plugins.iterdir()] == ["kubelet.sock"]

    asyncio.run(play())


def test_the_directory_of_kubelet_may_come_later(node: Node, log_text: Callable[[], str]) -> None:
    async def play() -> None:
        async with node.plugin(node.config()):
            await until(lambda: "waiting for kubelet: there is no" in log_text())
            assert "kubelet.sock; start kubelet, or mount its directory here" in log_text()
            async with StandInKubelet(node.kubelet_directory) as kubelet:
                await kubelet.wait_for(NICS, allocatable=2)

    asyncio.run(play())


def test_a_socket_that_a_killed_plugin_left_is_replaced(node: Node) -> None:
    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet:
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS)
                (own,) = set(kubelet.plugins.iterdir()) - {kubelet.socket}
            own.write_text("left")
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS, allocatable=2)

    asyncio.run(play())


def test_of_two_plugins_with_other_state_directories_the_second_waits(
    node: Node, log_text: Callable[[], str]
) -> None:
    other = node.path / "other-state"
    lay_journal(other)

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        (own,) = set(kubelet.plugins.iterdir()) - {kubelet.socket}
        inode = own.stat().st_ino
        async with running(node.config(), node.kernel, other):
            await until(lambda: f"another process offers {NICS} at {own}" in log_text())
            await lists(kubelet, 4)
            assert kubelet.calls.count(f"Register {NICS}") == 1
        assert own.stat().st_ino == inode
        assert kubelet.allocatable(NICS) == 2

    node.run(scenario)


def test_a_socket_that_cannot_be_made_stops_no_other_resource(
    node: Node, log_text: Callable[[], str]
) -> None:
    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet:
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS)
                (own,) = set(kubelet.plugins.iterdir()) - {kubelet.socket}
            own.mkdir()
            async with node.plugin(node.config(NIC_LINES + DISK_LINES)):
                await kubelet.wait_for(DISKS, allocatable=2)
                await until(lambda: "Is a directory" in log_text())
                own.rmdir()
                await kubelet.wait_for(NICS, allocatable=2)

    asyncio.run(play())


def test_the_second_plugin_goes_on_when_the_first_has_ended(
    node: Node, log_text: Callable[[], str]
) -> None:
    other = node.path / "other-state"
    lay_journal(other)

    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet, AsyncExitStack() as second:
            async with node.plugin(node.config()):
                await kubelet.wait_for(NICS, allocatable=2)
                await second.enter_async_context(running(node.config(), node.kernel, other))
                await until(lambda: "another process offers" in log_text())
            await until(lambda: kubelet.calls.count(f"Register {NICS}") == 2)
            await kubelet.wait_for(NICS, allocatable=2)

    asyncio.run(play())


def test_a_failure_is_logged_again_after_it_was_over(
    node: Node, log_text: Callable[[], str]
) -> None:
    udev = node.tree.path / "run/udev/data/b259:0"
    text = udev.read_text()

    def has_failed(times: int) -> bool:
        return log_text().count("cannot look at the devices") == times

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(DISKS)
        for times in (1, 2):
            udev.unlink()
            udev.mkdir()
            plugin.look_soon()
            await until(partial(has_failed, times), 20)
            udev.rmdir()
            udev.write_text(text)
            plugin.look_soon()
            await until(plugin.board.wanted.is_set, 20)
            await until(lambda: not plugin.board.wanted.is_set(), 20)
            await lists(kubelet, 3)

    node.run(scenario, DISK_LINES)


def test_a_plugin_whose_socket_is_removed_registers_again(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        (own,) = set(kubelet.plugins.iterdir()) - {kubelet.socket}
        own.unlink()
        await until(lambda: kubelet.calls.count(f"Register {NICS}") == 2)
        await kubelet.wait_for(NICS, allocatable=2)
        assert own.is_socket()

    node.run(scenario)


def test_a_kubelet_of_another_version_is_named_and_asked_again(
    node: Node, log_text: Callable[[], str]
) -> None:
    async def play() -> None:
        async with (
            StandInKubelet(node.kubelet_directory, supported="v2") as kubelet,
            node.plugin(node.config()),
        ):
            refusal = 'API version "v1beta1" is not supported by kubelet'
            await until(lambda: refusal in log_text())
            assert "; vmplug speaks version v1beta1 of the interface" in log_text()
            kubelet.supported = "v1beta1"  # it was upgraded
            await kubelet.wait_for(NICS, allocatable=2)

    asyncio.run(play())


def test_a_resource_without_devices_is_not_registered_until_it_has_one(
    node: Node, log_text: Callable[[], str]
) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        assert set(kubelet.endpoints) == {NICS}  # an empty list would end pods
        assert "example.com/accelerator selects nothing on this node" in log_text()
        node.function("0000:3e:00.0", 29, class_code=0x120000)
        plugin.look_soon()
        await kubelet.wait_for("example.com/accelerator", allocatable=1)

    lines = '[[resource]]\nname = "example.com/accelerator"\nclasses = ["0x12"]\n'
    node.run(scenario, NIC_LINES + lines)


def test_an_id_that_there_is_not_is_an_invalid_argument(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        with pytest.raises(AdmissionError, match=r"InvalidArgument.*has no device 99"):
            await kubelet.allocate(NICS, ["27", "99"])
        assert node.states() == {}

    node.run(scenario)


def test_a_device_that_was_plugged_in_is_found_by_allocate_at_once(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        node.function("0000:3e:00.0", 29)
        await kubelet.allocate(NICS, ["29"])
        assert node.states() == {"29": "allocated"}

    node.run(scenario)


def test_of_two_pods_with_one_id_the_first_to_open_it_wins(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        await kubelet.admit("pod1", NICS, 1, start=False)
        await kubelet.allocate(NICS, ["27"])  # nobody has it open: it may be repeated
        await kubelet.start_container("pod1")
        lost = kubelet.assignments  # a kubelet that lost its checkpoint
        kubelet.assignments = []
        await kubelet.admit("pod2", NICS, 1, start=False)
        node.open("/dev/vfio/27")
        with pytest.raises(StartError, match=r"FailedPrecondition.*process 4711 \(qemu\)"):
            await kubelet.start_container("pod2")
        kubelet.assignments += lost

    node.run(scenario)


def test_a_managed_device_is_bound_for_its_pod_and_returned_after_it(node: Node) -> None:
    before = node.drivers()

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(GPUS, allocatable=1)
        assert node.drivers() == before
        answer = await kubelet.admit("pod1", GPUS, 1, start=False)
        assert dict(answer.envs) == {"PCIDEVICE_EXAMPLE_COM_GPU": f"{GPU},{SOUND}"}
        assert node.drivers() == before  # Allocate leaves nothing to undo
        await kubelet.start_container("pod1")
        assert node.drivers() == {**before, GPU: "vfio-pci", SOUND: "vfio-pci"}
        assert kubelet.devices(GPUS) == {"26": "Healthy"}
        kubelet.delete("pod1")
        await until(lambda: not node.states())
        assert node.drivers() == before
        await kubelet.wait_for(GPUS, allocatable=1)

    node.run(scenario, MANAGED_LINES)


def test_a_bind_that_fails_half_way_leaves_nothing(node: Node) -> None:
    before = node.kernel.picture()

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(GPUS, allocatable=1)
        node.kernel.refuse("vfio-pci", SOUND)
        with pytest.raises(StartError, match=SOUND):
            await kubelet.admit("pod1", GPUS, 1)
        assert node.kernel.picture() == before

    node.run(scenario, MANAGED_LINES)


def test_of_two_devices_the_first_is_given_back_when_the_second_fails(node: Node) -> None:
    node.tree.take(NET, "e1000e")
    node.tree.take(OTHER_NET, "e1000e")
    before = node.kernel.picture()

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS, allocatable=2)
        node.kernel.refuse("vfio-pci", OTHER_NET)
        with pytest.raises(StartError, match=OTHER_NET):
            await kubelet.admit("pod1", NICS, 2)
        assert node.kernel.picture() == before

    node.run(scenario, NIC_LINES + 'managed = "pre-start"\n')


def test_a_device_that_is_managed_from_the_start_stays_bound_between_pods(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(GPUS, allocatable=1)
        assert node.drivers()[GPU] == "vfio-pci"
        assert node.states() == {"26": "offered"}
        await kubelet.admit("pod1", GPUS, 1)
        assert node.states() == {"26": "started"}
        kubelet.delete("pod1")
        await until(lambda: node.states() == {"26": "offered"})
        assert node.drivers()[SOUND] == "vfio-pci"

    node.run(scenario, MANAGED_LINES.replace("pre-start", "start"))


def test_the_device_is_reset_before_its_pod_and_after_it(node: Node) -> None:
    def resets() -> int:
        return sum(write.step == "reset" for write in node.kernel.writes)

    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        await kubelet.admit("pod1", NICS, 1)
        assert resets() == 1
        node.open("/dev/vfio/27")
        await kubelet.start_container("pod1")
        assert resets() == 1  # not under its VM
        node.end()
        kubelet.delete("pod1")
        await until(lambda: not node.states())
        assert resets() == 2

    node.run(scenario)


def test_pods_that_the_journal_does_not_know_are_taken_in(node: Node) -> None:
    async def scenario(kubelet: StandInKubelet, plugin: Plugin) -> None:
        await kubelet.wait_for(NICS)
        await kubelet.admit("pod1", NICS, 1)
        node.open("/dev/vfio/27")
        with node.journal() as journal:
            journal.pod_devices.forget(journal.pod_devices.all())
        await until(lambda: node.states() == {"27": "started"})
        await kubelet.wait_for(NICS, allocatable=2)
        with pytest.raises(StartError, match="the journal was lost"):
            await kubelet.start_container("pod1")

    node.run(scenario)


def test_a_directory_without_pods_socket_is_a_sentence(
    node: Node, log_text: Callable[[], str]
) -> None:
    async def play() -> None:
        async with node.plugin(node.config()):
            await until(lambda: "kubelet does not say which pods have devices" in log_text())

    asyncio.run(play())


@pytest.mark.parametrize("after_s", [0, 0.01])
def test_a_kubelet_that_hangs_up_is_an_error_of_the_host(node: Node, after_s: float) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        writer.close()

    async def play() -> None:
        path = str(node.kubelet_directory / "s")
        server = await asyncio.start_unix_server(hang_up, path)
        for _ in range(20):
            with pytest.raises(HostError, match="does not say which pods"):
                await list_pods(path)
            with pytest.raises(HostError, match="does not take the resource"):
                await register(path, endpoint="e.sock", resource=NICS)
        server.close()

    asyncio.run(play())
