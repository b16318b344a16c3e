"""Annotations of a bundle: strict JSON that asks for what OCI has no word for."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmplug.errors import SpecError
from vmplug.oci.annotations import PREFIX, Annotated, read_annotations
from vmplug.oci.limits import ANNOTATION_BYTES_MAX, REQUESTS_MAX
from vmplug.oci.requests import Named, NetInfo, RngInfo, ShareInfo
from vmplug.oci.spec import Bundle, parse_config

NET, SHARE, RNG = f"{PREFIX}net.eth0", f"{PREFIX}share.work", f"{PREFIX}rng.rng0"
OPTIONS = f"{PREFIX}options./dev/sda"
KATA = "io.katacontainers.config.hypervisor."

Value = str | int | bool


def annotate(**members: Value) -> str:
    """An annotation's value; `read_only` is the member `read-only`."""
    return json.dumps({name.replace("_", "-"): value for name, value in members.items()})


def one(key: str, value: str, **katas: str) -> Named:
    """The only request, of a bundle that has Kata's annotations too."""
    others = {f"{KATA}{word}": said for word, said in katas.items()}
    (request,) = read_annotations({**others, key: value}).requests
    return request


def refusal(key: str, value: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        read_annotations({key: value})
    return caught.value


# What they ask for


def test_a_bundle_without_annotations_of_ours_asks_for_nothing() -> None:
    theirs = {"org.vmplugin.net.eth0": "[", "org.vmplug": "[", "io.kubernetes.cri.x": "["}
    assert read_annotations({}) == read_annotations(theirs) == Annotated(requests=(), options={})


def test_the_name_of_a_vm_is_text_as_it_stands() -> None:
    annotations = {f"{PREFIX}vm": "sb1", NET: annotate(socket="/a")}
    assert read_annotations(annotations).vm == "sb1"
    config = {"ociVersion": "1.0.2", "annotations": annotations}
    assert parse_config(json.dumps(config).encode(), name=None).vm == "sb1"
    assert parse_config(b'{"ociVersion": "1.0.2"}', name=None).vm is None


def test_the_name_of_a_vm_has_no_name_of_its_own_and_is_short() -> None:
    assert "'vm' is not a kind" in refusal(f"{PREFIX}vm.sb1", "{}").message
    assert refusal(f"{PREFIX}vm", "x" * 5000).where == f"$.annotations['{PREFIX}vm']"


def test_a_network_is_a_socket_and_its_options() -> None:
    value = annotate(socket="/run/vpp/eth0.sock", mac="52:54:00:aa:bb:cc", queues=2)
    assert one(NET, value) == NetInfo(
        label="eth0",
        socket_path="/run/vpp/eth0.sock",
        driver_options={"mac": "52:54:00:aa:bb:cc", "queues": "2"},
    )


def test_a_share_is_a_tag_a_source_and_whether_it_is_only_read() -> None:
    value = annotate(source="/srv/work", read_only=True, cache="auto")
    assert one(SHARE, value) == ShareInfo(
        tag="work", source="/srv/work", read_only=True, driver_options={"cache": "auto"}
    )
    assert not one(SHARE, annotate(source="/srv/work")).read_only
    assert not one(SHARE, annotate(source="/srv/work", read_only=False)).read_only


def test_random_numbers_need_no_source() -> None:
    assert one(RNG, "{}") == RngInfo(label="rng0", source="/dev/urandom")
    assert one(RNG, annotate(source="/dev/hwrng", max_bytes=1024, period=1000)) == RngInfo(
        label="rng0",
        source="/dev/hwrng",
        driver_options={"max-bytes": "1024", "period": "1000"},
    )


def test_options_are_kept_by_the_one_spelling_of_their_path() -> None:
    value = annotate(block_driver="virtio-scsi", cache="none")
    (path, options), *others = read_annotations(
        {f"{PREFIX}options.//dev/./sda": value}
    ).options.items()
    assert (path, others) == ("/dev/sda", [])
    assert options == {"block-driver": "virtio-scsi", "cache": "none"}


def test_a_name_may_hold_dots() -> None:
    assert one(f"{PREFIX}share.a.b", annotate(source="/a")).name == "share:a.b"
    key = f"{PREFIX}options./dev/v.1/x"
    assert read_annotations({key: "{}"}).options == {"/dev/v.1/x": {}}


def test_every_kind_of_value_becomes_the_text_of_the_command_line() -> None:
    value = '{"a": "x", "b": 7, "c": true, "d": false, "e": -1, "f": ""}'
    assert read_annotations({OPTIONS: value}).options == {
        "/dev/sda": {"a": "x", "b": "7", "c": "on", "d": "off", "e": "-1", "f": ""}
    }


def test_requests_come_in_the_order_of_the_annotations() -> None:
    keys = [SHARE, RNG, NET, f"{PREFIX}share.a"]
    members = annotate(source="/a"), "{}", annotate(socket="/s"), annotate(source="/b")
    found = read_annotations(dict(zip(keys, members, strict=True))).requests
    assert [request.name for request in found] == ["share:work", "rng:rng0", "net:eth0", "share:a"]


# What Kata's own annotations mean


def test_katas_words_for_a_sandbox_are_the_defaults_of_its_shares() -> None:
    katas = {
        "shared_fs": "virtio-fs",
        "virtio_fs_cache": "always",
        "virtio_fs_cache_size": "512",
        "virtio_fs_queue_size": "128",
    }
    request = one(SHARE, annotate(source="/srv"), **katas)
    assert request.driver_options == {
        "filesystem": "virtio-fs",
        "cache": "always",
        "cache-size": "512",
        "queue-size": "128",
    }
    own = one(SHARE, annotate(source="/srv", cache="never"), **katas)
    assert own.driver_options == {**request.driver_options, "cache": "never"}


def test_katas_entropy_source_is_the_default_one() -> None:
    assert one(RNG, "{}", entropy_source="/dev/random") == RngInfo(source="/dev/random")
    own = one(RNG, annotate(source="/dev/hwrng"), entropy_source="/dev/random")
    assert own == RngInfo(source="/dev/hwrng")


def test_katas_other_words_are_passed_over() -> None:
    katas = {"default_vcpus": "4", "block_device_driver": "nvdimm", "virtio_fs_cache": "auto"}
    assert one(RNG, "{}", **katas) == RngInfo()
    assert one(NET, annotate(socket="/s"), **katas) == NetInfo(label="eth0", socket_path="/s")


# What is wrong with them


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "truncated"),
        ("nonsense", "JSON is malformed"),
        ("[]", "Expected `object`, got `array`"),
        ("null", "Expected `object`, got `null`"),
        ('"/srv"', "Expected `object`, got `str`"),
        ("{'source': '/a'}", "JSON is malformed"),
        ('{"source": "/a",}', "JSON is malformed"),
        ('{"source": "/a"} {}', "trailing characters"),
        ('\ufeff{"source": "/a"}', "JSON is malformed"),
        ('{"source": "/a", "x": 1.0}', "got `float`"),
        ('{"source": "/a", "x": 1e3}', "got `float`"),
        ('{"source": "/a", "x": null}', "got `null`"),
        ('{"source": "/a", "x": NaN}', "JSON is malformed"),
        ('{"source": "/a", "x": ["y"]}', "got `array`"),
        ('{"source": "/a", "x": {"y": 1}}', "got `object`"),
        ('{"source": "/a", "x": ' + "[" * 100_000, "got `array`"),
        ('{"source": "/a", "x": ' + "9" * 5000 + "}", "out of range"),
        ('{"source": "/\\ud800"}', "truncated"),
        ('{"source": "/\ud800"}', "can't encode"),
        ("\udcff", "can't encode"),
    ],
)
@pytest.mark.parametrize("key", [NET, SHARE, RNG, OPTIONS])
def test_a_value_that_is_not_an_object_of_words_is_refused_with_its_annotation(
    key: str, value: str, message: str
) -> None:
    error = refusal(key, value)
    assert error.where == f"$.annotations[{key!r}]"
    assert message in error.message
    assert repr(value[:60]) in error.message
    assert error.hint
    assert len(error.message) < 500


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (NET, "{}", "the member 'socket' is missing"),
        (NET, annotate(source="/a"), "the member 'socket' is missing"),
        (NET, annotate(socket="run/s"), "the member 'socket' is 'run/s', expected an absolute"),
        (NET, annotate(socket=""), "the member 'socket' is '', expected an absolute path"),
        (NET, annotate(socket=3), "the member 'socket' is 3, expected an absolute path"),
        (NET, annotate(socket=True), "the member 'socket' is True, expected an absolute path"),
        (SHARE, "{}", "the member 'source' is missing"),
        (SHARE, annotate(source="srv"), "the member 'source' is 'srv', expected an absolute"),
        (SHARE, annotate(source="/a", read_only="on"), "'read-only' is 'on', expected true or"),
        (SHARE, annotate(source="/a", read_only=1), "'read-only' is 1, expected true or false"),
        (RNG, annotate(source="urandom"), "'source' is 'urandom', expected an absolute path"),
        (f"{PREFIX}options.", "{}", "path is empty"),
        (f"{PREFIX}options.dev/sda", "{}", "'dev/sda' is not an absolute path"),
        (f"{PREFIX}options./", "{}", "'/' is not an absolute path"),
        (f"{PREFIX}options./dev/../sda", "{}", "contains '..'"),
        (f"{PREFIX}disk.a", "{}", "'disk' is not a kind of annotation"),
        (f"{PREFIX}Net.a", "{}", "'Net' is not a kind of annotation"),
        (PREFIX, "{}", "'' is not a kind of annotation"),
    ],
)
def test_a_wrong_member_is_refused_with_its_annotation(key: str, value: str, message: str) -> None:
    error = refusal(key, value)
    assert error.where == f"$.annotations[{key!r}]"
    assert message in error.message


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    hint = refusal(f"{PREFIX}disk.a", "{}").hint or ""
    assert all(kind in hint for kind in ("net", "share", "rng", "options"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (SHARE, annotate(source="fd:3")),
        (NET, annotate(socket="fd:3")),
        (RNG, annotate(source="fd:0")),
    ],
)
def test_a_bundle_cannot_name_a_descriptor_of_another_process(key: str, value: str) -> None:
    error = refusal(key, value)
    assert "expected an absolute path" in error.message
    assert "fd:" in error.message


