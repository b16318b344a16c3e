"""A config.json: what is accepted is what the rest of vmplug takes for granted."""

from itertools import product

from msgspec.structs import replace

from tests.fuzz.guard import changes_only
from vmplug.cdi.names import QualifiedName
from vmplug.cli.device import names_cdi_device, parse_cdi_names
from vmplug.drivers.block import BlockDiskDriver
from vmplug.drivers.rng import RngDriver
from vmplug.drivers.share import ShareDriver
from vmplug.drivers.vfio import VfioDriver
from vmplug.drivers.vhost_user import VhostUserDriver
from vmplug.errors import SpecError
from vmplug.host.cdi.join import add_cdi_devices
from vmplug.host.kind import DeviceType
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.limits import NAME_BYTES_MAX, PATH_BYTES_MAX, REQUESTS_MAX
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo, VfioInfo
from vmplug.oci.spec import Bundle, _decode, _Linux, _read_at_once, _read_each, parse_config

_LINES = 1000
"""Of so many a path is made that is too long: no engine makes an input of that length."""


def check(data: bytes) -> None:
    """Any bytes are refused with a JSON path, or become requests that hold what they promise."""
    with changes_only():
        first, second = _parse(data), _parse(data)
    assert first == second
    if isinstance(first, str):
        assert len(first) < 20_000
        return
    for request in (*first.devices, *first.annotated):
        check_request(request)
    _check_cdi(first)
    _check_at_once(data)


def _parse(data: bytes) -> Bundle | str:
    try:
        return parse_config(data, name="c1")
    except SpecError as error:
        return error.message


def _check_at_once(data: bytes) -> None:
    """What is read of all devices in one step is what is read of each."""
    asked = (_decode(data).linux or _Linux()).devices or []
    long = [replace(device, path="\n".join([device.path] * _LINES)) for device in asked[:1]]
    for devices, read_only in product((asked, long), (set[tuple[int, int]](), {(8, 0), (7, 1)})):
        at_once = _read_at_once(devices, read_only)
        if at_once is not None:
            each = list(_read_each(devices, read_only))
            assert list(map(repr, at_once)) == list(map(repr, each))
            assert at_once == each


def check_request(request: Request) -> None:
    """What every later step relies on."""
    assert request.name
    assert request.description
    assert all(isinstance(text, str) for text in request.driver_options.values())
    if isinstance(request, DeviceInfo):
        _check_path(request.container_path)
        assert (request.devnum is None) is (request.dev_type is DevType.FIFO) or request.host_path
    elif isinstance(request, NetInfo):
        assert request.socket_path.startswith("/")
    elif isinstance(request, ShareInfo | RngInfo):
        assert request.source.startswith(("/", "fd:"))
    _check_options(request)


def _check_cdi(bundle: Bundle) -> None:
    """Names that can be looked up, and options only for what these names may bring."""
    assert all(key.startswith("cdi.k8s.io/") for key in bundle.resolved_annotations)
    assert all(bundle.cdi_annotations.values())
    assert len(bundle.cdi_names) <= REQUESTS_MAX
    for name in bundle.cdi_names:
        assert str(QualifiedName.parse(name)) == name
        assert parse_cdi_names([name]).keys() <= {name, name.removesuffix(":ro")}
        assert names_cdi_device(name)
    assert not bundle.cdi_options or bundle.cdi_annotations
    for path in bundle.cdi_options:
        _check_path(path)
    _check_brought(bundle)


def _check_brought(bundle: Bundle) -> None:
    """A device that is in the bundle already, whatever it is, is one with what a name brings."""
    if not bundle.cdi_names:
        return
    brought = [device._replace(cdi_names=bundle.cdi_names) for device in bundle.devices]
    joined = add_cdi_devices(bundle.devices, brought, bundle.cdi_options)
    assert tuple(joined) == bundle.devices
    assert all(device.cdi_names == bundle.cdi_names for device in joined)


def _check_path(path: str) -> None:
    names = path.split("/")
    assert names[0] == ""
    assert len(names) > 1
    assert not {"", ".", ".."} & set(names[1:])
    assert "\0" not in path
    assert len(path.encode(errors="surrogateescape")) <= PATH_BYTES_MAX
    assert all(len(name.encode(errors="surrogateescape")) <= NAME_BYTES_MAX for name in names)


def _check_options(request: Request) -> None:
    """A driver takes the options or says which is wrong."""
    options = request.driver_options
    try:
        match request:
            case ShareInfo():
                ShareDriver.parse(request.tag, None, options)
            case RngInfo():
                RngDriver.parse(options)
            case VfioInfo():
                VfioDriver.parse(options)
            case NetInfo():
                VhostUserDriver.parse(DeviceType.VHOST_USER_NET, options)
            case DeviceInfo():
                BlockDiskDriver.parse(options)
    except SpecError:
        return
