"""config.json -> DeviceInfo: what engines really write, and what is wrong with the rest."""

import copy
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmplug.devnum import DevNum
from vmplug.errors import SpecError
from vmplug.oci.info import DeviceInfo, DevType, Mount
from vmplug.oci.spec import Bundle, parse_config, read_bundle

SDA = {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}


def config(*devices: object, rules: object = None, **top: object) -> bytes:
    linux = {"devices": list(devices), "resources": {"devices": rules}}
    return json.dumps({"ociVersion": "1.0.2", "linux": linux, **top}).encode()


def parse(data: bytes) -> Bundle:
    return parse_config(data, name="c1")


def one(**changes: object) -> DeviceInfo:
    """The device that /dev/sda becomes with `changes`; None leaves a key out."""
    device = {k: v for k, v in {**SDA, **changes}.items() if v is not None}
    (info,) = parse(config(device)).devices
    return info


def refusal(data: bytes) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse(data)
    return caught.value


# What engines really write


def test_a_device_needs_no_more_than_path_type_and_number() -> None:
    assert one() == DeviceInfo(
        container_path="/dev/sda", dev_type=DevType.BLOCK, devnum=DevNum(8, 0)
    )


def test_owner_and_mode_are_kept_and_absent_ones_are_none() -> None:
    assert one().file_mode is one().uid is one().gid is None
    info = one(fileMode=0o660, uid=0, gid=6)
    assert (info.file_mode, info.uid, info.gid) == (0o660, 0, 6)


@pytest.mark.parametrize(
    ("dev_type", "mode"), [("b", 0o060660), ("c", 0o020620), ("u", 0o020620), ("p", 0o010644)]
)
def test_a_mode_written_with_its_file_type_keeps_only_the_permissions(
    dev_type: str, mode: int
) -> None:
    assert one(type=dev_type, fileMode=mode).file_mode == mode & 0o7777


def test_setuid_and_sticky_bits_are_permissions_too() -> None:
    assert one(fileMode=0o067777).file_mode == 0o7777


@pytest.mark.parametrize("dev_type", ["b", "c", "u"])
def test_types_with_a_number_keep_it(dev_type: str) -> None:
    info = one(type=dev_type)
    assert (info.dev_type, info.devnum) == (dev_type, DevNum(8, 0))
    assert (info.major, info.minor) == (8, 0)


@pytest.mark.parametrize("numbers", [{"major": None, "minor": None}, {"major": 0, "minor": 0}])
def test_a_fifo_has_no_number_even_when_one_is_written(numbers: dict[str, Any]) -> None:
    info = one(type="p", **numbers)
    assert (info.devnum, info.major, info.minor) == (None, None, None)
    assert info.description == "FIFO /dev/sda"


@pytest.mark.parametrize("minor", [256, 65536, 1048575])
def test_minors_far_above_255_are_numbers_as_well(minor: int) -> None:
    assert one(minor=minor).devnum == DevNum(8, minor)


def test_several_paths_for_one_number_are_several_devices() -> None:
    bundle = parse(config(SDA, {**SDA, "path": "/dev/xvda"}))
    assert [info.container_path for info in bundle.devices] == ["/dev/sda", "/dev/xvda"]
    assert {info.devnum for info in bundle.devices} == {DevNum(8, 0)}


def test_exact_repeats_count_once_and_the_order_stays() -> None:
    fuse = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
    bundle = parse(config(SDA, fuse, SDA))
    assert [info.container_path for info in bundle.devices] == ["/dev/sda", "/dev/fuse"]


@pytest.mark.parametrize(
    "other", [{"minor": 16}, {"type": "c"}, {"fileMode": 0o600}, {"uid": 7}, {"gid": 7}]
)
def test_one_path_asked_for_in_two_ways_is_refused(other: dict[str, Any]) -> None:
    error = refusal(config(SDA, {**SDA, **other}))
    assert error.where == "$.linux.devices[1].path"
    assert "/dev/sda is requested twice" in error.message


