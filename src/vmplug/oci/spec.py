"""What an OCI runtime configuration says about devices, as typed values.

vmplug reads only the parts that concern devices: `linux.devices`, `linux.resources.devices`,
`mounts` and the `annotations` of `vmplug.oci.annotations`. It ignores everything else.
Source: opencontainers/runtime-spec config.md and config-linux.md.
"""

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, cast

import msgspec
from msgspec.structs import replace

from vmplug.devnum import MAJOR_MAX, MINOR_MAX, DevNum
from vmplug.errors import SpecError
from vmplug.oci.annotations import (
    PREFIX,
    annotation_path,
    read_annotations,
    read_cdi_annotations,
)
from vmplug.oci.document import check_nesting, check_repeats
from vmplug.oci.info import DeviceInfo, DevType, Mount, are_plain, normal_container_path
from vmplug.oci.limits import (
    CONFIG_BYTES_MAX,
    DEVICES_MAX,
    MOUNT_OPTIONS_MAX,
    MOUNTS_MAX,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    RULES_MAX,
    check_count,
    check_path,
)
from vmplug.oci.mount_options import is_bind, is_read_only
from vmplug.oci.requests import Named
from vmplug.oci.source import read_source

Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
_Number = tuple[int, int]
Word = Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]


class _Device(msgspec.Struct, rename="camel", frozen=True, kw_only=True, gc=False):
    path: str
    type: Word
    major: int | None = None
    minor: int | None = None
    file_mode: int | None = None
    uid: Id | None = None
    gid: Id | None = None