@pytest.mark.parametrize(
    ("key", "value", "where", "message"),
    [
        (f"{PREFIX}net.", annotate(socket="/s"), "net ''", "printable text without '/'"),
        (f"{PREFIX}share.a/b", annotate(source="/a"), "share 'a/b'", "printable text without"),
        (f"{PREFIX}share.{'x' * 37}", annotate(source="/a"), f"share:{'x' * 37}", "36 bytes"),
        (f"{PREFIX}rng.a\nb", "{}", "rng 'a\\nb'", "printable text without '/'"),
        (NET, annotate(socket="/a\0b"), "net:eth0", "is not an absolute path"),
    ],
)
def test_a_wrong_name_is_refused_like_any_requests(
    key: str, value: str, where: str, message: str
) -> None:
    error = refusal(key, value)
    assert error.where == where
    assert message in error.message


# Any text gives requests or a refusal

names = st.sampled_from(["net", "share", "rng", "options", "disk", ""]) | st.text(max_size=8)
members = st.dictionaries(
    st.sampled_from(["socket", "source", "read-only", "cache"]) | st.text(max_size=4),
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.none()
    | st.text(max_size=8)
    | st.sampled_from(["/a", "/run/s", "fd:3", "on"])
    | st.lists(st.integers(), max_size=1),
    max_size=4,
)
any_character = st.characters()
any_text = st.text(any_character | st.characters(categories=["Cs"]), max_size=40)


