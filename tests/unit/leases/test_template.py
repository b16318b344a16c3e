"""Fields of leased devices in the words of a command."""

import pytest

from vmplug.errors import SpecError
from vmplug.leases.device import LeasedDevice, LeasedFunction
from vmplug.leases.template import fields_in, render, render_command

DISK = LeasedDevice(
    name="/dev/xvda",
    kind="block",
    host_path="/images/a.img",
    read_only=False,
    descriptor=12,
    size_bytes=512,
    format="raw",
)
NET = LeasedDevice(
    name="net:eth0",
    kind="virtio-net-pci",
    host_path="/run/eth0.sock",
    read_only=False,
    socket="/run/eth0.sock",
    mac_address="52:54:00:12:34:56",
)


def gpu(*addresses: str) -> LeasedDevice:
    functions = (LeasedFunction(bdf=bdf, sysfs_path=f"/sys/{bdf}") for bdf in addresses)
    return LeasedDevice(
        name="vfio:gpu",
        kind="vfio",
        host_path="/dev/vfio/26",
        read_only=False,
        group_node="/dev/vfio/26",
        functions=tuple(functions),
    )


ONE, TWO = gpu("0000:3b:00.0"), gpu("0000:3b:00.0", "0000:3b:00.1")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("{/dev/xvda.host_path}", "/images/a.img"),
        ("{xvda.descriptor}", "12"),
        ("path={block.host_path},readonly={block.read_only}", "path=/images/a.img,readonly=off"),
        ("{eth0.mac_address}", "52:54:00:12:34:56"),
        ("{net:eth0.socket}", "/run/eth0.sock"),
        ("{net.socket}", "/run/eth0.sock"),
        ("{vfio.sysfs_path}", "/sys/0000:3b:00.0"),
        ("{vfio.group_node}", "/dev/vfio/26"),
        (
            '{"driver":"vfio-pci","host":"{gpu.bdf}"}',
            '{"driver":"vfio-pci","host":"0000:3b:00.0"}',
        ),
        ("{}", "{}"),
        ("{print $1}", "{print $1}"),
        ('{"a":{"b.c":1}}', '{"a":{"b.c":1}}'),
    ],
)
def test_a_field_of_a_device_stands_in_a_word(word: str, value: str) -> None:
    assert render_command([DISK, NET, ONE], [word]) == [value]


def test_a_template_repeats_for_each_function() -> None:
    words = ["{vfio --device path={sysfs_path}}", "--kernel"]
    assert render_command([DISK, TWO], words) == [
        *("--device", "path=/sys/0000:3b:00.0"),
        *("--device", "path=/sys/0000:3b:00.1"),
        "--kernel",
    ]


def test_what_is_one_for_all_functions_is_one_word() -> None:
    assert render_command([TWO], ["{vfio.group_node}"]) == ["/dev/vfio/26"]


def test_a_value_never_becomes_two_words() -> None:
    spaced = LeasedDevice(name="/dev/a", kind="block", host_path="/a b", read_only=True)
    assert render([spaced], "--disk {host_path}") == ["--disk", "/a b"]
    assert render([spaced], ["--disk {read_only}"]) == ["--disk on"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("{block.colour}", "{colour}: there is no such field"),
        ("{block --x {colour}}", "{colour}: there is no such field"),
        ("{eth1.socket}", "{eth1}: no leased device is called so; there is /dev/xvda (block), "),
        ("{block.bdf}", "{bdf}: /dev/xvda has no bdf"),
        ("{vfio.bdf}", "{vfio.bdf}: it stands for 2 functions, and a word can have only one"),
    ],
)
def test_a_word_that_cannot_be_filled_is_one_sentence(word: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        render_command([DISK, TWO], [word])
    assert error.value.message.startswith(message)


def test_two_devices_of_a_kind_need_their_names() -> None:
    other = LeasedDevice(name="/dev/xvdb", kind="block", host_path="/b.img", read_only=False)
    with pytest.raises(SpecError, match="it stands for 2 devices"):
        render_command([DISK, other], ["{block.host_path}"])
    assert render_command([DISK, other], ["{xvdb.host_path}"]) == ["/b.img"]


@pytest.mark.parametrize("path", ["/a,readonly=off", "/a b", '/a"b', "/a\\b"])
def test_a_value_that_a_program_would_read_as_several_is_refused(path: str) -> None:
    named = LeasedDevice(name="/dev/a", kind="block", host_path=path, read_only=True)
    with pytest.raises(SpecError, match="more than one value"):
        render_command([named], ["path={block.host_path},readonly=on"])
    assert render_command([named], ["{block.host_path}"]) == [path]


def test_the_fields_of_a_command_are_known_before_anything_is_leased() -> None:
    assert fields_in(["{a.bdf}", "{vfio --fd {descriptor}}", '{"x":1}']) == {"bdf", "descriptor"}
    with pytest.raises(SpecError, match="no such field"):
        fields_in(["{a.colour}"])
