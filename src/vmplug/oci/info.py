"""DeviceInfo and Mount: what a container asks for in OCI's own words."""

import re
from collections.abc import Collection, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from vmplug.devnum import DevNum
from vmplug.errors import SpecError
from vmplug.oci.limits import check_path


class DevType(StrEnum):
    """Device types of the OCI specification. Source: runtime-spec config-linux.md, Devices."""

    BLOCK = "b"
    CHAR = "c"
    CHAR_UNBUFFERED = "u"
    FIFO = "p"


class _DeviceFields(NamedTuple):
    container_path: str
    dev_type: DevType
    devnum: DevNum | None
    host_path: str | None
    pmem: bool
    read_only: bool
    file_mode: int | None
    uid: int | None
    gid: int | None
    driver_options: Mapping[str, str]
    cdi_names: tuple[str, ...]


class DeviceInfo(_DeviceFields):
    """One device as a container asks for it.

    `devnum` is None for a FIFO, which has no number, and for a regular file that becomes a disk.
    Only such a file has a `host_path`. `pmem` requests that file as persistent memory (an NVDIMM).
    `file_mode` holds permission bits only. `driver_options` are those of the driver in
    `vmplug.drivers` that will plug it. `cdi_names` are the CDI devices that brought it;
    the request is the same without them.

    Raises SpecError when the parts do not fit each other.
    """

    __slots__ = ()

    def __new__(  # noqa: PLR0913  one for each field
        cls,
        *,
        container_path: str,
        dev_type: DevType,
        devnum: DevNum | None = None,
        host_path: str | None = None,
        pmem: bool = False,
        read_only: bool = False,
        file_mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        driver_options: Mapping[str, str] = MappingProxyType({}),
        cdi_names: tuple[str, ...] = (),
    ) -> Self:
        """Check the parts."""
        info = super().__new__(
            cls,
            normal_container_path(container_path),
            dev_type,
            devnum,
            host_path,
            pmem,
            read_only,
            file_mode,
            uid,
            gid,
            dict(driver_options),
            cdi_names,
        )
        info._check()
        return info

    def _check(self) -> None:
        if self.host_path is not None:
            self._check_file(self.host_path)
        elif self.pmem:
            raise SpecError(self.container_path, "persistent memory needs the path of its file")
        elif self.dev_type is DevType.FIFO:
            if self.devnum is not None:
                raise SpecError(self.container_path, f"type {self.dev_type} has no number")
        elif self.devnum is None:
            raise SpecError(
                self.container_path, f"a device of type {self.dev_type} needs major and minor"
            )

    def _check_file(self, path: str) -> None:
        if not path:
            raise SpecError(self.container_path, "the path of the file is empty")
        if self.devnum or self.dev_type is not DevType.BLOCK:
            raise SpecError(self.container_path, "a regular file has type b and no number")
        check_path(self.container_path, path)
        if "\0" in path:
            raise SpecError(self.container_path, f"{path!r} contains a NUL character")

    def _replace(self, **changes: Any) -> Self:
        """Another request with these fields, checked as a new one is."""
        return type(self)(**(self._asdict() | changes))

    __replace__ = _replace

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), self._asdict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceInfo) and self[:-1] == other[:-1]  # without cdi_names

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:-2])  # and without driver_options, which have no hash

    @property
    def name(self) -> str:
        """The name of the request: the path in the container."""
        return self.container_path

    @property
    def major(self) -> int | None:
        """Major number; None where there is none."""
        return self.devnum.major if self.devnum else None

    @property
    def minor(self) -> int | None:
        """Minor number; None where there is none."""
        return self.devnum.minor if self.devnum else None

    @property
    def cdi_kinds(self) -> tuple[str, ...]:
        """The kinds of the CDI devices that brought it: `vendor.com/class`."""
        return tuple(dict.fromkeys(name.partition("=")[0] for name in self.cdi_names))

    @property
    def description(self) -> str:
        """The device in a few words, for messages: `block device 7:0`."""
        if self.host_path is not None:
            return f"{'NVDIMM' if self.pmem else 'file'} {self.host_path}"
        if self.devnum is None:
            return f"FIFO {self.container_path}"
        kind = "block" if self.dev_type is DevType.BLOCK else "char"
        return f"{kind} device {self.devnum}"


class Mount(NamedTuple):
    """One mount that has a source on the host; `type` is None where the bundle leaves it out.

    It is `bind` for each bind mount, whatever the bundle says in its place.

    `driver_options` are for the device that the source may turn out to be.
    """

    destination: str
    source: str
    type: str | None
    read_only: bool
    driver_options: Mapping[str, str] = MappingProxyType({})


_PLAIN = re.compile(r"(?:/(?!\.\.?(?:/|\Z))[^/\0]{1,63})+\Z")
"""Most paths: in their one spelling, with names that are short in any encoding."""
_PLAIN_LENGTH_MAX = 1023
_ALL_PLAIN = re.compile(r"(?:(?:/[^/\0\n.][^/\0\n]{0,62}+){1,15}+\n)*+\Z")
"""Most of many paths: the same, with fewer names and without a dot in front of one."""


def are_plain(paths: Collection[str]) -> bool:
    """Whether `normal_container_path` surely gives each as it is; False says nothing."""
    lines = "\n".join([*paths, ""])
    return lines.count("\n") == len(paths) and bool(_ALL_PLAIN.match(lines))


def normal_container_path(path: str, where: str = "container path") -> str:
    """`path` in its one spelling, without `//` and `/.`; SpecError unless it is absolute.

    It may not contain `..` or NUL, or be `/` itself.
    """
    if len(path) <= _PLAIN_LENGTH_MAX and _PLAIN.match(path):
        return path
    if not path:
        raise SpecError(where, "path is empty", hint="give the device's path in the container")
    check_path(where, path)
    if not path.startswith("/") or path.strip("/") == "":
        raise SpecError(where, f"{path!r} is not an absolute path of a device")
    if "\0" in path:
        raise SpecError(where, f"{path!r} contains a NUL character")
    if ".." in path.split("/"):
        raise SpecError(
            where,
            f"{path!r} contains '..'",
            hint="give the device's path in the container without '..'",
        )
    return "/" + "/".join(part for part in path.split("/") if part not in {"", "."})
