"""What podman makes of a spec, vmplug makes too, of podman's config without devices.

podman 4.3 has the CDI library 0.5, podman 5.4 has 0.8.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cdi.podman import make_config
from tests.cdi.written import DISK, STABLE, write_disk
from tests.cli.command import Vmplug
from tests.support.disks import disk_image, loop_device
from vmplug import cdi

pytestmark = pytest.mark.root

ALL = """
cdiVersion: 0.5.0
kind: vmplug.example/disk
containerEdits:
  env: [DISKS=all]
  hooks: [{hookName: createRuntime, path: /bin/true, args: ["true", 1], timeout: 5}]
devices:
- name: 0000:3b:00.1
  containerEdits:
    env: [DISK=data]
    deviceNodes:
    - {path: /dev/data, hostPath: /dev/null, permissions: r, fileMode: 0640, uid: 7, gid: 8}
    - {path: /dev/zero}
    - {path: /dev/loop-data, type: b, major: 7, minor: 1}
    mounts:
    - {hostPath: /usr/share, containerPath: /a/b/c, options: [ro, nosuid], type: bind}
    - {hostPath: /usr/share, containerPath: /z}
    hooks: [{hookName: poststop, path: /bin/true, env: [A=b]}]
"""
ONE = """{"cdiVersion": "0.3.0", "kind": "vmplug.example/one", "devices": [
    {"name": "a", "containerEdits": {"env": ["ONE_A=1"]}},
    {"name": "b", "containerEdits": {"env": ["ONE_B=1"], "deviceNodes": [{"path": "/dev/full"}]}}],
    "containerEdits": {"env": ["ONE=1"]}}"""
TWO = """
cdiVersion: 0.4.0
kind: vmplug.example/two
devices: [{name: c, containerEdits: {env: [TWO_C=1], mounts: [
    {hostPath: /usr, containerPath: /dev/shm/x, type: bind}]}}]
"""
SPECS = {"all.yaml": ALL, "one.json": ONE, "two.yaml": TWO}


@pytest.fixture(autouse=True)
def podman() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: a mount namespace")
    if not shutil.which("podman") and "CI" not in os.environ:
        pytest.skip("needs podman: tools/install-packages test")


@pytest.mark.parametrize(
    "devices",
    [
        ["vmplug.example/disk=0000:3b:00.1"],
        ["vmplug.example/one=b", "vmplug.example/two=c", "vmplug.example/one=a"],
        ["vmplug.example/two=c", "vmplug.example/disk=0000:3b:00.1", "vmplug.example/one=a"],
    ],
    ids=len,
)
def test_config(devices: Sequence[str], tmp_path: Path) -> None:
    without = make_config(tmp_path / "without", SPECS, [])
    made = make_config(tmp_path / "with", SPECS, devices)
    registry = cdi.read_directories([tmp_path / "with" / "specs"])
    injected = cdi.inject(without, devices, registry)
    assert _inject_by_verb(without, devices, tmp_path) == injected
    own = len(without["process"]["env"])
    assert _settle(injected, own) == _settle(made, own)
    assert _find_depths(injected) == _find_depths(made)


@pytest.mark.parametrize(
    "spec",
    [
        ALL.replace("cdiVersion: 0.5.0", "cdiVersion: 9.9.9"),
        ALL.replace("fileMode", "filemodes"),
        ALL.replace("DISK=data", "DISK"),
        ALL.replace("hookName: poststop", "hookName: later"),
    ],
    ids=["version", "field", "env", "hook"],
)
def test_refused_file(spec: str, tmp_path: Path) -> None:
    """Of both; only vmplug says which file it is, and what is wrong with it."""
    name = "vmplug.example/disk=0000:3b:00.1"
    with pytest.raises(AssertionError, match="unresolvable CDI devices"):
        make_config(tmp_path, {"all.yaml": spec}, [name])
    registry = cdi.read_directories([tmp_path / "specs"])
    with pytest.raises(cdi.UnresolvableDevices):
        cdi.inject({}, [name], registry)
    assert [problem.file for problem in registry.problems] == [str(tmp_path / "specs/all.yaml")]


def test_missing_node(tmp_path: Path) -> None:
    spec = ALL.replace("hostPath: /dev/null", f"hostPath: {tmp_path}/missing")
    name = "vmplug.example/disk=0000:3b:00.1"
    with pytest.raises(AssertionError, match="failed to stat CDI host device"):
        make_config(tmp_path, {"all.yaml": spec}, [name])
    with pytest.raises(cdi.MissingNode):
        cdi.inject({}, [name], cdi.read_directories([tmp_path / "specs"]))


def _inject_by_verb(
    config: dict[str, Any], devices: Sequence[str], folder: Path
) -> dict[str, Any]:
    file = folder / "without.json"
    file.write_text(json.dumps(config))
    specs = folder / "with" / "specs"
    done = Vmplug(folder / "state")("cdi", "inject", file, *devices, "--spec-dir", specs)
    made: dict[str, Any] = json.loads(done.answer())
    return made


def test_what_cdi_write_makes(tmp_path: Path) -> None:
    """A disk of this host under its stable name, for reading alone."""
    with loop_device(disk_image(tmp_path / "a.img", 1, "a")) as node:
        written = write_disk(node, tmp_path)
        specs = {written.name: written.read_text()}
        without = make_config(tmp_path / "without", specs, [])
        made = make_config(tmp_path / "with", specs, [DISK])
        injected = cdi.inject(without, [DISK], cdi.read_directories([written.parent]))
    own = len(without["process"]["env"])
    assert _settle(injected, own) == _settle(made, own)
    devices = made["linux"]["devices"]
    assert {"path": f"/dev/disk/by-id/{STABLE}", "type": "b"}.items() <= devices[-1].items()
    assert made["linux"]["resources"]["devices"][-1]["access"] == "r"


def _find_depths(config: dict[str, Any]) -> list[int]:
    return [mount["destination"].count("/") for mount in config["mounts"]]


def _settle(config: dict[str, Any], own: int) -> dict[str, Any]:
    """podman's own entries of env, and mounts of one depth, come in another order each time."""
    env = config["process"]["env"]
    process = config["process"] | {"env": sorted(env[:own]) + env[own:]}
    mounts = sorted(config["mounts"], key=lambda mount: mount["destination"])
    return config | {"process": process, "mounts": mounts}
