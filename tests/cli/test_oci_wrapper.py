"""examples/oci-wrapper with runtimes of a few lines of shell; tests/qemu has real engines."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import VMPLUG, Vmplug, config, ended
from tests.cli.monitors import Gate, MemoryVm
from tests.cli.result import Result
from tests.contract.world import Rows, journal_rows
from tests.support.engines import WRAPPER
from vmplug.host.process import wait_for_end

pytestmark = pytest.mark.slow

VM = "org.vmplug.vm"
RANDOM = {"org.vmplug.rng.r0": "{}"}


@dataclass(frozen=True, slots=True)
class Wrapper:
    """The wrapper in front of the runtime below `directory`, for the journal of `vmplug`."""

    vmplug: Vmplug
    vm: MemoryVm
    directory: Path

    @property
    def runtime(self) -> Path:
        """The runtime; its calls are in `calls`."""
        return self.directory / "runtime"

    def becomes(self, *lines: str) -> None:
        """Make a runtime of these lines."""
        script = ["#!/bin/sh", f'echo "$*" >>{self.directory}/calls', *lines]
        self.runtime.write_text("\n".join(script) + "\n")
        self.runtime.chmod(0o755)

    def calls(self) -> list[str]:
        """The words of each call that the runtime got."""
        calls = self.directory / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def bundle(self, annotations: Mapping[str, str]) -> Path:
        """Write a bundle, and return its directory."""
        made = self.directory / "bundle"
        made.mkdir(exist_ok=True)
        (made / "config.json").write_text(config(annotations=annotations))
        return made

    def begin(
        self, *words: str | Path, files: Sequence[int] = (), runtime: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start it as an engine does, with no variables but its own, and these files."""
        return subprocess.Popen(
            [sys.executable, WRAPPER, *words],
            cwd=self.directory,
            env={
                "PYTHONPATH": os.pathsep.join(sys.path),
                "VMPLUG_STATE_DIR": str(self.vmplug.state_dir),
                "VMPLUG_RUNTIME": runtime or str(self.runtime),
            },
            pass_fds=files,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *words: str | Path, runtime: str | None = None) -> Result:
        return ended(self.begin(*words, runtime=runtime))

    def picture(self) -> tuple[Rows, frozenset[str]]:
        """The journal, and everything in the VM."""
        return journal_rows(self.vmplug.state_dir), self.vm.names()

    def owners(self) -> list[str]:
        """Who holds something."""
        return [hold["owner"] for hold in self.vmplug("list", "--json").json()["attachments"]]


@pytest.fixture
def wrapper(vmplug: Vmplug, vm: MemoryVm, tmp_path: Path) -> Wrapper:
    made = Wrapper(vmplug, vm, tmp_path)
    made.becomes("exit 0")
    made.bundle({VM: "sb1", **RANDOM})
    return made


# Every other verb


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--version"],
        ["state", "c1"],
        ["--log", "create", "kill", "create", "9"],
        ["--root=delete", "--debug", "start", "delete"],
        ["exec", "c1", "create", "--bundle", "bundle", "c2"],
    ],
    ids=" ".join,
)
def test_another_verb_becomes_the_runtime(wrapper: Wrapper, words: Sequence[str]) -> None:
    before = wrapper.picture()
    wrapper.becomes("echo $$", "exit 7")
    process = wrapper.begin(*words)
    assert ended(process) == Result(f"{process.pid}\n", "", 7)
    assert wrapper.calls() == [" ".join(words)]
    assert wrapper.picture() == before


def test_another_verb_ends_at_a_pipe_that_is_shut_as_the_runtime_does(wrapper: Wrapper) -> None:
    wrapper.becomes("kill -PIPE $$", "echo ignored")
    assert wrapper("state", "c1") == Result("", "", -signal.SIGPIPE)


# create and delete


@pytest.mark.parametrize(
    ("before", "owner"),
    [
        ([], "c1"),
        (["--root", "/run/ns1", "--log", "log", "--log-format", "json"], "/run/ns1/c1"),
        (["--debug", "--root=/run/ns1", "--systemd-cgroup", "--log=create"], "/run/ns1/c1"),
        (["--criu", "/usr/sbin/criu", "--rootless", "auto"], "c1"),
    ],
    ids=["podman", "containerd", "joined", "criu"],
)
def test_devices_are_in_the_vm_from_create_to_delete(
    wrapper: Wrapper, before: Sequence[str], owner: str
) -> None:
    nothing = wrapper.picture()
    create = (*before, "create", "--bundle", "bundle", "--pid-file", "pid", "--no-pivot", "c1")
    delete = (*before, "delete", "--force", "c1")
    assert wrapper(*create) == Result("", "", 0)
    assert wrapper.owners() == [owner]
    assert wrapper.vm.names() != nothing[1]
    assert wrapper(*before, "start", "c1") == Result("", "", 0)
    assert wrapper(*delete) == Result("", "", 0)
    assert wrapper.picture() == nothing
    assert wrapper(*delete) == Result("", "", 0), "it is deleted again"
    assert wrapper.calls() == [
        " ".join(words) for words in (create, (*before, "start", "c1"), delete, delete)
    ]


