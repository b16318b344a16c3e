"""The clock by which the tests wait for a guest: it goes as its QEMU gets CPU time."""

import os
import subprocess
import time

from guest.console import running_time

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