def read_or_refuse(annotations: Mapping[str, str]) -> Annotated | SpecError:
    try:
        return read_annotations(annotations)
    except SpecError as error:
        return error


@given(names, st.text(max_size=8), any_text)
@example("share", "a", "{}")
@example("share", "\udcff", '{"source": "/a"}')
def test_any_value_gives_requests_or_is_refused(kind: str, name: str, value: str) -> None:
    answer = read_or_refuse({f"{PREFIX}{kind}.{name}": value})
    assert isinstance(answer, SpecError) or answer.requests or answer.options


@given(names, st.text("/abc.é", max_size=8), members)
def test_any_object_gives_requests_with_its_members_or_is_refused(
    kind: str, name: str, found: dict[str, object]
) -> None:
    answer = read_or_refuse({f"{PREFIX}{kind}.{name}": json.dumps(found)})
    if isinstance(answer, SpecError):
        assert answer.message
        return
    for request in answer.requests:
        taken = {"source", "socket", "read-only"} & found.keys()
        assert len(request.driver_options) >= len(found) - len(taken)
        assert request.driver_options.keys() <= found.keys()
    for path, options in answer.options.items():
        assert path.startswith("/")
        assert options.keys() == found.keys()


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=4))
def test_texts_reach_the_driver_as_they_were_written(options: dict[str, str]) -> None:
    assert read_annotations({OPTIONS: json.dumps(options)}).options == {"/dev/sda": options}