def test_mounts_keep_their_source_and_whether_they_are_read_only() -> None:
    mounts = [
        {"destination": "/a", "source": "/dev/sdb", "options": ["rbind", "ro"]},
        {"destination": "/b", "source": "/srv/b", "type": "bind", "options": None},
        {"destination": "/proc"},
    ]
    assert parse(config(mounts=mounts)).mounts == (
        Mount(destination="/a", source="/dev/sdb", type="bind", read_only=True),
        Mount(destination="/b", source="/srv/b", type="bind", read_only=False),
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"ociVersion": "1.0.2"}',
        '{"ociVersion": "1.0.2", "linux": null, "mounts": null}',
        '{"ociVersion": "1.0.2", "linux": {}}',
        '{"ociVersion": "1.0.2", "linux": {"devices": null, "resources": null}}',
        '{"ociVersion": "1.0.2", "linux": {"resources": {"devices": null}}, "mounts": []}',
    ],
)
def test_a_container_that_asks_for_nothing_gets_nothing(text: str) -> None:
    assert parse(text.encode()) == Bundle(name="c1", devices=())


def test_everything_that_is_not_about_devices_is_ignored() -> None:
    data = config({**SDA, "vendor": {"x": 1}}, process={"args": 7}, hooks="no", mounts=[])
    assert len(parse(data).devices) == 1


# Read-only, from the device cgroup's rules

ALLOW_R = {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "rm"}
ALLOW_RW = {**ALLOW_R, "access": "rwm"}
DENY_W = {**ALLOW_R, "allow": False, "access": "w"}
DENY_ALL = {"allow": False, "access": "rwm"}
ANY_BLOCK = {"allow": True, "type": "b", "access": "rwm"}


@pytest.mark.parametrize(
    ("rules", "read_only"),
    [
        pytest.param(None, False, id="no rules"),
        pytest.param([], False, id="an empty list"),
        pytest.param([ALLOW_R], True, id="an exact rule without w"),
        pytest.param([{**ALLOW_R, "access": "m"}], True, id="mknod alone"),
        pytest.param([ALLOW_RW], False, id="an exact rule with w"),
        pytest.param([ALLOW_R, {**ALLOW_R, "access": "w"}], False, id="rules add up"),
        pytest.param([{**ALLOW_R, "access": "w"}, ALLOW_R], False, id="whatever their order"),
        pytest.param([DENY_ALL, ALLOW_R], True, id="as engines write it"),
        pytest.param([ALLOW_RW, DENY_W], True, id="a later rule takes w back"),
        pytest.param([DENY_W, ALLOW_RW], False, id="an earlier one takes nothing"),
        pytest.param([DENY_W], False, id="a denial alone names no access"),
        pytest.param([ALLOW_R, ANY_BLOCK], True, id="a wildcard does not speak of one device"),
        pytest.param([{**ALLOW_R, "minor": None}], False, id="any minor"),
        pytest.param([{**ALLOW_R, "major": -1, "minor": -1}], False, id="-1 for any number"),
        pytest.param([{**ALLOW_R, "minor": 16}], False, id="another device"),
        pytest.param([{**ALLOW_R, "type": "c"}], False, id="a character device"),
        pytest.param([{**ALLOW_R, "type": "a"}], True, id="type a is both"),
        pytest.param([{**ALLOW_R, "type": ""}], True, id="an empty type is a"),
        pytest.param([{**ALLOW_R, "type": None}], True, id="no type is a"),
        pytest.param([{**ALLOW_R, "access": ""}], False, id="empty access is all"),
        pytest.param([{**ALLOW_R, "access": None}], False, id="no access is all"),
    ],
)
def test_a_disk_is_read_only_when_exact_rules_leave_out_w(
    rules: list[object] | None, *, read_only: bool
) -> None:
    (info,) = parse(config(SDA, rules=rules)).devices
    assert info.read_only is read_only


