"""`vmplug device-plugin`, its `status` and `give-back`, and the process itself."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from tests.cli.command import Vmplug, ended
from tests.support.kubelet import AdmissionError, StandInKubelet
from tests.unit.kubernetes.world import (
    GPU,
    GPUS,
    MANAGED_LINES,
    NIC_LINES,
    NICS,
    SOUND,
    Node,
    until,
)

EMPTY = '[[resource]]\nname = "example.com/fpga"\nclasses = ["0x12"]\n'


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def vmplug(node: Node) -> Vmplug:
    return Vmplug(node.state)


def options(node: Node, lines: str) -> Sequence[str]:
    return "--config", node.config(lines).name, "--root", str(node.tree.path)


@pytest.mark.parametrize("verb", [("--dry-run",), ("status",)])
def test_every_device_is_shown_with_the_reason(
    node: Node, vmplug: Vmplug, verb: Sequence[str]
) -> None:
    node.open("/dev/vfio/27", name="dpdk")
    where = options(node, NIC_LINES + MANAGED_LINES + EMPTY)
    arguments = (*where, *verb) if verb == ("--dry-run",) else (*verb, *where)
    shown = vmplug("device-plugin", *arguments)
    assert shown.status == 0
    rows = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert rows[0] == "RESOURCE ID STATE DEVICE PODS WHY"
    assert rows[1].startswith(
        f"{NICS} 27 used 0000:3c:00.0 - /dev/vfio/27 is open in process 4711"
    )
    assert rows[2:] == [f"{NICS} 28 free 0000:3d:00.0 -", f"{GPUS} 26 bindable {GPU} {SOUND} -"]
    assert "example.com/fpga selects nothing on this host" in shown.stderr
    assert "kubelet does not say which pods have devices" in shown.stderr
    document = json.loads(vmplug("device-plugin", *arguments, "--json").stdout)
    assert [device["state"] for device in document["devices"]] == ["used", "free", "bindable"]
    assert [device["healthy"] for device in document["devices"]] == [False, True, True]
    assert document["devices"][2]["addresses"] == [GPU, SOUND]
    assert document["empty"] == ["example.com/fpga"]
    assert node.states() == {}


@pytest.mark.parametrize(
    ("lines", "says", "hint"),
    [
        (NIC_LINES + NIC_LINES.replace("nic", "net"), "selects a device twice", "one resource"),
        (NIC_LINES + "x = 1\n", "unknown field x", "docs/kubernetes.md"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(
    node: Node, vmplug: Vmplug, lines: str, says: str, hint: str
) -> None:
    file = node.path / "wrong.toml"
    file.write_text(lines)
    where = ("--config", str(file), "--root", str(node.tree.path))
    for run, verb in ((vmplug.as_process, ()), (vmplug, ("--dry-run",))):
        refused = run("device-plugin", *where, *verb)
        assert refused.status == 3
        assert says in refused.stderr
        assert hint in refused.stderr
        assert refused.stdout == ""
    assert node.states() == {}


def test_without_a_configuration_it_says_where_to_write_one(node: Node, vmplug: Vmplug) -> None:
    refused = vmplug("device-plugin", "--config", str(node.path / "none.toml"), "--dry-run")
    assert refused.status == 3
    assert "none.toml cannot be read: No such file" in refused.stderr


def run_without(library: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """`vmplug device-plugin` where that library is not there."""
    program = (
        f"import sys; sys.modules[{library!r}] = None; sys.argv[0] = 'vmplug'; "
        "from vmplug.cli.main import run; run()"
    )
    command = [sys.executable, "-c", program, "device-plugin", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_the_libraries_it_says_what_to_install(node: Node) -> None:
    done = run_without("grpclib", "status", *options(node, NIC_LINES))
    assert done.returncode == 4
    assert "Kubernetes needs libraries that are not there" in done.stderr
    assert "hint: pip install 'vmplug[kubernetes]'" in done.stderr


def test_the_log_is_lines_of_json(node: Node, vmplug: Vmplug) -> None:
    where = options(node, NIC_LINES)
    node.open("/dev/vfio/28", name="a\nb")

    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet:
            process = vmplug.begin("device-plugin", "--json", *where)
            try:
                await kubelet.wait_for(NICS, allocatable=1)
                await kubelet.admit("pod1", NICS, 1, start=False)
                with pytest.raises(AdmissionError):
                    await kubelet.allocate(NICS, ["28"])
            finally:
                process.terminate()
            done = await asyncio.to_thread(ended, process)
            told = [json.loads(line) for line in done.stderr.splitlines()]
            assert {line["version"] for line in told} == {1}
            assert all(datetime.fromisoformat(line.pop("time")).tzinfo for line in told)
            by_message = {line["message"].partition(":")[0]: line for line in told}
            allocated = by_message[f"allocated 27 of {NICS}"]
            assert allocated == {
                "version": 1,
                "level": "info",
                "message": f"allocated 27 of {NICS}",
                "resource": NICS,
                "ids": ["27"],
            }
            used = by_message[f"{NICS}=28 is used"]
            assert (used["level"], used["state"], used["code"]) == (
                "warning",
                "used",
                "open-by-process",
            )
            refused = by_message[f"refused 28 of {NICS}"]
            assert (refused["ids"], refused["code"]) == (["28"], "open-by-process")
            assert by_message[f"kubelet has the resource {NICS}"]["resource"] == NICS

    asyncio.run(play())


def test_without_the_library_for_metrics_it_says_what_to_install(node: Node) -> None:
    where = options(node, 'metrics = "127.0.0.1:9"\n' + NIC_LINES)
    done = run_without("prometheus_client", *where, "--state-dir", str(node.state))
    assert done.returncode == 4
    assert "asks for metrics, and a library for them is not there" in done.stderr
    assert "hint: pip install 'vmplug[metrics]'" in done.stderr
    assert [*node.kubelet_directory.iterdir()] == []


def test_give_back_prints_what_stays(node: Node, vmplug: Vmplug) -> None:
    where = options(node, NIC_LINES)
    assert vmplug("device-plugin", "give-back", *where).stdout == "nothing to give back\n"
    with node.journal() as journal:
        node.keeper(journal=journal).allocate(NICS, ["27"])
    assert vmplug("device-plugin", "give-back", *where).stdout == (
        f"{NICS}=27 stays: a pod has it, or a process has it open\n"
    )
    document = json.loads(vmplug("device-plugin", "give-back", *where, "--json").stdout)
    assert document["kept"] == [{"resource": NICS, "id": "27"}]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGKILL)),
    ],
)
def test_the_process_serves_until_a_signal_and_another_goes_on(
    node: Node, vmplug: Vmplug, number: signal.Signals
) -> None:
    where = options(node, NIC_LINES)

    async def play() -> None:
        async with StandInKubelet(node.kubelet_directory) as kubelet:
            process = vmplug.begin("device-plugin", *where)
            try:
                await kubelet.wait_for(NICS, allocatable=2)
                await kubelet.admit("pod1", NICS, 1, start=False)
                second = await asyncio.to_thread(vmplug.as_process, "device-plugin", *where)
                assert second.status == 6
                assert "a vmplug device-plugin runs on this node already" in second.stderr
                sent = len(kubelet.endpoints[NICS].lists)
            finally:
                os.kill(process.pid, number)
            done = await asyncio.to_thread(ended, process)
            assert done.status == (-9 if number is signal.SIGKILL else 0)
            lines = done.stderr.splitlines()
            assert f"vmplug: kubelet has the resource {NICS}" in lines
            assert f"vmplug: allocated 27 of {NICS}" in lines
            await kubelet.wait_gone(NICS)
            assert len(kubelet.endpoints[NICS].lists) == sent
            assert kubelet.allocatable(NICS) == 0
            assert node.states() == {"27": "allocated"}
            process = vmplug.begin("device-plugin", *where)
            try:
                await kubelet.wait_for(NICS, allocatable=2)
                with pytest.raises(AdmissionError, match="Requested: 2, Available: 1"):
                    await kubelet.admit("pod2", NICS, 2)
                kubelet.delete("pod1")
                await until(lambda: kubelet.calls.count("List") > 3)
            finally:
                process.terminate()
            assert (await asyncio.to_thread(ended, process)).status == 0

    asyncio.run(play())