@pytest.mark.parametrize("verb", ["create", "delete", "start"])
def test_the_runtime_gets_the_files_that_the_engine_opened(wrapper: Wrapper, verb: str) -> None:
    reader, writer = os.pipe()
    wrapper.becomes(f"echo ready >/dev/fd/{writer}")
    process = wrapper.begin(verb, "--bundle", "bundle", "c1", files=[writer])
    os.close(writer)
    with open(reader) as lines:
        assert (ended(process), lines.read()) == (Result("", "", 0), "ready\n")


def test_containers_of_two_roots_do_not_share_a_name(wrapper: Wrapper) -> None:
    for root in ("/run/a", "/run/b"):
        wrapper("--root", root, "create", "-b", "bundle", "c1")
    wrapper("--root", "/run/a", "delete", "c1")
    assert wrapper.owners() == ["/run/b/c1"]


def test_a_container_without_devices_needs_no_vm(wrapper: Wrapper) -> None:
    before = wrapper.picture()
    wrapper.bundle({})
    wrapper.becomes("exit 3")
    assert wrapper("create", "--bundle", "bundle", "c1").status == 3
    assert wrapper.picture() == before


def test_the_devices_of_a_container_that_runs_stay(wrapper: Wrapper) -> None:
    wrapper("create", "--bundle", "bundle", "c1")
    before = wrapper.picture()
    wrapper.becomes("echo c1 runs >&2", "exit 1")
    assert wrapper("delete", "c1") == Result("", "c1 runs\n", 1)
    assert wrapper.picture() == before


@pytest.mark.parametrize(
    ("line", "status"), [("exit 9", 9), ("kill -KILL $$", 128 + signal.SIGKILL)], ids=str
)
def test_what_was_plugged_is_taken_back_when_the_runtime_fails(
    wrapper: Wrapper, line: str, status: int
) -> None:
    before = wrapper.picture()
    wrapper.becomes("echo no >&2", line)
    assert wrapper("create", "--bundle", "bundle", "c1") == Result("", "no\n", status)
    assert wrapper.picture() == before


def test_a_second_container_of_the_name_takes_nothing_from_the_first(wrapper: Wrapper) -> None:
    wrapper("create", "--bundle", "bundle", "c1")
    before = wrapper.picture()
    wrapper.becomes("echo c1 exists >&2", "exit 1")
    assert wrapper("create", "--bundle", "bundle", "c1").status == 1
    assert wrapper.picture() == before


def test_a_runtime_that_cannot_be_run_leaves_nothing(wrapper: Wrapper) -> None:
    before = wrapper.picture()
    wrapper.runtime.write_bytes(b"\x7fELF")
    assert "Exec format error" in wrapper("create", "--bundle", "bundle", "c1").stderr
    assert wrapper.picture() == before


def test_the_vm_serves_others_while_the_runtime_works(wrapper: Wrapper) -> None:
    wrapper.becomes(f"exec {VMPLUG} attach --device rng:/dev/random --vm sb1 --owner c2 >&2")
    created = wrapper("create", "--bundle", "bundle", "c1")
    assert created.status == 0, created
    assert sorted(wrapper.owners()) == ["c1", "c2"]


def test_a_wrapper_that_is_killed_leaves_what_delete_takes_back(wrapper: Wrapper) -> None:
    before = wrapper.picture()
    wrapper.becomes("kill -KILL $PPID", "exit 1")
    assert wrapper("create", "--bundle", "bundle", "c1").status == -signal.SIGKILL
    assert wrapper.owners() == ["c1"]
    wrapper.becomes("exit 0")
    assert wrapper("delete", "--force", "c1") == Result("", "", 0)
    assert wrapper.picture() == before


