"""The clock by which the tests wait for a guest: it goes as its QEMU gets CPU time."""

import os
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from guest.console import STATUS_TIMED_OUT, GuestConsole, running_time

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def test_the_clock_follows_the_cpu_time_of_the_process() -> None:
    clock = running_time(os.getpid())
    begun, cpu_s = clock(), time.process_time()
    while time.process_time() - cpu_s < 0.1:
        pass
    assert clock() - begun >= 0.1 - 2 * TICK_S


def test_the_clock_runs_at_a_quarter_when_the_process_is_idle_or_has_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        clock, begun_at = running_time(child.pid), time.monotonic()
        begun = clock()
        time.sleep(0.2)
        child.kill()
        child.wait()
        passed, wall_s = clock() - begun, time.monotonic() - begun_at
    assert 0.2 / 4 <= passed <= wall_s / 4 + 2 * TICK_S


BUSY = ["sh", "-c", "while :; do :; done"]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this kernel counts no waits for a CPU"
)
def test_the_clock_does_not_run_while_the_process_waits_for_a_cpu() -> None:
    """It gets a twelfth of one."""
    cpu = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        patient, *others = (stack.enter_context(subprocess.Popen(BUSY)) for _ in range(12))
        for process in (patient, *others):
            stack.callback(process.kill)
            os.sched_setaffinity(process.pid, {cpu})
        clock, begun_at = running_time(patient.pid), time.monotonic()
        time.sleep(0.5)
        passed, wall_s = clock(), time.monotonic() - begun_at
    assert passed < wall_s / 6


def test_a_guest_that_had_no_time_is_waited_for_again() -> None:
    """Its own clock went on meanwhile, and what it waits for has not come."""
    asked = list[str]()

    def answer(guest: socket.socket) -> None:
        with guest, guest.makefile() as lines:
            for line in lines:
                asked.append(line)
                is_late = line.startswith("wait_until") and len(asked) < 4
                said = line.removeprefix("echo ") if line.startswith("echo ") else ""
                status = STATUS_TIMED_OUT if is_late else 0
                guest.sendall(f"{said}__END {status}\n".encode())

    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=answer, args=(theirs,))
    thread.start()
    with GuestConsole(ours, clock=lambda: 0.0) as console:
        console.wait_until("true", timeout_s=1.0)
    thread.join()
    assert [line.split()[0] for line in asked if line.strip()] == ["echo", *["wait_until"] * 2]