def test_the_rules_of_disks_do_not_speak_of_character_devices() -> None:
    rule = {**ALLOW_R, "type": "c"}
    (info,) = parse(config({**SDA, "type": "c"}, rules=[rule])).devices
    assert not info.read_only


# What is wrong with it

DEVICE = "$.linux.devices[0]"


@pytest.mark.parametrize(
    ("data", "where", "message"),
    [
        (b"", "$", "empty"),
        (b" \n", "$", "empty"),
        (b"nonsense", "$", "not JSON: Expecting value: line 1 column 1"),
        (b'{\n"linux": {,}}', "$", "line 2 column"),
        (b'{"linux": {}', "$", "not JSON"),
        (b"{} {}", "$", "not JSON: Extra data: line 1 column 4"),
        (b'{"x": NaN}', "$", "not JSON"),
        (b'{"mounts": [{"destination": "\xff"}]}', "$", "not JSON"),
        (b'\xef\xbb\xbf{"linux": {}}', "$", "not JSON"),
        (b'{"x": ' + b"[" * 100_000, "$", "nested too deeply"),
        (b"[]", "$", "expected object, got array"),
        (b"null", "$", "expected object, got null"),
        (b'{"linux": 7}', "$.linux", "got int"),
        (b'{"linux": {"devices": {}}}', "$.linux.devices", "got object"),
        (b'{"linux": {"devices": [null]}}', DEVICE, "expected object, got null"),
        (b'{"linux": {"devices": [{}]}}', DEVICE, "required field path"),
        (b'{"linux": {"resources": []}}', "$.linux.resources", "got array"),
        (b'{"mounts": {}}', "$.mounts", "got object"),
        (b'{"mounts": [{"source": "/x"}]}', "$.mounts[0]", "required field destination"),
        (b'{"mounts": [{"destination": 1}]}', "$.mounts[0].destination", "got int"),
        (
            b'{"mounts": [{"destination": "/a"}, {"destination": "/b", "source": "/x\\u0000"}]}',
            "$.mounts[1].source",
            "contains a NUL",
        ),
        (
            b'{"mounts": [{"destination": "/", "options": "ro"}]}',
            "$.mounts[0].options",
            "got str",
        ),
    ],
)
def test_a_malformed_configuration_is_answered_with_the_place(
    data: bytes, where: str, message: str
) -> None:
    error = refusal(data)
    assert error.where == where
    assert message in error.message.replace("`", "")
    assert error.message.startswith(f"{where}: ")