@pytest.mark.parametrize("is_sent", [False, True], ids=["unsent", "sent"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_wrapper_that_is_killed_as_it_plugs_leaves_what_delete_takes_back(
    wrapper: Wrapper, count: int, *, is_sent: bool
) -> None:
    sockets = wrapper.vmplug.state_dir.parent
    with (
        MemoryVm(sockets / "memory.sock") as vm,
        Gate(sockets / "gate.sock", vm.socket_path) as gate,
    ):
        wrapper.vmplug("vm", "adopt", "sb2", "--qmp", gate.socket_path).answer()
        wrapper.bundle({VM: "sb2", **RANDOM})
        before = (journal_rows(wrapper.vmplug.state_dir), vm.names())
        gate.shut_at(count, is_sent=is_sent)
        process = wrapper.begin("create", "--bundle", "bundle", "c1")
        gate.wait_shut()
        process.kill()
        assert ended(process).status == -signal.SIGKILL
        gate.wait_idle()
        assert wrapper.owners() == ["c1"]
        assert wrapper("delete", "--force", "c1") == Result("", "", 0)
        assert (journal_rows(wrapper.vmplug.state_dir), vm.names()) == before


def test_who_interrupts_it_as_it_plugs_sees_no_traceback(wrapper: Wrapper) -> None:
    """The undo finds that QEMU does not answer, and the journal keeps what is not known."""
    sockets = wrapper.vmplug.state_dir.parent
    with (
        MemoryVm(sockets / "memory.sock") as vm,
        Gate(sockets / "gate.sock", vm.socket_path) as gate,
    ):
        wrapper.vmplug("vm", "adopt", "sb2", "--qmp", gate.socket_path).answer()
        wrapper.bundle({VM: "sb2", **RANDOM})
        before = (journal_rows(wrapper.vmplug.state_dir), vm.names())
        gate.shut_at(1, is_sent=True)
        process = wrapper.begin("create", "--bundle", "bundle", "c1")
        gate.wait_shut()
        process.send_signal(signal.SIGINT)
        result = ended(process)
        assert result.status == 128 + signal.SIGINT, result
        assert "Traceback" not in result.stderr
        assert wrapper.calls() == []
        gate.wait_idle()
        assert wrapper("delete", "--force", "c1") == Result("", "", 0)
        assert (journal_rows(wrapper.vmplug.state_dir), vm.names()) == before


def test_signals_are_those_of_the_runtime(wrapper: Wrapper) -> None:
    before = wrapper.picture()
    catches = "grep -q 'SigCgt:.*[4-7c-f]...$' /proc/$PPID/status"  # SIGTERM, signal 15
    wrapper.becomes(
        "sleep 60 & trap 'kill $!; exit 5' TERM",
        f"until {catches}; do kill -0 $! || exit; done",
        "kill -TERM $PPID; wait",
    )
    assert wrapper("create", "--bundle", "bundle", "c1").status == 5
    assert wrapper.picture() == before


@pytest.mark.qemu
@pytest.mark.root
def test_a_container_whose_vm_has_ended_can_be_deleted(wrapper: Wrapper) -> None:
    before = wrapper.picture()
    wrapper.vmplug("vm", "start", "sb2", "--accel", "tcg", "--memory", "64", "--", "-S").answer()
    vms = wrapper.vmplug("vm", "list", "--json").json()["vms"]
    (pid,) = [vm["pid"] for vm in vms if vm["name"] == "sb2"]
    wrapper.bundle({VM: "sb2", **RANDOM})
    assert wrapper("create", "--bundle", "bundle", "c1") == Result("", "", 0)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid, timeout_s=60)
    assert wrapper("delete", "c1") == Result("", "", 0)
    assert wrapper.owners() == []
    assert wrapper.picture() == before


# What is refused


@pytest.mark.parametrize(
    ("annotations", "words", "message"),
    [
        ({}, "--bundle nowhere c1", "nowhere: cannot be read: No such file"),
        ({}, "c1", "config.json: cannot be read"),
        ({VM: "sb1", **RANDOM}, "--bundle", "config.json: cannot be read"),
        ({"org.vmplug.x": "{}"}, "-b bundle c1", "'x' is not a kind of annotation"),
        ({VM: "sb2", **RANDOM}, "-b bundle c1", "no VM 'sb2' is known; hint: vmplug vm list"),
        ({VM: "", **RANDOM}, "-b bundle c1", "no VM '' is known"),
        (RANDOM, "-b bundle c1", "$.annotations: no org.vmplug.vm names a VM for the devices"),
        ({VM: "sb1", "org.vmplug.share.s": '{"source": "/nowhere"}'}, "-b bundle c1", "/nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_is_on_stderr_and_in_the_log_of_the_engine(
    wrapper: Wrapper, annotations: Mapping[str, str], words: str, message: str
) -> None:
    before = wrapper.picture()
    wrapper.bundle(annotations)
    refused = wrapper("--log", "log", "create", *words.split())
    assert (refused.stdout, refused.status) == ("", 1)
    assert refused.stderr.startswith("vmplug: ")
    assert message in refused.stderr
    (line,) = (wrapper.directory / "log").read_text().splitlines()
    assert json.loads(line) == {"level": "error", "msg": refused.stderr.removesuffix("\n")}
    assert wrapper.calls() == []
    assert wrapper.picture() == before


@pytest.mark.parametrize("log", ["/nowhere/log", "bundle", "/dev/full", ""])
def test_a_refusal_is_on_stderr_when_the_log_cannot_be_written(wrapper: Wrapper, log: str) -> None:
    wrapper.bundle(RANDOM)
    refused = wrapper(f"--log={log}", "create", "--bundle", "bundle", "c1")
    message = "vmplug: $.annotations: no org.vmplug.vm names a VM for the devices\n"
    assert refused == Result("", message, 1)
    assert wrapper.calls() == []


@pytest.mark.parametrize("verb", ["create", "delete", "state"])
@pytest.mark.parametrize("runtime", ["/nowhere/runc", "bundle/config.json"])
def test_a_runtime_that_is_not_there(wrapper: Wrapper, verb: str, runtime: str) -> None:
    before = wrapper.picture()
    refused = wrapper("--log", "log", verb, "--bundle", "bundle", "c1", runtime=runtime)
    assert refused == Result("", f"vmplug: there is no runtime {runtime}\n", 1)
    assert wrapper.picture() == before


def test_it_fits_on_a_page() -> None:
    assert len(WRAPPER.read_text().splitlines()) <= 80
