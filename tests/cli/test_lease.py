"""`vmplug lease`: devices for any process, from its start to its end."""

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.support.disks import disk_image
from vmplug.host.process import wait_for_end

WAIT_S = 60.0
Q35, WORDS = ("-machine", "q35"), ("{{qemu-args}}",)
BYTES = ("--allow", "nvdimm-size")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 1, "a")


def nothing_is_leased(vmplug: Vmplug) -> None:
    assert vmplug("lease", "list").answer() == "nothing is leased\n"
    assert vmplug("list", "--json").json()["attachments"] == []
    assert vmplug("reconcile", "--json").json()["repairs"] == []


def leases(vmplug: Vmplug) -> list[dict[str, object]]:
    return list(vmplug("lease", "list", "--json").json()["leases"])


@contextmanager
def leased(vmplug: Vmplug, image: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """`vmplug lease`, whose command has its devices inside the `with`."""
    device = ("--device", f"file:{image}", "--owner", "job")
    with vmplug.begin("lease", *device, "--", *command) as process:
        try:
            until(lambda: [one["state"] for one in leases(vmplug)] == ["held"])
            yield process
        finally:
            process.kill()


def until(is_so: object) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid_of(vmplug: Vmplug) -> int:
    (lease,) = leases(vmplug)
    assert isinstance(lease["process"], int)
    return lease["process"]


def test_a_command_has_the_fields_and_its_own_status(
    vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    says, described = tmp_path / "says", tmp_path / "lease.json"
    script = 'printf "%s\\n" "$@" >"$0"; readlink /proc/self/fd/$2 >>"$0"; exit 7'
    words = ("sh", "-c", script, says, "{a.img.host_path}", "{block.descriptor}")
    done = vmplug(
        *("lease", "--device", f"file:{image}", "--owner", "job", "--describe", described),
        *("--", *words),
    )
    assert (done.stdout, done.stderr, done.status) == ("", "", 7)
    lease = json.loads(described.read_text())["lease"]
    (device,) = lease["devices"]
    assert says.read_text() == f"{image}\n{device['descriptor']}\n{image}\n"
    assert (lease["id"], lease["owner"], device["kind"]) == ("job", "job", "block")
    assert described.stat().st_mode & 0o777 == 0o600
    nothing_is_leased(vmplug)


def test_a_launcher_reads_the_description_from_a_pipe(vmplug: Vmplug, image: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as pipe:
        done = subprocess.run(
            [
                *("vmplug", "lease", "--device", f"file:{image}"),
                *("--describe", f"/dev/fd/{writing}", "--", "true"),
            ],
            env=vmplug.environment,
            pass_fds=[writing],
            check=True,
        )
        os.close(writing)
        (device,) = json.loads(pipe.read())["lease"]["devices"]
    assert (done.returncode, device["host_path"]) == (0, str(image))
    nothing_is_leased(vmplug)


def test_nothing_of_qemu_is_needed(vmplug: Vmplug, image: Path) -> None:
    assert vmplug("lease", "--device", f"file:{image}", "--", "sleep", "0").answer() == ""
    nothing_is_leased(vmplug)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("--device", "file:{image}", "--", "no-such-program"), 3),
        (("--device", "file:{image}", "--", "/etc/hostname"), 3),
        (("--device", "file:{image}", "--"), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", "{{block.colour}}"), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", "{{eth0.socket}}"), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", "{{block.bdf}}"), 3),
        (("--device", "file:{image}", "--describe", "/no/such", "--", "touch", "{ran}"), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", "{{qemu-args}}"), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", *Q35, "a{{qemu-args}}"), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", *Q35, "-daemonize", *WORDS), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", *Q35, *WORDS, *WORDS), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", "-M", "virt", *WORDS), 3),
        (("--device", "file:{image}", "--", "touch", "{ran}", *Q35, "-m", "much", *WORDS), 3),
        (("--device", "c:1:3:/dev/null", "--", "touch", "{ran}", *Q35, *WORDS), 5),
        (("-d", "nvdimm:{image}", *BYTES, "--", "touch", "{ran}", "-M", "microvm", *WORDS), 5),
        (("--device", "file:{image}.absent", "--", "touch", "{ran}"), 4),
        (("--device", "file:{image}", "--device", "net:/no.sock", "--", "touch", "{ran}"), 4),
        (("--", "touch", "{ran}"), 2),
        (("list", "--all"), 2),
        (("end", "job"), 6),
    ],
)
def test_a_command_that_cannot_have_its_devices_never_runs(
    vmplug: Vmplug, image: Path, tmp_path: Path, words: tuple[str, ...], status: int
) -> None:
    ran = tmp_path / "ran"
    done = vmplug("lease", *(word.format(image=image, ran=ran) for word in words))
    assert (done.stdout, done.status) == ("", status), done
    sentence, *_ = done.stderr.splitlines()
    assert sentence.startswith("vmplug: ")
    assert not ran.exists()
    nothing_is_leased(vmplug)