CRICTL_INSPECT = {"status": {"id": "c1", "mounts": []}, "info": {"runtimeSpec": {}}}
CDI = {"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "devices": [], "containerEdits": {}}
CTR_INFO = {"ID": "c1", "Image": "", "Spec": {"ociVersion": "1.1.0"}}
RUNC_FEATURES = {"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0", "hooks": [], "linux": {}}
DOCKER_INSPECT = [{"Id": "c1", "Config": {}, "HostConfig": {}, "Mounts": []}]


@pytest.mark.parametrize(
    ("document", "says", "hint"),
    [
        ({}, "$.ociVersion: missing; an OCI config.json is", "pass the config.json"),
        ({"ociVersion": ""}, "$.ociVersion: missing", "pass the config.json"),
        ({"linux": {"devices": [SDA]}}, "$.ociVersion: missing", "pass the config.json"),
        (CRICTL_INSPECT, "$.ociVersion: missing; this is what crictl", "jq .info.runtimeSpec"),
        (CDI, "$.ociVersion: missing; this is a CDI specification", "config.json"),
        (DOCKER_INSPECT, "got array; this is what docker or podman", ".[0].OCIConfigPath"),
        (CTR_INFO, "$.ociVersion: missing; this is what ctr or nerdctl", "jq .Spec"),
        ([CTR_INFO], "got array; this is what ctr or nerdctl", "jq .Spec"),
        (RUNC_FEATURES, "$.ociVersion: missing; this is what runc features", "config.json"),
        ([], "got array; an OCI config.json is an object with ociVersion", "pass the"),
        (7, "got int; an OCI config.json is an object with ociVersion", "pass the"),
        ("text", "got str; an OCI config.json is an object with ociVersion", "pass the"),
        (
            {"ociVersion": "1.0.2", "id": "c1", "status": "running", "bundle": "/run/b"},
            "$: this is the state of a container",
            "pass its bundle directory, /run/b",
        ),
    ],
)
def test_another_document_is_refused_with_what_is_missing(
    document: object, says: str, hint: str
) -> None:
    error = refusal(json.dumps(document).encode())
    assert says in error.message
    assert error.hint
    assert hint in error.hint


@pytest.mark.parametrize("content", [b"ociVersion: 1.0.2\n", b"\x1f\x8b\x08\0", b"\xff\xfe{\0"])
def test_what_is_no_json_is_no_config(content: bytes) -> None:
    error = refusal(content)
    assert "not JSON" in error.message
    assert error.hint
    assert error.hint.startswith("pass the config.json")


def test_a_list_that_is_cut_off_is_refused_too() -> None:
    assert "ociVersion" in refusal(b'[{"Config": {').message


def test_an_error_in_a_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    for source in (tmp_path, file):
        file.write_bytes(config({**SDA, "major": -1}))
        with pytest.raises(SpecError) as caught:
            read_bundle(source)
        assert caught.value.where == "$.linux.devices[0].major"
        assert str(caught.value) == caught.value.message
        assert caught.value.message.startswith(f"{file}: $.linux.devices[0].major: ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    with pytest.raises(SpecError, match=r"^\$.ociVersion: missing"):
        read_bundle("-")


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"path": 7}, "path", "expected str, got int"),
        ({"path": ""}, "path", "path is empty"),
        ({"path": "dev/sda"}, "path", "not an absolute path"),
        ({"path": "/"}, "path", "not an absolute path of a device"),
        ({"path": "//"}, "path", "not an absolute path of a device"),
        ({"path": "/dev/../etc/sda"}, "path", "contains '..'"),
        ({"path": "/dev/.."}, "path", "contains '..'"),
        ({"path": "/dev/s\0da"}, "path", "contains a NUL"),
        ({"type": "x"}, "type", "'x' is not a device type; expected b, c, u or p"),
        ({"type": ""}, "type", "'' is not a device type"),
        ({"type": "B"}, "type", "'B' is not a device type"),
        ({"type": None}, "type", "got null"),
        ({"major": "8"}, "major", "got str"),
        ({"major": 8.0}, "major", "got float"),
        ({"major": True}, "major", "got bool"),
        ({"major": -1}, "major", "major -1 is not in 0..4095"),
        ({"major": 4096}, "major", "major 4096 is not in 0..4095"),
        ({"major": 10**50}, "major", "is not in 0..4095"),
        ({"minor": -1}, "minor", "minor -1 is not in 0..1048575"),
        ({"minor": 1 << 20}, "minor", "minor 1048576 is not in 0..1048575"),
        ({"major": None}, "major", "missing; a device of type b needs major and minor"),
        ({"minor": None}, "minor", "missing; a device of type b needs major and minor"),
        ({"type": "u", "minor": None}, "minor", "a device of type u needs"),
        ({"fileMode": -1}, "fileMode", "-1 is not a file mode"),
        ({"fileMode": 0o200000}, "fileMode", "is not a file mode"),
        ({"fileMode": 0o020660}, "fileMode", "is not the mode of a device of type b"),
        ({"fileMode": 0o100660}, "fileMode", "is not the mode of a device of type b"),
        ({"uid": -1}, "uid", "expected int >= 0"),
        ({"gid": 1 << 32}, "gid", "expected int <= 4294967295"),
    ],
)
def test_a_malformed_device_is_answered_with_its_key(
    change: dict[str, Any], key: str, message: str
) -> None:
    error = refusal(config({**SDA, **change}))
    assert error.where == f"{DEVICE}.{key}"
    assert message in error.message