# In their bundle

SDA = {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}


def bundle(annotations: Mapping[str, str], **top: object) -> Bundle:
    config = {
        "ociVersion": "1.0.2",
        "annotations": annotations,
        "linux": {"devices": [SDA]},
        **top,
    }
    return parse_config(json.dumps(config).encode(), name="c1")


def test_a_bundle_holds_what_its_annotations_ask_for() -> None:
    asked = bundle({SHARE: annotate(source="/srv"), RNG: "{}", "theirs": "["})
    assert [request.name for request in asked.annotated] == ["share:work", "rng:rng0"]
    assert bundle({}).annotated == ()


def test_options_reach_the_device_and_the_mount_of_their_path() -> None:
    mounts = [{"destination": "/data/", "source": "/dev/sdb"}]
    asked = bundle(
        {OPTIONS: annotate(cache="none"), f"{PREFIX}options./data": annotate(fstype="xfs")},
        mounts=mounts,
    )
    assert [info.driver_options for info in asked.devices] == [{"cache": "none"}]
    assert [mount.driver_options for mount in asked.mounts] == [{"fstype": "xfs"}]


def test_a_device_without_options_of_its_own_has_none() -> None:
    assert [info.driver_options for info in bundle({}).devices] == [{}]


def test_options_without_a_request_are_refused_with_a_hint() -> None:
    key = f"{PREFIX}options./dev/sdz"
    with pytest.raises(SpecError, match="does not request a device at /dev/sdz") as caught:
        bundle({key: "{}"})
    assert caught.value.where == f"$.annotations[{key!r}]"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("annotations", "where"),
    [
        ({"a": 7}, "$.annotations[...]"),
        ([], "$.annotations"),
        ("x", "$.annotations"),
    ],
)
def test_annotations_are_an_object_of_texts(annotations: object, where: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_config(json.dumps({"annotations": annotations}).encode(), name=None)
    assert caught.value.where == where


# CDI


def cdi(**named: str) -> dict[str, str]:
    return {f"cdi.k8s.io/{key}": names for key, names in named.items()}


def test_annotations_of_cdi_are_names_by_key() -> None:
    asked = bundle(cdi(b="vendor.com/x=2,vendor.com/x=1", a="vendor.com/x=1"))
    assert asked.cdi_annotations == {
        "cdi.k8s.io/a": ("vendor.com/x=1",),
        "cdi.k8s.io/b": ("vendor.com/x=2", "vendor.com/x=1"),
    }
    assert asked.cdi_names == ("vendor.com/x=1", "vendor.com/x=2")
    assert asked.resolved_annotations == ("cdi.k8s.io/a", "cdi.k8s.io/b")
    assert bundle({"cdi.k8s.iox/a": "?"}).resolved_annotations == ()


@pytest.mark.parametrize("value", ["", "vendor.com/x", "vendor.com/x=1,", "vendor.com/x=1, y/z=1"])
def test_a_malformed_annotation_of_cdi_is_refused(value: str) -> None:
    with pytest.raises(SpecError, match=r"annotation cdi\.k8s\.io/a: "):
        bundle(cdi(a=value))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("vendor.com/x=1" + "1" * ANNOTATION_BYTES_MAX, "bytes; at most"),
        (",".join(["v/x=1"] * (REQUESTS_MAX + 1)), "1025 CDI devices; at most 1024"),
    ],
)
def test_too_many_names_are_refused(value: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        bundle(cdi(a=value))
