"""What is wrong with a spec, where, and what is right; the errors that carry it."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vmplug.errors import NoSuchDevice, SpecError

_SHOWN = 8


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One mistake of one file: `field` is a JSON path, `$` for the document as a whole."""

    file: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.message}"


class CdiError(SpecError):
    """A spec that breaks a rule: the message has the first of `problems`, notes the others."""

    code = "bad-cdi-spec"

    def __init__(self, problems: Iterable[Problem]) -> None:
        first, *others = problems
        super().__init__(f"{first.file}: {first.field}", first.message)
        self.problems = (first, *others)
        for problem in others:
            self.add_note(str(problem))


class UnresolvableDevices(NoSuchDevice):
    """Names that no usable spec defines.

    `conflicts` has those that two files of one directory define, with the files; `problems` has
    the files that could not be used, which may be why.
    """

    code = "unresolvable-cdi-device"

    def __init__(
        self,
        names: Iterable[str],
        *,
        directories: Iterable[str],
        conflicts: Mapping[str, tuple[str, ...]],
        problems: Iterable[Problem],
        known: Iterable[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.directories = tuple(directories)
        self.conflicts = {name: conflicts[name] for name in self.names if name in conflicts}
        self.problems = tuple(problems)
        wanted = ", ".join(self.names)
        super().__init__(
            wanted,
            f"unresolvable CDI devices: {wanted}; searched {', '.join(self.directories)}",
            hint=self._find_hint(tuple(known)),
        )
        for problem in self.problems:
            self.add_note(f"unusable: {problem}")

    def _find_hint(self, known: Sequence[str]) -> str | None:
        for name, files in self.conflicts.items():
            return f"remove {name} from all but one of {', '.join(files)}"
        if self.problems:
            return f"mend {self.problems[0].file}, which could not be used"
        kind, _, name = self.names[0].partition("=")
        start = f"{kind}="
        named = [other.removeprefix(start) for other in known if other.startswith(start)]
        if named:
            return f"{kind} has {_few(named)}"
        kinds = sorted({other.partition("=")[0] for other in known})
        if kinds:
            return f"no file defines the kind {kind}; there are {_few(kinds)}"
        return (
            "no file there defines a device; vmplug cdi validate FILE says what is wrong with one"
        )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ... (vmplug cdi list)" if len(names) > _SHOWN else shown