def test_a_command_that_cannot_be_executed_gives_the_devices_back(
    vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    done = vmplug("lease", "--device", f"file:{image}", "--", program)
    assert (done.status, "it cannot be started" in done.stderr) == (3, True)
    nothing_is_leased(vmplug)


def test_the_status_of_a_signal_is_128_and_its_number(vmplug: Vmplug, image: Path) -> None:
    done = vmplug("lease", "--device", f"file:{image}", "--", "sh", "-c", "kill -KILL $$")
    assert done.status == 128 + signal.SIGKILL
    nothing_is_leased(vmplug)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signals_are_passed_on(
    vmplug: Vmplug, image: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ready = tmp_path / "ready"
    script = 'trap "exit 9" TERM HUP INT; : >"$0"; while :; do sleep 0.05; done'
    device = ("--device", f"file:{image}")
    with subprocess.Popen(
        ["setsid", "vmplug", "lease", *device, "--", "sh", "-c", script, str(ready)],
        env=vmplug.environment,
    ) as process:
        until(ready.exists)
        process.send_signal(number)
        assert process.wait(WAIT_S) == 9
    nothing_is_leased(vmplug)


def test_what_vmplug_ignores_the_command_ignores_too(
    vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    """With nohup(1) it outlives its terminal."""
    ready = tmp_path / "ready"
    script = 'trap "exit 9" TERM; : >"$0"; while :; do sleep 0.05; done'
    words = ("lease", "--device", f"file:{image}", "--", "sh", "-c", script, str(ready))
    with subprocess.Popen(
        ["setsid", "nohup", "vmplug", *words], env=vmplug.environment
    ) as process:
        until(ready.exists)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 9
    nothing_is_leased(vmplug)


def test_what_a_terminal_sends_comes_once(vmplug: Vmplug, image: Path, tmp_path: Path) -> None:
    ready, main_side = tmp_path / "ready", pty.openpty()
    script = (
        'trap "echo int >>\\"$0.int\\"" INT; : >"$0"; '
        'while [ ! -e "$0.stop" ]; do sleep 0.05; done; exit 5'
    )
    words = ("lease", "--device", f"file:{image}", "--", "sh", "-c", script, str(ready))
    with subprocess.Popen(
        ["setsid", "--ctty", "vmplug", *words], stdin=main_side[1], env=vmplug.environment
    ) as process:
        until(ready.exists)
        os.write(main_side[0], b"\x03")
        until(tmp_path.joinpath("ready.int").exists)
        tmp_path.joinpath("ready.stop").touch()
        assert process.wait(WAIT_S) == 5
    assert tmp_path.joinpath("ready.int").read_text() == "int\n"
    for side in main_side:
        os.close(side)
    nothing_is_leased(vmplug)


def test_a_lease_outlives_vmplug_and_ends_with_its_process(vmplug: Vmplug, image: Path) -> None:
    with leased(vmplug, image, "sleep", "infinity") as process:
        pid = pid_of(vmplug)
        process.kill()
        process.wait()
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"
    refused = vmplug("lease", "--device", f"file:{image}", "--", "true")
    assert (refused.status, f"held by lease job, process {pid} (sleep)" in refused.stderr) == (
        4,
        True,
    )
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid, WAIT_S)
    (repair,) = vmplug("reconcile", "--json").json()["repairs"]
    assert (repair["vm"], repair["outcome"]) == ("lease:job", "forgotten")
    nothing_is_leased(vmplug)


def test_the_next_verb_gives_back_what_an_ended_process_had(vmplug: Vmplug, image: Path) -> None:
    with leased(vmplug, image, "sleep", "infinity") as process:
        pid = pid_of(vmplug)
        process.kill()
        process.wait()
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid, WAIT_S)
    assert [one["state"] for one in leases(vmplug)] == ["ended"]
    listed = vmplug("list").answer().splitlines()
    assert listed[-1] == "lease job seems to have ended: vmplug reconcile frees what it held"
    watched = vmplug("watch", "--timeout=0").answer()
    assert f"lease job (process {pid}) has ended" in watched
    assert vmplug("lease", "--device", f"file:{image}", "--", "true").answer() == ""
    nothing_is_leased(vmplug)


def test_a_child_that_has_the_disk_open_keeps_it(vmplug: Vmplug, image: Path) -> None:
    script = """exec 9<>"$0"
        sleep infinity >/dev/null 2>&1 &
        until grep -q sleep /proc/$!/comm; do :; done"""
    done = vmplug(
        *("lease", "--device", f"file:{image}", "--owner", "job", "--"),
        *("sh", "-c", script, str(image)),
    )
    pid = pid_of(vmplug)
    assert done.status == 0
    assert done.stderr == f"vmplug: process {pid} (sleep) has it open: the lease is its now\n"
    assert vmplug("lease", "end", "job").status == 6
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid, WAIT_S)
    assert vmplug("lease", "end", "job", "--json").json()["lease"]["id"] == "job"
    nothing_is_leased(vmplug)