def test_the_place_counts_the_devices_before_it() -> None:
    assert refusal(config(SDA, {**SDA, "type": "x"})).where == "$.linux.devices[1].type"


def test_a_number_too_long_for_python_is_refused_like_any_other() -> None:
    data = config(SDA).replace(b'"major": 8', b'"major": ' + b"9" * 5000)
    assert refusal(data).where == f"{DEVICE}.major"


@pytest.mark.parametrize(
    ("rule", "key", "message"),
    [
        ({**ALLOW_R, "access": "rx"}, "access", "'rx' may contain only the letters r, w and m"),
        ({**ALLOW_R, "access": "r\n"}, "access", "may contain only the letters"),
        ({**ALLOW_R, "access": 7}, "access", "got int"),
        ({**ALLOW_R, "allow": "yes"}, "allow", "expected bool"),
        ({**ALLOW_R, "major": "8"}, "major", "got str"),
    ],
)
def test_a_malformed_rule_is_answered_with_its_key(
    rule: dict[str, Any], key: str, message: str
) -> None:
    error = refusal(config(SDA, rules=[DENY_ALL, rule]))
    assert error.where == f"$.linux.resources.devices[1].{key}"
    assert message in error.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"container_path": "dev/x"}, "not an absolute path"),
        ({"dev_type": DevType.BLOCK}, "needs major and minor"),
        ({"dev_type": DevType.CHAR}, "needs major and minor"),
        ({"dev_type": DevType.FIFO, "devnum": DevNum(1, 3)}, "type p has no number"),
        ({"host_path": "/a", "devnum": DevNum(8, 0)}, "a regular file has type b"),
        ({"host_path": "/a", "dev_type": DevType.CHAR}, "a regular file has type b"),
        ({"host_path": "/a\0b"}, "contains a NUL"),
    ],
)
def test_a_request_made_by_hand_must_fit_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DeviceInfo(**{"container_path": "/dev/x", "dev_type": DevType.BLOCK, **fields})


FIFO = {"path": "/run/fifo", "type": "p"}
"""Beside it each device is looked at on its own, as it has no number."""
PATH = st.sampled_from(
    ["/dev/a", "/dev/b", "/a/../b", "/.a", "/dev//a", "/dev/a/.", "/a\nb", "/é\0", "a", "/", ""]
) | st.sampled_from(["/a" * 20, "/a" * 2048, "/" + "é" * 63, "/" + "é" * 64, "/" + "é" * 128])
ANY_DEVICE: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {"path": PATH | st.integers(0, 9).map("/dev/d{}".format), "type": st.sampled_from("bcupx")},
    optional={
        "major": st.sampled_from([0, 8, 4095, 4096, -1]),
        "minor": st.sampled_from([0, 1, 1048575, 1048576, -1]),
        "fileMode": st.sampled_from([0, 0o660, 0o7777, 0o060660, 0o020660, 0o200000, -1]),
        "uid": st.integers(0, 1),
        "gid": st.integers(0, 1),
    },
)
PLAIN_DEVICE: st.SearchStrategy[dict[str, object]] = st.builds(
    dict,
    path=st.integers(0, 99).map("/dev/d{}".format),
    type=st.sampled_from("bcu"),
    major=st.integers(7, 8),
    minor=st.integers(0, 1),
    fileMode=st.sampled_from([0, 0o660]),
)
RULE: st.SearchStrategy[dict[str, object]] = st.builds(
    dict,
    allow=st.booleans(),
    type=st.sampled_from("abc"),
    major=st.integers(7, 8),
    minor=st.integers(0, 1),
    access=st.sampled_from(["r", "rw", "rwm", "w"]),
)


