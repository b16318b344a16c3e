"""What a tenant wrote is never too much for the host: each limit, one below it and one above."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vmplug.devnum import DevNum
from vmplug.errors import SpecError
from vmplug.oci import limits
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, RngInfo, ShareInfo
from vmplug.oci.spec import Bundle, parse_config, read_bundle


def parse(**top: object) -> Bundle:
    return parse_config(json.dumps({"ociVersion": "1.0.2", **top}).encode(), name=None)


def disks(count: int) -> Bundle:
    devices = [
        {"path": f"/dev/d{index}", "type": "b", "major": 8, "minor": index}
        for index in range(count)
    ]
    return parse(linux={"devices": devices})


def rules(count: int) -> Bundle:
    rule = {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    return parse(linux={"resources": {"devices": [rule] * count}})


def mounts(count: int) -> Bundle:
    return parse(mounts=[{"destination": "/a", "source": "/b"}] * count)


def mount_options(count: int) -> Bundle:
    return parse(mounts=[{"destination": "/a", "source": "/b", "options": ["ro"] * count}])


def requests(count: int) -> Bundle:
    return parse(annotations={f"org.vmplug.rng.r{index}": "{}" for index in range(count)})


def members(count: int) -> Bundle:
    options = {f"o{index}": 1 for index in range(count)}
    return parse(annotations={"org.vmplug.rng.r": json.dumps(options)})


def nesting(depth: int) -> Bundle:
    deep = b"[" * (depth - 1) + b"]" * (depth - 1)
    return parse_config(b'{"ociVersion": "1.0.2", "x":' + deep + b"}", name=None)


def path_bytes(length: int) -> Bundle:
    path = "/d" * (length // 2) + "x" * (length % 2)
    return parse(linux={"devices": [{"path": path, "type": "p"}]})


def name_bytes(length: int) -> Bundle:
    return parse(linux={"devices": [{"path": "/dev/" + "n" * length, "type": "p"}]})


def option_bytes(length: int) -> Bundle:
    return parse(annotations={"org.vmplug.rng.r": json.dumps({"o": "x" * length})})


def kata_bytes(length: int) -> Bundle:
    word = "io.katacontainers.config.hypervisor.virtio_fs_cache"
    return parse(annotations={word: "x" * length})


def label_bytes(length: int) -> Bundle:
    return parse(annotations={"org.vmplug.rng." + "n" * length: "{}"})


@pytest.mark.parametrize(
    ("ask", "most"),
    [
        (disks, limits.DEVICES_MAX),
        (rules, limits.RULES_MAX),
        (mounts, limits.MOUNTS_MAX),
        (mount_options, limits.MOUNT_OPTIONS_MAX),
        (requests, limits.REQUESTS_MAX),
        (members, limits.OPTIONS_MAX),
        (nesting, limits.NESTING_MAX),
        (path_bytes, limits.PATH_BYTES_MAX),
        (name_bytes, limits.NAME_BYTES_MAX),
        (option_bytes, limits.OPTION_BYTES_MAX),
        (kata_bytes, limits.OPTION_BYTES_MAX),
        (label_bytes, limits.NAME_BYTES_MAX),
    ],
)
def test_as_much_as_the_limit_is_taken_and_one_more_is_refused_with_both_numbers(
    ask: Callable[[int], Bundle], most: int
) -> None:
    ask(most)
    with pytest.raises(SpecError) as caught:
        ask(most + 1)
    assert f"at most {most}" in caught.value.message
    assert str(most + 1) in caught.value.message
    assert len(caught.value.message) < 250


def test_what_containers_really_ask_for_is_far_below_the_limits() -> None:
    """A privileged container of a host with 1000 nodes, and a pod with 500 volumes."""
    devices = [
        {
            "path": f"/dev/mapper/volume-{index}",
            "type": "b",
            "major": 253,
            "minor": index,
            "fileMode": 0o60660,
            "uid": 0,
            "gid": 6,
        }
        for index in range(1000)
    ]
    allowed = [
        {"allow": True, "type": "b", "major": 253, "minor": index, "access": "rwm"}
        for index in range(1000)
    ]
    volumes = [
        {
            "destination": f"/var/run/secrets/kubernetes.io/volume-{index}",
            "type": "bind",
            "source": f"/var/lib/kubelet/pods/c0ffee/volumes/kubernetes.io~secret/{index}",
            "options": ["rbind", "rprivate", "ro"],
        }
        for index in range(500)
    ]
    bundle = parse(linux={"devices": devices, "resources": {"devices": allowed}}, mounts=volumes)
    assert (len(bundle.devices), len(bundle.mounts)) == (1000, 500)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: NetInfo(label="eth0", socket_path=f"/{text}"),
        lambda text: NetInfo(label=text, socket_path="/run/eth0.sock"),
        lambda text: ShareInfo(tag="t", source=f"/{text}"),
        lambda text: RngInfo(label=text),
        lambda text: DeviceInfo(
            container_path="/dev/vda", dev_type=DevType.BLOCK, host_path=f"/{text}"
        ),
        lambda text: DeviceInfo(
            container_path=f"/dev/{text}", dev_type=DevType.BLOCK, devnum=DevNum(8, 0)
        ),
    ],
)
def test_a_program_is_held_to_the_same_limits(make: Callable[[str], object]) -> None:
    make("x" * 255)
    with pytest.raises(SpecError, match="256 bytes; at most 255"):
        make("x" * 256)


def test_length_is_counted_in_bytes() -> None:
    with pytest.raises(SpecError, match="256 bytes; at most 255"):
        RngInfo(label="é" * 128)


# One key, one meaning


@pytest.mark.parametrize(
    "text",
    [
        '{"linux": {"devices": []}, "linux": {}}',
        '{"linux": {"devices": [], "devices": null}}',
        '{"linux": {"devices": [{"path": "/dev/a", "path": "/dev/b", "type": "p"}]}}',
        r'{"annotations": {"a": "1", "\u0061": "2"}}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="appears twice"):
        parse_config(text.encode(), name=None)


def test_a_key_that_is_there_twice_in_an_annotation_is_refused() -> None:
    with pytest.raises(SpecError, match="'source' appears twice") as caught:
        parse(annotations={"org.vmplug.rng.r": '{"source": "/dev/a", "source": "/dev/b"}'})
    assert caught.value.where == "$.annotations['org.vmplug.rng.r']"


@pytest.mark.parametrize(
    "text", [b'{"hostname": "\xff"}', b'{"hostname": "\n"}', b'{"x": "\xed\xa0\x80"}']
)
def test_ignored_parts_must_be_json_too(text: bytes) -> None:
    with pytest.raises(SpecError, match="not JSON"):
        parse_config(text, name=None)


# Where it is read from


def test_no_more_is_read_than_a_configuration_may_have(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SpecError, match=f"longer than {limits.CONFIG_BYTES_MAX} bytes"):
        read_bundle(tmp_path)
    path.write_bytes(b'{"ociVersion": "1"}'.ljust(limits.CONFIG_BYTES_MAX))
    assert read_bundle(tmp_path).devices == ()


def test_a_device_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(SpecError, match=f"longer than {limits.CONFIG_BYTES_MAX} bytes"):
        read_bundle("/dev/zero")


def test_a_fifo_without_a_writer_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SpecError, match="empty"):
        read_bundle(tmp_path)


def test_a_fifo_is_read_to_its_end_however_slowly_it_comes(tmp_path: Path) -> None:
    """As a shell's `<(command)`."""
    reading, writing = os.pipe()

    def write() -> None:
        for piece in (b'{"ociVersion": "1", "linux": ', b'{"devices": ', b"[]}}"):
            os.write(writing, piece)
        os.close(writing)

    writer = threading.Timer(0.05, write)
    writer.start()
    try:
        assert read_bundle(f"/dev/fd/{reading}").devices == ()
    finally:
        writer.join()
        os.close(reading)
