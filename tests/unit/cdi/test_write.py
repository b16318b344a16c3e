"""Specs that are written: the version, the text, and the file."""

import json
import os
from pathlib import Path

import pytest

from vmplug import cdi
from vmplug.errors import SpecError


def spec_of(*, name: str = "dev", kind: str = "vendor.com/class", **edits: object) -> cdi.Spec:
    edited = cdi.ContainerEdits(**edits) if edits else cdi.ContainerEdits(env=("A=1",))  # type: ignore[arg-type]
    return cdi.Spec(kind=kind, devices=(cdi.Device(name=name, container_edits=edited),))


NODE = cdi.DeviceNode(path="/dev/a")
HOST_NODE = cdi.DeviceNode(path="/dev/a", host_path="/dev/b")
MOUNT = cdi.Mount(host_path="/a", container_path="/b")
TYPED_MOUNT = cdi.Mount(host_path="/a", container_path="/b", type="none")
NET = cdi.NetDevice(host_interface_name="a", name="b")

NEEDED = [
    ("0.3.0", spec_of(device_nodes=(NODE,), mounts=(MOUNT,))),
    ("0.4.0", spec_of(mounts=(TYPED_MOUNT,))),
    ("0.5.0", spec_of(device_nodes=(HOST_NODE,), mounts=(TYPED_MOUNT,))),
    ("0.5.0", spec_of(name="0dev")),
    ("0.6.0", spec_of(kind="vendor.com/my.class", name="0dev")),
    ("0.7.0", spec_of(additional_gids=(0,))),
    ("0.7.0", spec_of(intel_rdt=cdi.IntelRdt(enable_cmt=True))),
    ("1.1.0", spec_of(intel_rdt=cdi.IntelRdt(schemata=("L3",)))),
    ("1.1.0", spec_of(net_devices=(NET,))),
]


@pytest.mark.parametrize(("version", "spec"), NEEDED)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_spec_is_written_in_the_lowest_version_and_read_again(
    tmp_path: Path, version: str, spec: cdi.Spec, suffix: str
) -> None:
    assert cdi.minimum_version(spec) == version
    file = tmp_path / "new" / f"spec{suffix}"
    cdi.write_spec(spec, file)
    again = cdi.read_spec(file)
    assert again.cdi_version == version
    assert (again.kind, again.devices) == (spec.kind, spec.devices)
    assert file.stat().st_mode & 0o777 == 0o644
    assert os.listdir(file.parent) == [file.name]


def test_any_version_can_be_asked_for_that_has_the_fields() -> None:
    spec = spec_of(device_nodes=(HOST_NODE,))
    assert json.loads(cdi.format_spec(spec, version="1.1.0"))["cdiVersion"] == "1.1.0"
    with pytest.raises(cdi.CdiError, match=r"hostPath: needs cdiVersion 0.5.0 or later"):
        cdi.format_spec(spec, version="0.3.0")
    with pytest.raises(SpecError, match=r"unknown '2.0.0', expected one of 0.3.0"):
        cdi.format_spec(spec, version="2.0.0")
    with pytest.raises(cdi.CdiError, match=r"enableMBM: is only valid before 1.1.0"):
        cdi.format_spec(spec_of(intel_rdt=cdi.IntelRdt(enable_mbm=True)), version="1.1.0")


def test_what_is_empty_is_not_written() -> None:
    text = cdi.format_spec(spec_of(device_nodes=(NODE,)))
    assert json.loads(text) == {
        "cdiVersion": "0.3.0",
        "kind": "vendor.com/class",
        "devices": [{"name": "dev", "containerEdits": {"deviceNodes": [{"path": "/dev/a"}]}}],
    }


@pytest.mark.parametrize(
    "text", ["0x1f", "1e3", "y", "~", "null", "0b1", "1_0", "a: b", "é\n", "-"]
)
def test_text_in_yaml_stays_text(text: str) -> None:
    spec = cdi.Spec(kind="v/c", annotations={text: text}, devices=spec_of().devices)
    assert cdi.parse_spec(cdi.format_spec(spec, is_yaml=True)).annotations == {text: text}


def test_a_spec_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(cdi.CdiError, match=rf"{file}: \$.devices\[0\].containerEdits.env\[0\]"):
        cdi.write_spec(spec_of(env=("A",)), file)
    with pytest.raises(SpecError, match=r"engines read only \*.json and \*.yaml"):
        cdi.write_spec(spec_of(), tmp_path / "a.yml")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        cdi.write_spec(spec_of(), tmp_path / "a.json")
    assert os.listdir(tmp_path) == ["a.json"]