@given(
    st.lists(PLAIN_DEVICE, max_size=4, unique_by=lambda device: device["path"]),
    st.lists(ANY_DEVICE, max_size=2),
    st.lists(RULE, max_size=3),
)
def test_devices_are_read_alike_all_at_once_and_one_by_one(
    good: list[object], odd: list[object], rules: list[object]
) -> None:
    def read(*devices: object) -> list[str]:
        try:
            found = parse(config(*devices, rules=rules)).devices
        except SpecError as error:
            return [str(error)]
        return [repr(info) for info in found if info.container_path != FIFO["path"]]

    assert read(*good, *odd) == read(*good, *odd, FIFO)


def test_the_lines_of_a_path_are_one_path() -> None:
    path = "/dev/a\n" * 1000 + "/b"
    short = path[-100 * len("/dev/a\n") - len("/b") :]
    assert one(path=short).container_path == short
    assert f"{len(path)} bytes; at most 4095" in refusal(config({**SDA, "path": path})).message


def test_a_request_is_a_value() -> None:
    info = one(uid=0)
    brought = info._replace(cdi_names=("vendor.com/class=a",))
    assert info == brought
    assert not info != brought  # noqa: SIM202  the other operator
    assert hash(info) == hash(brought)
    assert info != info._replace(uid=1)
    assert info != tuple(info)
    assert repr(info).startswith("DeviceInfo(container_path='/dev/sda', dev_type=<DevType.BLOCK")
    assert info._replace(driver_options={"a": "b"}).driver_options == {"a": "b"}
    with pytest.raises(AttributeError):
        info.uid = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        DeviceInfo("/dev/a", DevType.FIFO)  # type: ignore[call-arg]
    with pytest.raises(SpecError, match="not an absolute path"):
        info._replace(container_path="dev")
    for copied in (copy.deepcopy(brought), pickle.loads(pickle.dumps(brought))):
        assert repr(copied) == repr(brought)


def test_a_request_says_what_it_wants_in_a_few_words() -> None:
    assert one().description == "block device 8:0"
    assert one(type="u").description == "char device 8:0"
    disk = DeviceInfo(container_path="/dev/vda", dev_type=DevType.BLOCK, host_path="/a.img")
    assert disk.description == "file /a.img"


def test_options_cannot_be_changed_behind_a_requests_back() -> None:
    options = {"cache": "none"}
    info = DeviceInfo(
        container_path="/dev/x",
        dev_type=DevType.BLOCK,
        devnum=DevNum(8, 0),
        driver_options=options,
    )
    options["cache"] = "unsafe"
    assert info.driver_options == {"cache": "none"}


# Where it is read from


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "c42"
    directory.mkdir()
    (directory / "config.json").write_bytes(config(SDA))
    return directory


def test_a_bundle_is_a_directory_or_its_file_and_named_like_the_directory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    for source in (bundle, str(bundle), f"{bundle}/", bundle / "config.json", ".", "config.json"):
        read = read_bundle(source)
        assert (read.name, len(read.devices)) == ("c42", 1)


def test_a_linked_configuration_belongs_to_the_bundle_that_links_it(bundle: Path) -> None:
    other = bundle.parent / "c43"
    other.mkdir()
    (other / "config.json").symlink_to(bundle / "config.json")
    assert read_bundle(other).name == "c43"


def test_standard_input_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(config(SDA))))
    read = read_bundle("-")
    assert (read.name, len(read.devices)) == (None, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "No such file or directory"),
        ("empty", "No such file or directory"),
        ("file/config.json", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SpecError) as caught:
        read_bundle(tmp_path / name)
    assert caught.value.where.startswith(str(tmp_path / name))
    assert message in caught.value.message
    assert caught.value.hint


