"""Whole processes: the command line and the import."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from tests.support.vm import root_ports, scsi_controller, start_vm

from bench.timing import Ratio, of_pairs, rounds, timed

_COUNT = 25
_TREE = Path(__file__).parents[1]
_BIN = _TREE / "build" / "installed" / str(sys.implementation.cache_tag) / "bin"
"""A venv with vmplug and what it requires, as a user has it.

What developers install besides costs each process time: msgspec imports typing_extensions where it
finds it.
"""
_PYTHON = str(_BIN / "python")
_VMPLUG = str(_BIN / "vmplug")
_CLICK = [_PYTHON, "-c", "import click"]
_ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH"}
}
"""Each process would compile what it imports, which takes twice as long as all it does.

Nor is there any of this tree, or of what else developers installed, but what the venv has.
"""


class Bench:
    """A journal with a paused VM that never boots, and one image to hand over."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._state_dir = directory / "state"
        self.images = [directory / f"{index}.img" for index in range(8)]
        for image in self.images:
            image.touch()
            os.truncate(image, 1 << 20)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self]:
        """In memory, as /run is. The VM takes SCSI disks out again without its guest."""
        devices = [*root_ports(8), *scsi_controller()]
        with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as name:
            bench = cls(Path(name))
            with start_vm(bench.directory, devices=devices, guest=False, paused=True) as vm:
                bench.run("vm", "adopt", "bench", "--qmp", str(vm.qmp_path))
                yield bench

    def command(self, *words: str) -> list[str]:
        """A verb with this journal."""
        return [_VMPLUG, *words, "--state-dir", str(self._state_dir)]

    def run(self, *words: str) -> str:
        """The answer of a verb, which must succeed."""
        return _output(self.command(*words))

    def attach(self, image: Path) -> list[str]:
        """The words that attach an image as a SCSI disk."""
        options = ["-o", "block-driver=virtio-scsi", "--owner", image.stem]
        return ["attach", "--device", f"file:{image}", "--vm", "bench", *options]

    def detach(self, image: Path) -> None:
        """Take it out again."""
        self.run("detach", "--owner", image.stem)


def rows() -> Iterator[Ratio]:
    """Start-up ratios, with byte-compiled modules as pip installs them."""
    number = min(os.listdir("/sys/dev/block"))
    _install()
    imported = [_PYTHON, "-c", "import vmplug; print(vmplug.__name__)"]
    yield _compare("import vmplug", imported, "vmplug", 1.1)
    with Bench.open() as bench:
        image = bench.images[0]
        resolve = [_VMPLUG, "resolve", "--device", f"b:{number}"]
        yield _compare("vmplug resolve", resolve, "/dev/", 1.0)
        check = bench.command("check", "--device", f"file:{image}")
        yield _compare("vmplug check", check, str(image), 1.6)
        yield _compare("vmplug host", bench.command("host"), "/dev/", 2.0)
        attach = bench.command(*bench.attach(image))
        yield _compare("vmplug attach", attach, "attached", 3.2, lambda: bench.detach(image))
        bench.run(*bench.attach(image))
        yield _compare("vmplug list", bench.command("list"), str(image), 1.5)
        bench.detach(image)
        start = bench.command("vm", "start", "other", "--accel", "tcg")
        stop = bench.command("vm", "stop", "other", "--timeout", "0")
        yield _compare("vmplug vm start", start, "other", 2.5, lambda: _output(stop))
        yield _at_once(bench)


def _install() -> None:
    """Make the venv, unless it is newer than what says what is in it."""
    says = [_TREE / "pyproject.toml", _TREE / "requirements-dev.lock"]
    made = Path(_VMPLUG)
    if not made.exists() or made.stat().st_mtime < max(file.stat().st_mtime for file in says):
        subprocess.run(
            [_TREE / "tools" / "make-venv", sys.executable, _BIN.parent],
            check=True,
            stdout=sys.stderr,
        )


def _compare(
    name: str,
    ours: Sequence[str],
    says: str,
    target: float,
    undo: Callable[[], object] = lambda: None,
) -> Ratio:
    base = _CLICK if ours[0] == _VMPLUG else [_PYTHON, "-c", "pass"]
    pairs = []
    for _ in rounds(_COUNT):
        ours_s, said = timed(lambda: _output(ours))
        assert says in said, said
        pairs.append((ours_s, timed(lambda: _output(base))[0]))
        undo()
    return of_pairs(f"{name}, whole process / python -c {base[-1]!r}", pairs, target=target)


def _at_once(bench: Bench) -> Ratio:
    """Eight images from eight processes, and one from one."""
    pairs = []
    for _ in rounds(5):
        eight_s, one_s = (_attach(bench, bench.images[:count]) for count in (8, 1))
        pairs.append((eight_s, one_s))
    return of_pairs("vmplug attach, eight at once / one", pairs, target=5.5)


def _attach(bench: Bench, images: Sequence[Path]) -> float:
    """Seconds to attach them all at once."""

    def attach() -> list[int]:
        running = [
            subprocess.Popen(
                bench.command(*bench.attach(image)), stdout=subprocess.DEVNULL, env=_ENVIRONMENT
            )
            for image in images
        ]
        return [process.wait() for process in running]

    seconds, statuses = timed(attach)
    assert statuses == [0] * len(images)
    for image in images:
        bench.detach(image)
    return seconds


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=_ENVIRONMENT)
    return done.stdout
