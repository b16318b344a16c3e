"""Random numbers: the two options, the place and the plug."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.drivers.test_free_places import MICROVM, Q35, S390X
from vmplug.drivers.place import Offer, PlugMode
from vmplug.drivers.plug import RNGDevice
from vmplug.drivers.ports import NewPlug
from vmplug.drivers.rng import OPTIONS, RngDriver
from vmplug.drivers.select import select_driver
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.device import EntropySource
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.oci.requests import RngInfo

ID = "0123456789abcdef"
SOURCE = EntropySource("/dev/hwrng")


def plan(**options: str) -> RNGDevice:
    driver = RngDriver.parse({key.replace("_", "-"): said for key, said in options.items()})
    place = driver.choose_place(SOURCE, Q35, ())
    return driver.plan(NewPlug(id=ID, device=SOURCE, read_only=True), place, Q35)


def test_without_options_there_is_no_limit() -> None:
    assert RngDriver.parse({}) == RngDriver()
    assert plan() == RNGDevice(id=ID, filename="/dev/hwrng")
    assert set(OPTIONS) == {"max-bytes", "period"}


@pytest.mark.parametrize(
    ("options", "max_bytes", "period_ms"),
    [
        ({"max_bytes": "1"}, 1, 1000),
        ({"max_bytes": "1K"}, 1024, 1000),
        ({"max_bytes": "1024G"}, 1 << 40, 1000),
        ({"max_bytes": "64", "period": "1"}, 64, 1),
        ({"max_bytes": "64", "period": str(1 << 31)}, 64, 1 << 31),
    ],
)
def test_a_limit_has_a_period(options: dict[str, str], max_bytes: int, period_ms: int) -> None:
    planned = plan(**options)
    assert (planned.max_bytes, planned.period_ms) == (max_bytes, period_ms)


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ({"period": "1000"}, "option period", "has no effect without max-bytes"),
        ({"max-bytes": "0"}, "option max-bytes", "'0' is not a number from 1 to"),
        ({"max-bytes": "1025G"}, "option max-bytes", "'1025G' is not a number from 1 to"),
        ({"max-bytes": "9", "period": "0"}, "option period", "'0' is not a number from 1"),
        ({"max-bytes": "9", "period": "1s"}, "option period", "'1s' is not a number"),
        ({"source": "/dev/random"}, "option source", "unknown for a random number device"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name(
    options: dict[str, str], where: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        RngDriver.parse(options)
    assert caught.value.where == where


@given(st.dictionaries(st.sampled_from(list(OPTIONS)) | st.text(max_size=4), st.text()))
def test_any_options_are_taken_or_refused(options: dict[str, str]) -> None:
    error = None
    try:
        RngDriver.parse(options)
    except SpecError as caught:
        error = caught
    assert error is None or error.where.removeprefix("option ") in options


@pytest.mark.parametrize(
    ("offer", "place"),
    [
        (Q35, "rp1/00"),
        (replace(Q35, shared_memory=False), "rp1/00"),
        (S390X, "ccw/0.0.0002"),
        (MICROVM, "virtio-mmio-bus.5"),
    ],
)
def test_the_device_takes_the_place_of_any_virtio_device(offer: Offer, place: str) -> None:
    assert str(RngDriver().choose_place(SOURCE, offer, ())) == place


def test_a_vm_without_a_place_says_so() -> None:
    with pytest.raises(NoFreePort, match="no free PCI port for a random number device"):
        RngDriver().choose_place(SOURCE, Q35, ("rp1/00", "br0/01", "br0/1f"))
    with pytest.raises(CannotPlug, match="a random number device can only be plugged"):
        RngDriver().choose_place(SOURCE, replace(MICROVM, mode=PlugMode.HOT), ())


@pytest.mark.parametrize("read_only", [False, True])
def test_everybody_may_read_a_source(*, read_only: bool) -> None:
    assert list(RngDriver().check(SOURCE, read_only=read_only)) == []
    assert RngDriver().share_rw


def test_a_source_is_known_by_its_path() -> None:
    assert (str(SOURCE.identity), SOURCE.kind) == ("rng:/dev/hwrng", DeviceType.VIRTIO_RNG)
    assert SOURCE.related_identities == ()


def test_the_request_finds_its_driver() -> None:
    info = RngInfo(driver_options={"max-bytes": "1K"})
    assert select_driver(info, SOURCE) == RngDriver(max_bytes=1024)
    with pytest.raises(SpecError, match="has no effect without max-bytes"):
        select_driver(RngInfo(driver_options={"period": "1"}), SOURCE)


@pytest.mark.parametrize(
    ("number", "is_random"),
    [
        ("1:8", True),
        ("1:9", True),
        ("10:183", True),
        ("1:3", False),  # /dev/null
        ("1:11", False),  # /dev/kmsg
        ("10:130", False),  # /dev/watchdog, which a reader starts
        ("4:64", False),  # /dev/ttyS0
        ("1:1", False),  # /dev/mem
    ],
)
@pytest.mark.parametrize("name", ["/dev/hwrng", "/tmp/urandom", "/dev/kmsg"])
def test_a_source_is_one_by_its_number_whatever_its_name(
    name: str, number: str, *, is_random: bool
) -> None:
    source = EntropySource(name, f"char {number}")
    found = list(RngDriver().check(source, read_only=True))
    assert [finding.code for finding in found] == ([] if is_random else [Code.NOT_RANDOM])
    for finding in found:
        assert (number in finding.message, "/dev/urandom" in finding.hint) == (True, True)