class _Rule(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    allow: bool = False
    type: Word | None = None
    major: int | None = None
    minor: int | None = None
    access: Word | None = None


class _Mount(msgspec.Struct, frozen=True, kw_only=True):
    destination: str
    type: str | None = None
    source: str | None = None
    options: list[str] | None = None


class _Resources(msgspec.Struct, frozen=True, kw_only=True):
    devices: list[_Rule] | None = None


class _Linux(msgspec.Struct, frozen=True, kw_only=True):
    devices: list[_Device] | None = None
    resources: _Resources | None = None


class _Config(msgspec.Struct, frozen=True, kw_only=True, rename={"oci_version": "ociVersion"}):
    oci_version: str | None = None
    annotations: dict[str, str] | None = None
    mounts: list[_Mount] | None = None
    linux: _Linux | None = None
    status: object = None
    bundle: object = None


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one container; `name` is the bundle directory's, None for standard input.

    `annotated` are the requests in annotations, which OCI cannot express. `cdi_annotations` are
    the names of CDI devices by their annotations, and `cdi_options` the options, by path, for what
    these names bring: `find_requests` looks for them on the host. `vm` is the VM that an
    annotation names, for callers that let a bundle choose; None when no annotation does.
    """

    name: str | None
    devices: tuple[DeviceInfo, ...]
    mounts: tuple[Mount, ...] = ()
    annotated: tuple[Named, ...] = ()
    vm: str | None = None
    cdi_annotations: Mapping[str, tuple[str, ...]] = {}
    cdi_options: Mapping[str, Mapping[str, str]] = {}

    @property
    def resolved_annotations(self) -> tuple[str, ...]:
        """The annotations that no guest may get: an agent would wait for such a device there."""
        return tuple(self.cdi_annotations)

    @property
    def cdi_names(self) -> tuple[str, ...]:
        """The CDI devices that annotations name, each once."""
        named = (name for names in self.cdi_annotations.values() for name in names)
        return tuple(dict.fromkeys(named))


def read_bundle(source: str | os.PathLike[str]) -> Bundle:
    """The devices that the bundle directory, config.json or `-` (standard input) requests.

    Raises SpecError, which names the file, when it cannot be read and for everything wrong inside.
    """
    found = read_source(source)
    try:
        return parse_config(found.data, name=found.name)
    except SpecError as error:
        if found.file is not None:
            error.message = f"{found.file}: {error.message}"
            error.args = (error.message,)
        raise


def parse_config(data: bytes, *, name: str | None) -> Bundle:
    """The requests of the configuration in `data`, in its order; exact repeats count once.

    Raises SpecError with the JSON path, what was found there and what was expected.
    """
    config = _decode(data)
    check_count("$.mounts", "mounts", len(config.mounts or []), MOUNTS_MAX)
    annotated = read_annotations(config.annotations or {})
    cdi_annotations = read_cdi_annotations(config.annotations or {})
    bundle = Bundle(
        name=name,
        devices=_devices(config.linux or _Linux(), annotated.options),
        mounts=tuple(
            _mount(mount, f"$.mounts[{index}]", annotated.options)
            for index, mount in enumerate(config.mounts or [])
            if mount.source
        ),
        annotated=annotated.requests,
        vm=annotated.vm,
        cdi_annotations=cdi_annotations,
    )
    unknown = _find_unknown(annotated.options, bundle)
    if cdi_annotations:
        bundle = replace(bundle, cdi_options=unknown)
    else:
        check_paths(unknown)
    _check_is_config(config, data)
    return bundle


def _find_unknown(
    options: Mapping[str, Mapping[str, str]], bundle: Bundle
) -> dict[str, Mapping[str, str]]:
    """The options of what is neither a device nor a mount of the bundle."""
    if not options:
        return {}
    known = {device.container_path for device in bundle.devices}
    known |= {mount.destination.rstrip("/") for mount in bundle.mounts}
    return {path: options[path] for path in options if path not in known}


def check_paths(unknown: Iterable[str]) -> None:
    """SpecError for options of a device that the bundle does not request."""
    for path in unknown:
        raise SpecError(
            annotation_path(f"{PREFIX}options.{path}"),
            f"the bundle does not request a device at {path}",
            hint="name the path of an entry of linux.devices, or the destination of a mount",
        )


def _mount(mount: _Mount, at: str, options: Mapping[str, Mapping[str, str]]) -> Mount:
    check_path(f"{at}.destination", mount.destination)
    check_path(f"{at}.source", mount.source or "")
    check_count(f"{at}.options", "options", len(mount.options or []), MOUNT_OPTIONS_MAX)
    if "\0" in (mount.source or ""):
        raise SpecError(f"{at}.source", f"{mount.source!r} contains a NUL character")
    return Mount(
        destination=mount.destination,
        source=mount.source or "",
        type="bind" if is_bind(mount.options or []) else mount.type,
        read_only=is_read_only(mount.options or []),
        driver_options=options.get(mount.destination.rstrip("/"), {}),
    )


def _devices(linux: _Linux, options: Mapping[str, Mapping[str, str]]) -> tuple[DeviceInfo, ...]:
    asked = linux.devices or []
    check_count("$.linux.devices", "devices", len(asked), DEVICES_MAX)
    read_only = _read_only((linux.resources and linux.resources.devices) or [])
    at_once = _read_at_once(asked, read_only)
    if at_once is not None and not options:
        return tuple(at_once)
    devices: dict[str, DeviceInfo] = {}
    for index, info in enumerate(at_once or _read_each(asked, read_only)):
        if info.container_path in options:
            info = info._replace(driver_options=options[info.container_path])  # noqa: PLW2901
        known = devices.setdefault(info.container_path, info)
        if known is not info and known != info:
            raise SpecError(
                f"{_place(index)}.path",
                f"{info.container_path} is requested twice with different settings: as "
                f"{known.description} and as {info.description}"
                + ("" if known.description != info.description else " with another mode or owner"),
            )
    return tuple(devices.values())


def _decode(data: bytes) -> _Config:
    if len(data) > CONFIG_BYTES_MAX:
        raise SpecError("$", f"{len(data)} bytes; at most {CONFIG_BYTES_MAX} are allowed")
    if not data.strip():
        raise SpecError("$", "the configuration is empty; expected an OCI config.json")
    check_nesting("$", data)
    try:
        config = msgspec.json.decode(data, type=_Config)
        check_repeats(
            "$", data.decode()
        )  # and that all text is UTF-8, most of which msgspec skips
    except msgspec.ValidationError as error:
        if data.lstrip()[:1] != b"{":
            raise _not_a_config(
                data, "$", _spec_error(error).message.removeprefix("$: ")
            ) from error
        raise _spec_error(error) from error
    except (msgspec.DecodeError, ValueError) as error:
        what = f"not JSON: {_json_position(data) or error}"
        raise SpecError("$", what, hint=_REMEDY) from error
    return config


def _check_is_config(config: _Config, data: bytes) -> None:
    """SpecError for another document: it would be a container that requests nothing."""
    if config.status is not None and config.bundle is not None:
        raise SpecError(
            "$",
            "this is the state of a container, not its config.json",
            hint=f"pass its bundle directory, {str(config.bundle)[:PATH_BYTES_MAX]}",
        )
    if not config.oci_version:
        raise _not_a_config(data, "$.ociVersion", "missing")


def _not_a_config(data: bytes, where: str, why: str) -> SpecError:
    try:
        document = json.loads(data, parse_int=len, parse_float=len)
    except ValueError:
        document = None
    known = next((words for key, *words in _OTHERS if _has(document, key)), None)
    what, hint = known or ("an OCI config.json is an object with ociVersion", _REMEDY)
    return SpecError(where, f"{why}; {what}", hint=hint)


_REMEDY = "pass the config.json of the container's bundle, or the bundle directory"
_OTHERS = (
    (
        "cdiVersion",
        "this is a CDI specification, and an OCI config.json is needed",
        "the container engine adds it to the config.json of a container; pass that one",
    ),
    (
        "info",
        "this is what crictl inspect prints, and the config.json is inside",
        "crictl inspect ID | jq .info.runtimeSpec",
    ),
    (
        "Spec",
        "this is what ctr or nerdctl prints of a container, and the config.json is inside",
        "ctr containers info ID | jq .Spec",
    ),
    (
        "ociVersionMin",
        "this is what runc features prints, and an OCI config.json is needed",
        _REMEDY,
    ),
    (
        "Config",
        "this is what docker or podman inspect prints, and an OCI config.json is needed",
        "pass the config.json of the container's bundle (podman inspect: .[0].OCIConfigPath)",
    ),
)
"""Documents that are taken for a config.json: a member that only they have, what, and the hint."""


def _has(document: object, key: str) -> bool:
    """Whether the object, or the first of a list of them, has that member."""
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, dict) and key in first


def _spec_error(error: msgspec.ValidationError) -> SpecError:
    """Put first what msgspec puts last: `Expected `str`, got `int` - at `$.linux`."""
    what, _, where = str(error).partition(" - at ")
    what = what.replace("`", "")
    return SpecError(where.strip("`") or "$", what[:1].lower() + what[1:])


def _json_position(data: bytes) -> str | None:
    """Line and column of the mistake, which msgspec gives only as a byte offset."""
    try:
        json.loads(data)
    except ValueError as error:
        return str(error)
    return None


_DEV_TYPES = {dev_type.value: dev_type for dev_type in DevType}
_NUMBERED = {"b", "c", "u"}
_PERMISSIONS = 0o7777


def _place(index: int) -> str:
    return f"$.linux.devices[{index}]"


def _read_each(devices: Iterable[_Device], read_only: Collection[_Number]) -> Iterator[DeviceInfo]:
    for index, device in enumerate(devices):
        yield _device_info(device, index, read_only)


def _read_at_once(
    devices: Sequence[_Device], read_only: Collection[_Number]
) -> list[DeviceInfo] | None:
    """What `_read_each` gives, eight times as fast: rules are for all values, not for each device.

    None where a device may break one, has no number or the whole st_mode, or is there twice.
    """
    paths = [device.path for device in devices]
    if not (
        _NUMBERED.issuperset({device.type for device in devices})
        and _are_within([device.major for device in devices], MAJOR_MAX)
        and _are_within([device.minor for device in devices], MINOR_MAX)
        and _are_within([device.file_mode or 0 for device in devices], _PERMISSIONS)
        and len({*paths}) == len(paths)
        and are_plain(paths)
    ):
        return None
    make = tuple.__new__  # without the checks of their classes
    return [
        make(
            DeviceInfo,
            (
                device.path,
                _DEV_TYPES[device.type],
                make(DevNum, (device.major, device.minor)),
                None,  # host_path
                False,  # pmem
                bool(read_only)
                and device.type == "b"
                and (device.major, device.minor) in read_only,
                device.file_mode,
                device.uid,
                device.gid,
                {},
                (),
            ),
        )
        for device in devices
    ]


def _are_within(values: list[int | None], most: int) -> bool:
    """No set is made of them, for the same reason as in `_read_only`."""
    numbers = cast("list[int]", values)
    return None not in values and min(numbers, default=0) >= 0 and max(numbers, default=0) <= most


def _device_info(device: _Device, index: int, read_only: Collection[_Number]) -> DeviceInfo:
    dev_type = _DEV_TYPES.get(device.type)
    if dev_type is None:
        raise SpecError(
            f"{_place(index)}.type",
            f"{device.type!r} is not a device type; expected b, c, u or p",
        )
    devnum = _devnum(device, index) if dev_type is not DevType.FIFO else None
    file_mode = _file_mode(device, dev_type, index)
    try:
        return DeviceInfo(
            container_path=device.path,
            dev_type=dev_type,
            devnum=devnum,
            read_only=dev_type is DevType.BLOCK and devnum in read_only,
            file_mode=file_mode,
            uid=device.uid,
            gid=device.gid,
        )
    except SpecError:  # only the path is left, and its place is not known there
        normal_container_path(device.path, f"{_place(index)}.path")
        raise


def _devnum(device: _Device, index: int) -> DevNum:
    if device.major is None or device.minor is None:
        missing = "major" if device.major is None else "minor"
        raise SpecError(
            f"{_place(index)}.{missing}",
            f"missing; a device of type {device.type} needs major and minor",
        )
    try:
        return DevNum(device.major, device.minor)
    except ValueError as error:
        field = "major" if str(error).startswith("major") else "minor"
        raise SpecError(f"{_place(index)}.{field}", str(error)) from error


_FILE_TYPES = {
    DevType.BLOCK: stat.S_IFBLK,
    DevType.CHAR: stat.S_IFCHR,
    DevType.CHAR_UNBUFFERED: stat.S_IFCHR,
    DevType.FIFO: stat.S_IFIFO,
}


def _file_mode(device: _Device, dev_type: DevType, index: int) -> int | None:
    """Permission bits; engines also write the whole st_mode, whose type must then agree."""
    mode = device.file_mode
    if mode is None:
        return None
    if not 0 <= mode <= 0o177777:
        raise SpecError(f"{_place(index)}.fileMode", f"{mode} is not a file mode")
    if stat.S_IFMT(mode) not in {0, _FILE_TYPES[dev_type]}:
        raise SpecError(
            f"{_place(index)}.fileMode",
            f"{mode:#o} is not the mode of a device of type {dev_type}",
        )
    return stat.S_IMODE(mode)


_ACCESS = re.compile(r"[rwm]*\Z")


def _read_only(rules: list[_Rule]) -> set[_Number]:
    """The numbers of block devices that a rule for that device alone allows only for reading.

    Rules apply in order, as the kernel's device cgroup applies them. A rule with a wildcard does
    not count for one device: engines write `a *:* rwm` and `b *:* m` for every container.
    """
    check_count("$.linux.resources.devices", "rules", len(rules), RULES_MAX)
    allowed: dict[_Number, set[str]] = {}
    for index, rule in enumerate(rules):
        if not _ACCESS.match(rule.access or ""):
            raise SpecError(
                f"$.linux.resources.devices[{index}].access",
                f"{rule.access!r} may contain only the letters r, w and m",
            )
        if rule.type not in {None, "", "a", "b"} or rule.major is None or rule.minor is None:
            continue
        if not (0 <= rule.major <= MAJOR_MAX and 0 <= rule.minor <= MINOR_MAX):
            continue  # of no device, and a tenant can find thousands that have one hash
        number, letters = (rule.major, rule.minor), set(rule.access or "rwm")
        if rule.allow:
            allowed[number] = allowed.get(number, set()) | letters
        elif number in allowed:
            allowed[number] -= letters
    return {number for number, access in allowed.items() if "w" not in access}
