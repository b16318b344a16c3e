"""What containerd makes of a spec that `vmplug cdi write` made, `cdi.inject` makes too."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cdi.containerd import VERSION_WITH_CDI, containerd, find_version
from tests.cdi.written import DISK, STABLE, write_disk
from tests.support.disks import disk_image, loop_device
from vmplug import cdi

pytestmark = pytest.mark.root

VERSION = find_version()


@pytest.fixture
def folder() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces, a loop device")
    if VERSION is None or VERSION < VERSION_WITH_CDI:
        pytest.skip("needs containerd 1.7, as Debian 13 has: tools/install-packages test")
    with TemporaryDirectory(prefix="c-", dir="/tmp") as directory:
        yield Path(directory)


def test_what_cdi_write_makes(folder: Path) -> None:
    with loop_device(disk_image(folder / "a.img", 1, "a")) as node:
        specs = write_disk(node, folder).parent
        key, value = cdi.make_annotation("vmplug", "disk", [DISK])
        with containerd(folder, specs) as engine:
            without = engine.make_config({})
            made = engine.make_config({key: value})
        injected = cdi.inject(without, [DISK], cdi.read_directories([specs]))
    for config in (made, injected):
        del config["annotations"]["io.kubernetes.cri.container-name"]
    assert made == injected
    (device,) = made["linux"]["devices"]
    assert (device["path"], device["type"]) == (f"/dev/disk/by-id/{STABLE}", "b")
    assert made["linux"]["resources"]["devices"][-1]["access"] == "r"
