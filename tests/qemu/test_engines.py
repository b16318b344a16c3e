"""podman and containerd with examples/oci-wrapper: a container's disk is in a VM that runs."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.world import Picture, take_picture
from tests.support.disks import disk_image, loop_device
from tests.support.engines import ENGINES, Engine
from tests.support.vm import GuestVm

pytestmark = [pytest.mark.root, pytest.mark.qemu]

NAME = "vmplug.example/disk=data"
SPEC = """{"cdiVersion": "0.5.0", "kind": "vmplug.example/disk", "devices": [{"name": "data",
    "containerEdits": {"deviceNodes": [{"path": "/dev/data", "hostPath": "%s"}]}}]}"""
SLEEP = "/bin/busybox sleep 1000"


@dataclass(frozen=True, slots=True)
class World:
    """An engine, the VM sb1 that its containers name, and a disk that is theirs."""

    engine: Engine
    vmplug: Vmplug
    vm: GuestVm
    disk: Path
    images: Path

    @property
    def device(self) -> str:
        """The disk, as the engine is asked for it."""
        return NAME if self.engine.knows_cdi else str(self.disk)

    def picture(self) -> Picture:
        """The journal, and what is in the VM."""
        return take_picture(self.vmplug.state_dir, [self.vm.oracle], self.images)


@pytest.fixture(params=ENGINES)
def world(request: pytest.FixtureRequest, q35_vm: GuestVm, tmp_path: Path) -> Iterator[World]:
    made_by = ENGINES[request.param]
    if "CI" not in os.environ and not (shutil.which(made_by.program) and shutil.which("runc")):
        pytest.skip(f"needs {made_by.program} and runc: tools/install-packages test")
    image = disk_image(tmp_path / "data.img", 8, "of a container")
    with (
        loop_device(image) as disk,
        tempfile.TemporaryDirectory("", "vmplug-", "/tmp") as made,
    ):
        vmplug = Vmplug(Path(made) / "state")
        vmplug("vm", "adopt", "sb1", "--qmp", q35_vm.qmp_path).answer()
        engine = made_by(Path(made), vmplug.state_dir)
        (engine.specs / "disk.json").write_text(SPEC % disk)
        with engine.running():
            yield World(engine, vmplug, q35_vm, disk, tmp_path)
            engine.remove("c1")
        q35_vm.console.wait_for_disks(0)


def test_the_guest_reads_the_disk_for_as_long_as_the_container_is_there(world: World) -> None:
    before = world.picture()
    started = world.engine.start("c1", world.device, SLEEP, vm="sb1")
    assert started.status == 0, started
    (seen,) = world.vm.console.wait_for_disks(1)
    assert seen.marker == "of a container"
    (held,) = world.vmplug("list", "--json").json()["attachments"]
    assert held["host_path"] == str(world.disk)
    removed = world.engine.remove("c1")
    assert removed.status == 0, removed
    assert world.picture() == before


def test_a_mounted_disk_is_refused_with_a_hint(world: World) -> None:
    world.engine.run("mkfs.ext4", "-q", world.disk).answer()
    world.engine.run("mount", world.disk, "/mnt").answer()
    before = world.picture()
    refused = world.engine.start("c1", world.device, SLEEP, vm="sb1")
    assert refused.status != 0
    assert f"{world.disk} is mounted" in refused.stderr
    assert "hint: " in refused.stderr
    assert world.picture() == before
    world.engine.remove("c1")
    assert world.picture() == before


def test_a_container_that_cannot_be_made_leaves_nothing(world: World) -> None:
    before = world.picture()
    refused = world.engine.start("c1", world.device, "/bin/nothing", vm="sb1")
    assert refused.status != 0
    assert "/bin/nothing" in refused.stderr
    assert world.picture() == before
    world.engine.remove("c1")
    assert world.picture() == before