# Nothing gets through that is not SpecError

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
paths = st.sampled_from(["/dev/sda", "/dev/sdb", "", "/", "/a/../b"])
likely = st.sampled_from(["b", "c", "p", "u", "a", "rwm", "r", "", 0, 8, -1, 1 << 20, None])


def mappings(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys, each holding something likely or anything."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(keys, likely | json_values))


devices = st.builds(
    lambda path, rest: {"path": path, "type": "b", "major": 8, "minor": 0, **rest},
    paths,
    mappings("path", "type", "major", "minor", "fileMode", "uid", "gid"),
)
rules = mappings("allow", "type", "major", "minor", "access")
mounts = mappings("destination", "type", "source", "options")
configs = st.fixed_dictionaries(
    {
        "linux": st.fixed_dictionaries(
            {
                "devices": st.lists(devices, max_size=3) | json_values,
                "resources": st.fixed_dictionaries({"devices": st.lists(rules)}) | json_values,
            }
        ),
        "mounts": st.lists(mounts, max_size=2) | json_values,
    }
)


def parse_or_refuse(data: bytes) -> None:
    where, paths = "$", ["/"]
    try:
        paths = [info.container_path for info in parse(data).devices]
    except SpecError as error:
        where = error.where
    assert where.startswith("$")
    assert all(path.startswith("/") for path in paths)


@given(st.binary())
@example(b'{"linux":{"devices":[{"path":"/\\ud800","type":"p"}]}}')
@example('{"linux": {}}'.encode("utf-16"))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    parse_or_refuse(data)


@given(json_values | configs)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    parse_or_refuse(json.dumps(value).encode())


# One spelling, one name


@pytest.mark.parametrize("path", ["/dev/sda", "/dev//sda", "/dev/sda/", "/dev/./sda", "//dev/sda"])
def test_a_container_path_has_one_spelling(path: str) -> None:
    assert one(path=path) == one()


def test_two_spellings_of_one_path_are_one_request() -> None:
    assert len(parse(config(SDA, {**SDA, "path": "/dev//sda"})).devices) == 1


@pytest.mark.parametrize(("options", "answer"), [("ro", "ro"), ("rw", "rw"), ("bind", "rw")])
def test_the_options_of_a_mount_say_whether_it_is_read_only(options: str, answer: str) -> None:
    mount = {"destination": "/data", "source": "/dev/sda", "options": options.split(",")}
    assert parse(config(mounts=[mount])).mounts[0].read_only is (answer == "ro")


def test_a_bundle_in_userdata_is_named_after_the_container(tmp_path: Path) -> None:
    directory = tmp_path / "ctr1" / "userdata"
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes(config(SDA))
    assert read_bundle(directory).name == read_bundle(directory / "config.json").name == "ctr1"


def test_a_request_can_be_hashed_and_does_not_share_the_callers_options() -> None:
    options = {"cache": "none"}
    info = DeviceInfo(
        container_path="/dev/sda",
        dev_type=DevType.BLOCK,
        devnum=DevNum(8, 0),
        driver_options=options,
    )
    options["cache"] = "unsafe"
    assert info.driver_options == {"cache": "none"}
    assert len({info, info}) == 1


@pytest.mark.parametrize("type_", [None, "", "none", "bind", "BIND", "ext4", "tmpfs"])
@pytest.mark.parametrize("options", [["rbind"], ["nosuid", "bind", "ro"]])
def test_the_type_of_a_bind_mount_says_nothing(type_: str | None, options: list[str]) -> None:
    """The runtime specification calls it a dummy."""
    mount = {"destination": "/dev/x", "source": "/dev/sdb", "type": type_, "options": options}
    document = json.dumps({"ociVersion": "1.1.0", "mounts": [mount]}).encode()
    (read,) = parse(document).mounts
    assert (read.type, read.read_only) == ("bind", "ro" in options)
    mount["options"] = ["ro"]
    document = json.dumps({"ociVersion": "1.1.0", "mounts": [mount]}).encode()
    assert parse(document).mounts[0].type == type_
