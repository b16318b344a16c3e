"""Devices of specs in an OCI config."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cdi.specs import spec_text, write_specs
from vmplug import cdi
from vmplug.errors import NoSuchDevice, SpecError

DEVICE = "vendor.com/class=dev"
Config = dict[str, Any]


def injected(tmp_path: Path, edits: str, config: Config, *, version: str = "0.7.0") -> Config:
    directory = write_specs(tmp_path / "cdi", a=spec_text(edits, version=version))
    before = copy.deepcopy(config)
    result = cdi.inject(config, [DEVICE], cdi.read_directories([directory]))
    assert config == before
    return result


def test_an_entry_replaces_the_last_of_its_key_in_place(tmp_path: Path) -> None:
    config = {"process": {"env": ["A=1", "B=1", "A=2", "C"]}}
    env = injected(tmp_path, "{env: [A=3, D=1, C=2, D=2]}", config)["process"]["env"]
    assert env == ["A=1", "B=1", "A=3", "C=2", "D=2"]


def test_a_node_takes_its_numbers_from_the_host(tmp_path: Path) -> None:
    config = {"process": {"user": {"uid": 1000, "gid": 0}}}
    edits = "{deviceNodes: [{path: /dev/a, hostPath: /dev/null, permissions: r}]}"
    assert injected(tmp_path, edits, config)["linux"] == {
        "devices": [{"path": "/dev/a", "type": "c", "major": 1, "minor": 3, "uid": 1000}],
        "resources": {
            "devices": [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}]
        },
    }


def test_a_node_replaces_the_one_with_its_path(tmp_path: Path) -> None:
    config = {"linux": {"devices": [{"path": "/dev/a", "type": "p"}, {"path": "/dev/b"}]}}
    edits = "{deviceNodes: [{path: /dev/a, type: c, major: 9, fileMode: 0600, uid: 0, gid: 5}]}"
    assert injected(tmp_path, edits, config)["linux"]["devices"] == [
        {"path": "/dev/b"},
        {
            "path": "/dev/a",
            "type": "c",
            "major": 9,
            "minor": 0,
            "fileMode": 0o600,
            "uid": 0,
            "gid": 5,
        },
    ]


def test_none_allows_nothing_and_a_fifo_has_no_rule(tmp_path: Path) -> None:
    edits = (
        "{deviceNodes: [{path: /a, type: b, major: 8, permissions: none}, {path: /b, type: p}]}"
    )
    linux = injected(tmp_path, edits, {})["linux"]
    assert linux["resources"]["devices"] == [{"allow": True, "type": "b", "major": 8, "minor": 0}]
    assert [node["path"] for node in linux["devices"]] == ["/a", "/b"]


def test_mounts_are_sorted_by_depth(tmp_path: Path) -> None:
    config = {"mounts": [{"destination": "/a/b/../c"}, {"destination": "//x"}, "odd"]}
    edits = "{mounts: [{hostPath: /h, containerPath: /y, options: [ro], type: none}]}"
    assert injected(tmp_path, edits, config)["mounts"] == [
        "odd",
        {"destination": "//x"},
        {"destination": "/y", "type": "none", "source": "/h", "options": ["ro"]},
        {"destination": "/a/b/../c"},
    ]


def test_the_rest_of_the_edits(tmp_path: Path) -> None:
    edits = (
        "{hooks: [{hookName: prestart, path: /h, timeout: 0}], additionalGids: [0, 5, 5],"
        " netDevices: [{hostInterfaceName: eth1, name: eth0}],"
        " intelRdt: {closID: a, schemata: [L3], enableMonitoring: true}}"
    )
    assert injected(tmp_path, edits, {}, version="1.1.0") == {
        "hooks": {"prestart": [{"path": "/h", "timeout": 0}]},
        "process": {"cwd": "", "user": {"uid": 0, "gid": 0, "additionalGids": [5]}},
        "linux": {
            "netDevices": {"eth1": {"name": "eth0"}},
            "intelRdt": {"closID": "a", "schemata": ["L3"], "enableMonitoring": True},
        },
    }


def test_edits_of_a_spec_come_once_before_its_first_device(tmp_path: Path) -> None:
    text = (
        "{cdiVersion: 0.5.0, kind: vendor.com/class, containerEdits: {env: [S=1, O=spec]},"
        " devices: [{name: a, containerEdits: {env: [O=a]}},"
        " {name: b, containerEdits: {env: [P=b]}}]}"
    )
    directory = write_specs(tmp_path, a=text)
    names = ["vendor.com/class=b", "vendor.com/class=a", "vendor.com/class=b"]
    result = cdi.inject({}, names, cdi.read_directories([directory]))
    assert result["process"]["env"] == ["S=1", "O=a", "P=b"]


@pytest.mark.parametrize(
    ("node", "field", "why"),
    [
        (
            "path: /dev/a, hostPath: DIR/no",
            "hostPath",
            "DIR/no is not a device node: No such file",
        ),
        ("path: DIR/link", "path", "DIR/link is not a device node, it is a symbolic link"),
        ("path: DIR/file", "path", "DIR/file is not a device node, it is a regular file"),
        (
            "path: /dev/null, type: b",
            "type",
            "/dev/null is of type c on the host, the spec says b",
        ),
    ],
)
def test_a_node_that_the_host_lacks_is_told_and_nothing_is_done(
    tmp_path: Path, node: str, field: str, why: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/dev/null")
    config: Config = {"process": {"env": ["A=1"]}}
    edits = f"{{env: [A=2], deviceNodes: [{{{node}}}]}}".replace("DIR", str(tmp_path))
    with pytest.raises(cdi.MissingNode) as raised:
        injected(tmp_path, edits, config)
    (problem,) = raised.value.problems
    assert problem.file == str(tmp_path / "cdi/a.yaml")
    assert problem.field == f"$.devices[0].containerEdits.deviceNodes[0].{field}"
    assert problem.message.startswith(why.replace("DIR", str(tmp_path)))
    assert config == {"process": {"env": ["A=1"]}}


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"process": []}, "$.process"),
        ({"process": {"env": "A=1"}}, "$.process.env"),
        ({"process": None, "linux": {"devices": {}}}, "$.linux.devices"),
    ],
)
def test_a_config_that_is_malformed_is_refused(tmp_path: Path, config: Config, path: str) -> None:
    edits = "{env: [A=1], deviceNodes: [{path: /dev/null}]}"
    with pytest.raises(SpecError, match="expected a") as raised:
        injected(tmp_path, edits, config)
    assert raised.value.where == path


def test_another_host_can_be_asked_for_its_nodes(tmp_path: Path) -> None:
    directory = write_specs(tmp_path, a=spec_text("{deviceNodes: [{path: /dev/x}]}"))

    def find(path: str) -> cdi.HostNode:
        assert path == "/dev/x"
        return cdi.HostNode(type="b", major=259, minor=7)

    result = cdi.inject({}, [DEVICE], cdi.read_directories([directory]), find=find)
    assert result["linux"]["devices"] == [
        {"path": "/dev/x", "type": "b", "major": 259, "minor": 7}
    ]


def test_a_link_is_not_followed_and_its_target_is_named(tmp_path: Path) -> None:
    (tmp_path / "by-id").symlink_to("/dev/null")
    with pytest.raises(NoSuchDevice) as raised:
        cdi.find_node(str(tmp_path / "by-id"))
    assert raised.value.hint == f"name {os.path.realpath('/dev/null')}"


def test_what_a_node_allows() -> None:
    def node(permissions: str) -> cdi.DeviceNode:
        return cdi.DeviceNode(path="/dev/a", permissions=permissions)

    assert [p for p in ("", "r", "rm", "rw", "w", "m", "none") if node(p).is_read_only] == [
        "r",
        "rm",
        "m",
        "none",
    ]
    assert [p for p in ("", "r", "rm", "rw", "w", "m", "none") if not node(p).is_usable] == [
        "m",
        "none",
    ]


def test_null_in_the_config_is_as_good_as_nothing(tmp_path: Path) -> None:
    edits = (
        "{env: [A=b], deviceNodes: [{path: /dev/null}], hooks: [{hookName: prestart, path: /h}]}"
    )
    config = {
        "process": {"env": None, "user": None},
        "linux": {"devices": None, "resources": None},
        "hooks": {"prestart": None},
        "mounts": None,
    }
    result = injected(tmp_path, edits, config)
    assert result["process"] == {"env": ["A=b"], "user": None}
    assert result["hooks"] == {"prestart": [{"path": "/h"}]}
    assert result["mounts"] is None
    assert [device["path"] for device in result["linux"]["devices"]] == ["/dev/null"]
