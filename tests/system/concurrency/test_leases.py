"""Eight processes lease and release the same images: no two have one for writing at a time."""

import multiprocessing
import os
import random
import subprocess
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmplug
from tests.contract.world import journal_rows
from tests.support.disks import disk_image
from vmplug.errors import InUse

PROCESSES, STEPS, IMAGES = 8, 8, 3


@contextmanager
def alone(image: Path) -> Iterator[None]:
    """FileExistsError when another process is inside for the same image."""
    mark = image.with_suffix(".leased")
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    yield
    mark.unlink()


def work(number: int, images: list[str], state_dir: str) -> tuple[int, int]:
    """How often it had an image, and how often it was refused; it gives half of them away."""
    chance, had, refused = random.Random(number), 0, 0
    for _ in range(STEPS):
        image = Path(chance.choice(images))
        try:
            one_lease(image, number, state_dir, is_given=chance.random() < 0.5)
        except InUse:
            refused += 1
        except Exception:  # noqa: BLE001  none of ours travels between processes
            raise AssertionError(traceback.format_exc()) from None
        else:
            had += 1
    return had, refused


def one_lease(image: Path, number: int, state_dir: str, *, is_given: bool) -> None:
    """Lease it, have it alone, and give it back or let a process that has it end."""
    asked = vmplug.DeviceInfo(
        container_path="/dev/x", dev_type=vmplug.DevType.BLOCK, host_path=str(image)
    )
    setup = vmplug.Setup(state_dir=state_dir)
    with vmplug.lease([asked], owner=f"member{number}", setup=setup) as lease:
        with alone(image):
            if not is_given:
                return
            holder = subprocess.Popen(["sleep", "infinity"], pass_fds=lease.descriptors)
            lease.give_to(holder.pid)
        holder.kill()
        holder.wait()


@pytest.mark.root
def test_eight_processes_lease_and_release(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    images = [str(disk_image(tmp_path / f"{n}.img", 1, f"{n}")) for n in range(IMAGES)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        done = list(
            pool.map(work, range(PROCESSES), [images] * PROCESSES, [str(state_dir)] * PROCESSES)
        )
    assert sum(had + refused for had, refused in done) == PROCESSES * STEPS
    assert sum(had for had, _ in done) >= IMAGES
    assert [row for rows in journal_rows(state_dir).values() for row in rows] == []
