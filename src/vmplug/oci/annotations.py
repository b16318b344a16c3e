"""Annotations of a bundle that request what OCI cannot express, and options of single devices.

    org.vmplug.net.NAME       {"socket": "/run/vpp/eth0.sock", "mac": "52:54:00:aa:bb:cc"}
    org.vmplug.share.TAG      {"source": "/srv/work", "read-only": true, "cache": "auto"}
    org.vmplug.vfio.NAME      {"device": "0000:3b:00.0", "mode": "guest-kernel"}
    org.vmplug.rng.NAME       {"source": "/dev/hwrng", "max-bytes": 1024, "period": 1000}
    org.vmplug.options.PATH   {"block-driver": "virtio-scsi", "cache": "none"}
    org.vmplug.vm             sb1
    cdi.k8s.io/NAME           vendor.com/class=name,vendor.com/class=other

Annotations, not a file of our own: they travel with config.json through every container engine,
and through standard input. The value of ours is one JSON object, in which an unknown member is an
error, or the name of a VM. Kata's sandbox annotations are read where they mean the same, as
defaults.
Source: opencontainers/runtime-spec config.md, Annotations; Kata Containers
docs/how-to/how-to-set-sandbox-config-kata.md.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from vmplug.errors import SpecError
from vmplug.oci.document import check_repeats
from vmplug.oci.info import normal_container_path
from vmplug.oci.limits import (
    ANNOTATION_BYTES_MAX,
    ANNOTATION_KEY_BYTES_MAX,
    NAME_BYTES_MAX,
    OPTION_BYTES_MAX,
    OPTIONS_MAX,
    REQUESTS_MAX,
    check_count,
    check_text,
)
from vmplug.oci.requests import DEFAULT_SOURCE, Named, NetInfo, RngInfo, ShareInfo, VfioInfo

PREFIX = "org.vmplug."
VM = f"{PREFIX}vm"
_CDI_PREFIX = "cdi.k8s.io/"
_KATA = "io.katacontainers.config.hypervisor."

_SHARE_DEFAULTS = {
    "shared_fs": "filesystem",
    "virtio_fs_cache": "cache",
    "virtio_fs_cache_size": "cache-size",
    "virtio_fs_queue_size": "queue-size",
}
"""Kata's names of options for every share of a sandbox, and our option that means the same."""
_KATA_WORDS = {*_SHARE_DEFAULTS, "entropy_source"}

Option = str | int | bool


