"""Every device of the directories of CDI, as engines see them.

A later directory has priority. Two files of one directory that define one device make it unusable,
also if a directory of higher priority defines it. A file that is not valid is reported and left
out; a directory that is not there is as good as an empty one. Source: the reference library,
cache.go.
"""

import os
from collections.abc import Iterable, Mapping

import msgspec

from vmplug.cdi.problem import CdiError, Problem, UnresolvableDevices
from vmplug.cdi.read import read_spec
from vmplug.cdi.spec import Device, Spec

DEFAULT_DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
"""Lowest priority first."""
_SUFFIXES = (".json", ".yaml")


class SpecFile(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A valid spec, its file, and the priority of its directory: higher wins."""

    file: str
    priority: int
    spec: Spec


class FoundDevice(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A device that can be asked for: the one at `index` of the spec in `source`."""

    source: SpecFile
    index: int

    @property
    def device(self) -> Device:
        """What the spec says of it."""
        return self.source.spec.devices[self.index]

    @property
    def name(self) -> str:
        """Its qualified name."""
        return f"{self.source.spec.kind}={self.device.name}"


class Registry(msgspec.Struct, frozen=True, kw_only=True):
    """The devices by qualified name, in the order of the names.

    `problems` are those of files that cannot be used; `conflicts` has each name that two files of
    one directory define, with the files.
    """

    directories: tuple[str, ...]
    files: tuple[SpecFile, ...] = ()
    devices: Mapping[str, FoundDevice] = {}
    conflicts: Mapping[str, tuple[str, ...]] = {}
    problems: tuple[Problem, ...] = ()

    def resolve(self, names: Iterable[str]) -> list[FoundDevice]:
        """The devices of these names, in their order.

        UnresolvableDevices has every name that is not there, the directories that were searched,
        and the files that could not be used.
        """
        asked = list(names)
        missing = [name for name in asked if name not in self.devices]
        if missing:
            raise UnresolvableDevices(
                missing,
                directories=self.directories,
                conflicts=self.conflicts,
                problems=self.problems,
                known=self.devices,
            )
        return [self.devices[name] for name in asked]


def read_directories(
    directories: Iterable[str | os.PathLike[str]] = DEFAULT_DIRECTORIES,
) -> Registry:
    """Read every *.json and *.yaml of the directories, lowest priority first; none below them."""
    searched = tuple(os.path.normpath(directory) for directory in directories)
    files, problems = list[SpecFile](), list[Problem]()
    for priority, directory in enumerate(searched):
        for file in _list_files(directory, problems):
            try:
                spec = read_spec(file)
            except CdiError as error:
                problems += error.problems
            else:
                files.append(SpecFile(file=file, priority=priority, spec=spec))
    devices, conflicts = _merge(files)
    return Registry(
        directories=searched,
        files=tuple(files),
        devices=devices,
        conflicts=conflicts,
        problems=tuple(problems),
    )


def _list_files(directory: str, problems: list[Problem]) -> list[str]:
    try:
        if os.path.islink(directory):
            # Engines do not follow it: what is behind would be there for vmplug alone.
            raise OSError(0, "a symbolic link, expected a directory")
        with os.scandir(directory) as entries:
            names = [
                each.name
                for each in entries
                if each.name.endswith(_SUFFIXES) and not each.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(
            Problem(file=directory, field="$", message=f"cannot be read: {error.strerror}")
        )
        return []
    return [os.path.join(directory, name) for name in sorted(names)]


def _merge(
    files: Iterable[SpecFile],
) -> tuple[dict[str, FoundDevice], dict[str, tuple[str, ...]]]:
    """The device of highest priority for each name, and the names with two of one priority."""
    devices, conflicts = dict[str, FoundDevice](), dict[str, tuple[str, ...]]()
    for file in files:
        for index, device in enumerate(file.spec.devices):
            name = f"{file.spec.kind}={device.name}"
            other = devices.get(name)
            if other is not None and other.source.priority == file.priority:
                so_far = conflicts.get(name, (other.source.file,))
                conflicts[name] = (*so_far, file.file)
            else:
                devices[name] = FoundDevice(source=file, index=index)
    usable = {name: devices[name] for name in sorted(devices) if name not in conflicts}
    return usable, conflicts