def test_a_command_that_ends_at_once_gives_the_devices_back(vmplug: Vmplug, image: Path) -> None:
    for _ in range(5):  # before or after it was given them
        assert vmplug("lease", "--device", f"file:{image}", "--", "true").answer() == ""
    nothing_is_leased(vmplug)


def test_a_lease_holds_locks_for_a_vmm_without_any(vmplug: Vmplug, image: Path) -> None:
    flock = ("flock", "--nonblock", str(image), "true")
    assert vmplug("lease", "--device", f"file:{image}", "--", *flock).status == 0
    locked = ("lease", "--device", f"file:{image}", "--lock", "full", "--", *flock)
    assert vmplug(*locked).status == 1


def test_a_lease_is_not_detached(vmplug: Vmplug, image: Path) -> None:
    """It ends; and whoever tries is told so."""
    with leased(vmplug, image, "sleep", "infinity") as process:
        before = leases(vmplug)
        done = vmplug("detach", "--owner", "job")
        assert done.status == 6
        assert done.stderr == (
            "vmplug: lease job is not a VM\n"
            "hint: it ends with its process; vmplug lease end ends it earlier\n"
        )
        assert leases(vmplug) == before
        process.terminate()


def test_the_policy_decides_about_leases(vmplug: Vmplug, image: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'[[rule]]\nname = "jobs"\npaths = ["{image}"]\nowners = ["job-*"]\nvms = ["lease:*"]\n'
    )
    policy.chmod(0o600)
    asked = ("lease", "--device", f"file:{image}", "--policy", policy)
    assert vmplug(*asked, "--owner", "job-1", "--", "true").status == 0
    refused = vmplug(*asked, "--owner", "else", "--", "true")
    assert (refused.status, "is for the owners job-*" in refused.stderr) == (3, True)
    nothing_is_leased(vmplug)