class Annotated(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of one bundle's annotations.

    `options` are those of single devices and mounts, by path in the container. `vm` is the VM that
    they name, None when they name none.
    """

    requests: tuple[Named, ...]
    options: Mapping[str, Mapping[str, str]]
    vm: str | None = None


def read_annotations(annotations: Mapping[str, str]) -> Annotated:
    """The requests and options among them; SpecError names the annotation that is wrong."""
    requests: list[Named] = []
    options: dict[str, Mapping[str, str]] = {}
    katas = _katas(annotations)
    for key, value in annotations.items():
        if not key.startswith(PREFIX) or key == VM:
            continue
        check_text("$.annotations", key, ANNOTATION_KEY_BYTES_MAX)
        kind, _, name = key.removeprefix(PREFIX).partition(".")
        fields = _Fields(key, value)
        match kind:
            case "net":
                requests.append(_net(name, fields))
            case "share":
                requests.append(_share(name, fields, katas))
            case "rng":
                requests.append(_rng(name, fields, katas))
            case "vfio":
                requests.append(_vfio(name, fields))
            case "options":
                options[normal_container_path(name, annotation_path(key))] = fields.options()
            case _:
                raise SpecError(
                    annotation_path(key),
                    f"{kind!r} is not a kind of annotation",
                    hint=f"{PREFIX} must be followed by net, share, rng, vfio or options, and a "
                    "name, or by vm alone",
                )
    check_count("$.annotations", "requests", len(requests), REQUESTS_MAX)
    vm = annotations.get(VM)
    check_text(annotation_path(VM), vm or "", NAME_BYTES_MAX)
    return Annotated(requests=tuple(requests), options=options, vm=vm)


def read_cdi_annotations(annotations: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The names that annotations of CDI ask for, by their keys. SpecError for a malformed one."""
    named = {key: value for key, value in annotations.items() if key.startswith(_CDI_PREFIX)}
    if not named:
        return {}
    for key, value in named.items():
        check_text("$.annotations", key, ANNOTATION_KEY_BYTES_MAX)
        check_text(annotation_path(key), value, ANNOTATION_BYTES_MAX)
    from vmplug.cdi.names import parse_annotations  # noqa: PLC0415  most bundles have none

    asked = parse_annotations(named)
    count = sum(map(len, asked.values()))
    check_count("$.annotations", "CDI devices", count, REQUESTS_MAX)
    return asked


def annotation_path(key: str) -> str:
    """The JSON path of an annotation."""
    return f"$.annotations[{key!r}]"


def _katas(annotations: Mapping[str, str]) -> dict[str, str]:
    """Kata's settings of the sandbox, by their words."""
    katas = {
        word: annotations[_KATA + word] for word in _KATA_WORDS if _KATA + word in annotations
    }
    for word, value in katas.items():
        check_text(annotation_path(_KATA + word), value, OPTION_BYTES_MAX)
    return katas


def _net(name: str, fields: "_Fields") -> NetInfo:
    socket = fields.take_path("socket")
    return NetInfo(label=name, socket_path=socket, driver_options=fields.options())


def _share(tag: str, fields: "_Fields", katas: Mapping[str, str]) -> ShareInfo:
    source, read_only = fields.take_path("source"), fields.take_flag("read-only")
    defaults = {ours: katas[k] for k, ours in _SHARE_DEFAULTS.items() if k in katas}
    options = defaults | fields.options()
    return ShareInfo(tag=tag, source=source, read_only=read_only, driver_options=options)


def _vfio(name: str, fields: "_Fields") -> VfioInfo:
    device = fields.take_text("device")
    return VfioInfo(label=name, device=device, driver_options=fields.options())


def _rng(name: str, fields: "_Fields", katas: Mapping[str, str]) -> RngInfo:
    source = fields.take_path("source", katas.get("entropy_source", DEFAULT_SOURCE))
    return RngInfo(label=name, source=source, driver_options=fields.options())


class _Fields:
    """The members of one annotation's object; each member that is not taken is an option."""

    def __init__(self, key: str, value: str) -> None:
        self._key, where = key, annotation_path(key)
        check_text(where, value, ANNOTATION_BYTES_MAX)
        try:
            self._members: dict[str, Any] = msgspec.json.decode(value, type=dict[str, Option])
            check_repeats(where, value)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            hint = 'the value is one JSON object, such as {"source": "/srv/work"}'
            raise SpecError(where, f"{value[:60]!r}: {error}", hint=hint) from error
        check_count(where, "members", len(self._members), OPTIONS_MAX)

    def take_path(self, member: str, default: str | None = None) -> str:
        """A path; a bundle cannot name a descriptor, which belongs to another process."""
        value = self._members.pop(member, default)
        if not (isinstance(value, str) and value.startswith("/")):
            what = "is missing" if value is None else f"is {value!r}, expected an absolute path"
            raise SpecError(annotation_path(self._key), f"the member {member!r} {what}")
        return value

    def take_text(self, member: str) -> str:
        """A text that must be present."""
        value = self._members.pop(member, None)
        if not isinstance(value, str):
            what = "is missing" if value is None else f"is {value!r}, expected text"
            raise SpecError(annotation_path(self._key), f"the member {member!r} {what}")
        return value

    def take_flag(self, member: str) -> bool:
        """True or false; false when absent."""
        value = self._members.pop(member, False)
        if not isinstance(value, bool):
            what = f"the member {member!r} is {value!r}, expected true or false"
            raise SpecError(annotation_path(self._key), what)
        return value

    def options(self) -> dict[str, str]:
        """The remaining members, as the text that the command line takes too."""
        options = {key: _text(value) for key, value in self._members.items()}
        for key, text in options.items():
            check_text(annotation_path(self._key), max(key, text, key=len), OPTION_BYTES_MAX)
        return options


def _text(value: Option) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
