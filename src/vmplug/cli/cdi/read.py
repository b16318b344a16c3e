"""CDI names and the files that define them, out of arguments and out of a config.json."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import msgspec

from vmplug.cdi.names import ANNOTATION_PREFIX, QualifiedName, parse_annotations
from vmplug.cdi.problem import CdiError, Problem
from vmplug.cdi.read import parse_spec, read_spec
from vmplug.cdi.registry import (
    DEFAULT_DIRECTORIES,
    FoundDevice,
    Registry,
    SpecFile,
    read_directories,
)
from vmplug.cdi.spec import Spec
from vmplug.errors import SpecError
from vmplug.oci.document import check_nesting, check_repeats
from vmplug.oci.source import read_source

Config = dict[str, Any]
_STDIN = "-"


class CheckedFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files that were validated: `valid` are the good ones, `problems` what is wrong with others.

    `conflicts` has each name that two files of one directory define, with the files.
    """

    valid: Sequence[SpecFile]
    problems: Sequence[Problem]
    conflicts: Mapping[str, tuple[str, ...]]

    @property
    def are_valid(self) -> bool:
        """Whether an engine can use all of it."""
        return not self.problems and not self.conflicts


def find_devices(
    registry: Registry, names: Iterable[str], config: Config | None = None
) -> list[FoundDevice]:
    """The devices of these names, or else of those that annotations of the config ask for.

    Raises UsageError where nobody asks for one, SpecError for a malformed name, and
    UnresolvableDevices with the directories that were searched.
    """
    asked = [str(QualifiedName.parse(name)) for name in names] or _annotated(config or {})
    if not asked:
        raise click.UsageError(
            f"name a device, as vendor.com/class=name: no annotation {ANNOTATION_PREFIX}* does"
        )
    return registry.resolve(asked)


def _annotated(config: Config) -> list[str]:
    annotations = config.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(
        isinstance(value, str) for value in annotations.values()
    ):
        raise SpecError("$.annotations", "expected a mapping of texts")
    return [name for names in parse_annotations(annotations).values() for name in names]


def read_named(spec_dirs: Sequence[str]) -> Registry:
    """The devices of these directories, or of those that engines read."""
    return read_directories(spec_dirs or DEFAULT_DIRECTORIES)


def read_files(paths: Sequence[str], spec_dirs: Sequence[str]) -> CheckedFiles:
    """Validate files, `-` for standard input, and all that engines read of directories."""
    directories = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if path not in directories]
    searched = [*directories, *spec_dirs]
    registry = read_directories(searched if paths else spec_dirs or DEFAULT_DIRECTORIES)
    valid, problems = [*registry.files], [*registry.problems]
    for file in files:
        try:
            spec = _read_stdin() if file == _STDIN else read_spec(file)
        except CdiError as error:
            problems += error.problems
        else:
            valid.append(SpecFile(file=file, priority=0, spec=spec))
    return CheckedFiles(valid=valid, problems=problems, conflicts=registry.conflicts)


def _read_stdin() -> Spec:
    return parse_spec(read_source(_STDIN).data, file=_STDIN)


def read_config(source: str) -> Config:
    """The whole config.json of a bundle directory, a file or `-`. SpecError if it is not one."""
    found = read_source(source)
    where = found.file or "standard input"
    check_nesting(where, found.data)
    try:
        config = msgspec.json.decode(found.data)
        check_repeats(where, found.data.decode())
    except (msgspec.MsgspecError, ValueError) as error:
        raise SpecError(where, f"not JSON: {error}") from error
    if not isinstance(config, dict) or "ociVersion" not in config:
        raise SpecError(where, "not an OCI config.json, which is an object with ociVersion")
    return config
