"""CDI names as requests: which nodes they bring, and that nothing else of a spec counts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.tree import HostTree
from vmplug import DeviceInfo, DevType, HostRoot, find_requests, parse_config
from vmplug.cdi import CdiError, MissingNode, UnresolvableDevices
from vmplug.devnum import DevNum
from vmplug.errors import PolicyError, SpecError
from vmplug.host.cdi.find import NothingToPlug, find_cdi_devices

HOST = HostRoot()
NULL, ZERO, FULL = DevNum(1, 3), DevNum(1, 5), DevNum(1, 7)
KIND = "vendor.com/disk"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mknod")

Node = Mapping[str, object]


def write_spec(
    directory: Path,
    devices: Mapping[str, Mapping[str, object]],
    *,
    kind: str = KIND,
    edits: Mapping[str, object] | None = None,
) -> Path:
    """A spec with the edits of each device by its name."""
    directory.mkdir(exist_ok=True)
    file = directory / f"{kind.replace('/', '-')}.json"
    listed = [{"name": name, "containerEdits": own} for name, own in devices.items()]
    spec = {"cdiVersion": "0.5.0", "kind": kind, "devices": listed, "containerEdits": edits or {}}
    file.write_bytes(msgspec.json.encode(spec))
    file.chmod(0o644)
    return file


def nodes(*listed: Node) -> dict[str, object]:
    return {"deviceNodes": list(listed)}


def find(directory: Path, *names: str) -> list[DeviceInfo]:
    return find_cdi_devices([f"{KIND}={name}" for name in names], HOST, [str(directory)])


def char(path: str, number: DevNum, *, read_only: bool = False) -> DeviceInfo:
    return DeviceInfo(
        container_path=path, dev_type=DevType.CHAR, devnum=number, read_only=read_only
    )


def test_each_node_is_a_request_and_those_of_the_spec_come_first(tmp_path: Path) -> None:
    write_spec(
        tmp_path,
        {
            "a": nodes({"path": "/dev/a", "hostPath": "/dev/null"}, {"path": "/dev/zero"}),
            "b": nodes({"path": "/dev/b", "hostPath": "/dev/full", "permissions": "rm"}),
        },
        edits=nodes({"path": "/dev/ctl", "hostPath": "/dev/null"}),
    )
    found = find(tmp_path, "a", "b")
    assert found == [
        char("/dev/ctl", NULL),
        char("/dev/a", NULL),
        char("/dev/zero", ZERO),
        char("/dev/b", FULL, read_only=True),
    ]
    assert [device.cdi_names for device in found] == [(f"{KIND}=a",)] * 3 + [(f"{KIND}=b",)]
    assert {device.cdi_kinds for device in found} == {(KIND,)}


def test_a_node_of_two_names_is_one_request(tmp_path: Path) -> None:
    both = nodes({"path": "/dev/null"})
    write_spec(tmp_path, {"a": both, "b": both})
    (found,) = find(tmp_path, "a", "b", "a")
    assert found.cdi_names == (f"{KIND}=a", f"{KIND}=b")


@pytest.mark.parametrize(
    "other", [{"path": "/dev/x", "hostPath": "/dev/zero"}, {"path": "/dev/x", "permissions": "r"}]
)
def test_a_path_of_two_devices_is_refused(other: Node, tmp_path: Path) -> None:
    one = {"path": "/dev/x", "hostPath": "/dev/null"}
    write_spec(tmp_path, {"a": nodes(one), "b": nodes({**one, **other})})
    with pytest.raises(SpecError, match=r"^/dev/x: is asked for twice .*disk=a.*disk=b"):
        find(tmp_path, "a", "b")


@pytest.mark.parametrize(
    ("permissions", "read_only"),
    [("", False), ("rw", False), ("w", False), ("mw", False), ("r", True), ("rm", True)],
)
def test_permissions_without_w_are_read_only(
    permissions: str,
    read_only: bool,  # noqa: FBT001  a row
    tmp_path: Path,
) -> None:
    write_spec(tmp_path, {"a": nodes({"path": "/dev/null", "permissions": permissions})})
    (found,) = find(tmp_path, "a")
    assert found.read_only is read_only


@pytest.mark.parametrize("permissions", ["m", "none"])
def test_a_node_without_access_is_refused_with_all_others(
    permissions: str, tmp_path: Path
) -> None:
    useless = {"path": "/dev/zero", "permissions": permissions}
    file = write_spec(tmp_path, {"a": nodes({"path": "/dev/null"}, useless)})
    with pytest.raises(NothingToPlug, match=f"'{permissions}' allows neither") as caught:
        find(tmp_path, "a")
    where = "$.devices[0].containerEdits.deviceNodes[1].permissions"
    assert str(caught.value).startswith(f"{file}: {where}: ")


def test_a_device_without_nodes_is_refused_with_what_it_has(tmp_path: Path) -> None:
    hook = {"hookName": "poststop", "path": f"{tmp_path}/never-run"}
    mount = {"hostPath": f"{tmp_path}/never-seen", "containerPath": "/x"}
    write_spec(tmp_path, {"a": {"env": ["A=b"], "hooks": [hook]}}, edits={"mounts": [mount]})
    with pytest.raises(NothingToPlug, match=r"only env and mounts and hooks: a VM gets"):
        find(tmp_path, "a")


@pytest.mark.parametrize(
    ("node", "field", "why"),
    [
        ({"hostPath": "/dev/not-here"}, "hostPath", "No such file"),
        ({"path": "/dev/not-here"}, "path", "No such file"),
        ({"hostPath": "/dev/stdin"}, "hostPath", "symbolic link"),
        ({"hostPath": "/dev/null", "type": "b"}, "hostPath", "of type c"),
        (
            {"hostPath": "/dev/null", "type": "c", "major": 1, "minor": 5},
            "hostPath",
            r"/dev/null is c 1:3 on the host, the spec says c 1:5",
        ),
        (
            {"hostPath": "/dev/not-here", "type": "c", "major": 1, "minor": 3},
            "hostPath",
            "No such",
        ),
        ({"type": "c", "major": 1 << 40, "minor": 3}, "path", "major"),
        (
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 5},
            "path",
            r"/dev/null is c 1:3 on the host, the spec says c 1:5",
        ),
    ],
)
def test_a_node_that_is_not_the_one_of_the_spec_is_refused(
    node: Node, field: str, why: str, tmp_path: Path
) -> None:
    write_spec(tmp_path, {"a": nodes({"path": "/dev/x", **node})})
    with pytest.raises(MissingNode, match=rf"deviceNodes\[0\]\.{field}: .*{why}"):
        find(tmp_path, "a")


def test_a_number_alone_is_what_a_spec_asks_for(tmp_path: Path) -> None:
    """As OCI does, where the path is one of the container alone."""
    number = {"type": "c", "major": 1, "minor": 3}
    write_spec(tmp_path, {"a": nodes({"path": "/dev/x", **number})})
    assert find(tmp_path, "a") == [char("/dev/x", NULL)]


def test_all_or_nothing(tmp_path: Path) -> None:
    write_spec(tmp_path, {"a": nodes({"path": "/dev/null"})})
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UnresolvableDevices) as caught:
        find(tmp_path, "a", "gone")
    assert caught.value.names == (f"{KIND}=gone",)
    assert caught.value.directories == (str(tmp_path),)
    assert [problem.file for problem in caught.value.problems] == [str(tmp_path / "bad.json")] * 3


@pytest.mark.parametrize("name", ["vendor.com/disk", "disk=a", "1/disk=a", "vendor.com/disk="])
def test_a_malformed_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        find_cdi_devices([name], HOST, [str(tmp_path)])


def test_without_directories_cdi_is_off() -> None:
    with pytest.raises(PolicyError, match=r"disk=a cannot be resolved: CDI is off"):
        find_cdi_devices([f"{KIND}=a"], HOST, [])
    assert find_cdi_devices([], HOST, []) == []


@pytest.mark.parametrize("writable", ["file", "directory"])
def test_a_spec_that_others_can_write_is_not_trusted(writable: str, tmp_path: Path) -> None:
    file = write_spec(tmp_path / "cdi", {"a": nodes({"path": "/dev/null"})})
    changed = file if writable == "file" else file.parent
    changed.chmod(0o777)
    with pytest.raises(PolicyError, match=f"{changed} is writable by others") as caught:
        find(tmp_path / "cdi", "a")
    assert caught.value.hint == f"chown root {changed}; chmod go-w {changed}"


def test_a_spec_behind_a_link_is_not_trusted_where_others_can_exchange_it(tmp_path: Path) -> None:
    file = write_spec(tmp_path / "real", {"a": nodes({"path": "/dev/null"})})
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/a.json").symlink_to(file)
    assert len(find(tmp_path / "cdi", "a")) == 1
    file.parent.chmod(0o777)
    with pytest.raises(PolicyError, match=f"{file.parent} is writable by others"):
        find(tmp_path / "cdi", "a")


@needs_root
def test_below_a_root_specs_and_nodes_are_those_of_that_host(tmp_path: Path) -> None:
    tree = HostTree(tmp_path / "host").node("/dev/null", "b", "7:9").link("/var/run", "/run")
    (tmp_path / "host/run").mkdir()
    write_spec(tmp_path / "host/run/cdi", {"a": nodes({"path": "/dev/null"})})
    (found,) = find_cdi_devices([f"{KIND}=a"], tree.root)
    assert (found.dev_type, found.devnum) == (DevType.BLOCK, DevNum(7, 9))


# bundles


def bundle(
    directory: Path, annotations: Mapping[str, str], *devices: Mapping[str, Any]
) -> Sequence[Any]:
    """What a bundle requests whose config.json has these annotations and devices."""
    config = {
        "ociVersion": "1.0.2",
        "annotations": annotations,
        "linux": {"devices": list(devices)},
    }
    parsed = parse_config(msgspec.json.encode(config), name="c1")
    return find_requests(parsed, HOST, [str(directory)])


ASKED = {"cdi.k8s.io/vendor_a": f"{KIND}=a"}
IN_BUNDLE = {"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "uid": 7}


def test_an_annotation_whose_device_is_there_already_is_one_device(tmp_path: Path) -> None:
    """An engine that resolves an annotation may leave it there."""
    node = {"path": "/dev/x", "hostPath": "/dev/null", "permissions": "r"}
    write_spec(tmp_path, {"a": nodes(node, {"path": "/dev/zero"})})
    own = {"path": "/dev/own", "type": "c", "major": 1, "minor": 7}
    found = bundle(tmp_path, ASKED, own, IN_BUNDLE)
    assert [(each.name, each.read_only, each.uid) for each in found] == [
        ("/dev/own", False, None),
        ("/dev/x", True, 7),
        ("/dev/zero", False, None),
    ]
    assert [each.cdi_names for each in found] == [(), (f"{KIND}=a",), (f"{KIND}=a",)]


def test_an_annotation_for_another_device_of_that_path_is_refused(tmp_path: Path) -> None:
    write_spec(tmp_path, {"a": nodes({"path": "/dev/x", "hostPath": "/dev/zero"})})
    with pytest.raises(SpecError, match=r"^/dev/x: is asked for twice .*1:3 and .*1:5 by"):
        bundle(tmp_path, ASKED, IN_BUNDLE)


def test_an_annotation_that_cannot_be_resolved_is_refused(tmp_path: Path) -> None:
    """Also where the device is in the bundle: nothing says that it is this one."""
    with pytest.raises(UnresolvableDevices):
        bundle(tmp_path, ASKED, IN_BUNDLE)
    parsed = parse_config(
        msgspec.json.encode({"ociVersion": "1.0.2", "annotations": ASKED}), name="c1"
    )
    with pytest.raises(PolicyError, match="CDI is off"):
        find_requests(parsed, HOST, [])


def test_options_reach_what_a_name_brings(tmp_path: Path) -> None:
    write_spec(tmp_path, {"a": nodes({"path": "/dev/x", "hostPath": "/dev/null"})})
    options = {"org.vmplug.options./dev/x": '{"mode": "guest-kernel"}'}
    (found,) = bundle(tmp_path, ASKED | options)
    assert found.driver_options == {"mode": "guest-kernel"}
    with pytest.raises(SpecError, match="does not request a device at /dev/y"):
        bundle(tmp_path, ASKED | {"org.vmplug.options./dev/y": "{}"})


def test_an_error_of_a_spec_is_one_of_a_request() -> None:
    assert issubclass(NothingToPlug, CdiError)
    assert issubclass(MissingNode, SpecError)
