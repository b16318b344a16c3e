"""Writes a spec: at once or not at all, in the lowest version that has what it says."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from vmplug.cdi.fields import Fields
from vmplug.cdi.problem import CdiError, Problem
from vmplug.cdi.spec import Spec
from vmplug.cdi.validate import find_problems
from vmplug.cdi.version import VERSIONS, minimum_version
from vmplug.errors import SpecError

SPEC_MODE = 0o644
"""Engines that do not run as root read it too."""
_SUFFIXES = (".json", ".yaml")
DRAFT_SUFFIX = ".tmp"
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./=:-]*[A-Za-z0-9]")
_HAS_MEANING = re.compile(r"y|n|yes|no|true|false|on|off|null", re.IGNORECASE)


def format_spec(
    spec: Spec, *, version: str | None = None, file: str = "-", is_yaml: bool = False
) -> str:
    """The text of a spec; CdiError, with `file` for its name, if it breaks a rule.

    `version` is what it declares in place of the lowest that has everything which it uses; one
    that lacks something of that is refused.
    """
    declared = version or minimum_version(spec)
    if declared not in VERSIONS:
        raise SpecError("version", f"unknown {declared!r}, expected one of {', '.join(VERSIONS)}")
    tree = _as_tree(msgspec.structs.replace(spec, cdi_version=declared))
    fields = Fields()
    found = [*find_problems(fields.read(tree)), *fields.problems]
    problems = [Problem(file=file, field=field, message=message) for field, message in found]
    if problems:
        raise CdiError(problems)
    return _format_yaml(tree) if is_yaml else _format_json(tree)


def write_spec(spec: Spec, path: str | os.PathLike[str], *, version: str | None = None) -> None:
    """Write a spec to PATH, *.json or *.yaml, in place of what is there.

    A reader finds the old text or the new one. The directory is made if it is not there. What can
    go wrong besides is that of `format_spec`, and OSError.
    """
    file = os.fspath(path)
    if not file.endswith(_SUFFIXES):
        raise SpecError(file, "engines read only *.json and *.yaml")
    text = format_spec(spec, version=version, file=file, is_yaml=file.endswith(".yaml"))
    directory = os.path.dirname(file) or "."
    os.makedirs(directory, exist_ok=True)
    with draft_of(text, directory) as draft:
        os.replace(draft, file)


@contextmanager
def draft_of(text: str, directory: str, prefix: str = "spec.") -> Iterator[str]:
    """A file beside those of a directory, to be renamed inside the `with`; its path.

    No engine reads it by its name. It is gone after the `with`, renamed or not. Raises OSError.
    """
    descriptor, draft = tempfile.mkstemp(prefix=prefix, suffix=DRAFT_SUFFIX, dir=directory)
    try:
        with open(descriptor, "w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fchmod(descriptor, SPEC_MODE)
            os.fsync(descriptor)
        yield draft
    finally:
        with suppress(FileNotFoundError):
            os.unlink(draft)


def _as_tree(spec: Spec) -> Any:
    """Dicts, lists and scalars, as they are read from a file."""
    return msgspec.json.decode(msgspec.json.encode(spec))


def _format_json(tree: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(tree), indent=2).decode() + "\n"


def _format_yaml(tree: Any) -> str:
    """Text in quotes, unless no parser can take it for anything else."""
    import yaml  # noqa: PLC0415  20 ms, for those who write YAML

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, _data: object) -> bool:
            return True

    def write_text(dumper: Any, text: str) -> Any:
        is_plain = _PLAIN.fullmatch(text) and not _HAS_MEANING.fullmatch(text)
        style = None if is_plain else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, write_text)
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=1000))
