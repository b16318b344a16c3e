"""The table: cases/*.toml, whose format is described here.

`files` maps PRIORITY/NAME to text, `links` to the target of a symlink. Shorter: `spec` is the text
of 0/a.yaml; `edits` the containerEdits of the one device in it, of CDI version `version`. `@HOST@`
in any text is a directory of the host that has `file`, `fifo`, and `link`, which leads to
/dev/null. The names in `devices` are injected into `config`.

The verdict is `result`, the whole config after it; or `failed`, the field that the host does not
bear out; or else the names are unresolved, which `unresolved` lists if some are not. `refused` has
each file that cannot be used, and the field that is wrong; `conflicts` the names that two files of
one directory define.

`since` is the first version of CDI that has what the case is about: older libraries are not asked.
`differs` says what a library does that vmplug does not, and `why`, a heading of docs/cdi.md.
"""

import os
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

DEVICE = "vendor.com/class=dev"
_TABLE = Path(__file__).parent / "cases"
_EDITS = (
    "{{cdiVersion: {}, kind: vendor.com/class, devices: [{{name: dev, containerEdits: {}}}]}}\n"
)

Config = dict[str, Any]
Verdict = Literal["injected", "failed", "unresolved", "crash"]


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the libraries of the CDI versions `on` do instead; they crash with some cases.

    `result` is the config after it, also after a failure; None: it is not compared.
    """

    why: str
    verdict: Verdict
    result: Config | None = None
    refused: list[str] = []
    on: tuple[str, ...] = ("0.5.0", "0.8.0")


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    files: dict[str, str] = {}
    links: dict[str, str] = {}
    spec: str | None = None
    edits: str | None = None
    version: str = "0.5.0"
    devices: tuple[str, ...] = (DEVICE,)
    config: Config = {}
    result: Config | None = None
    failed: str | None = None
    unresolved: list[str] | None = None
    refused: dict[str, str] = {}
    conflicts: list[str] = []
    since: str | None = None
    differs: list[Difference] = []

    @property
    def verdict(self) -> Verdict:
        if self.result is not None:
            return "injected"
        return "unresolved" if self.failed is None else "failed"

    @property
    def wants_unresolved(self) -> list[str]:
        if self.verdict != "unresolved":
            return []
        return list(self.devices) if self.unresolved is None else self.unresolved

    @property
    def wants_version(self) -> tuple[int, ...]:
        """The first version of CDI whose libraries can say something about the case."""
        if self.since is not None:
            return parse_version(self.since)
        is_old = self.edits is None or self.verdict == "unresolved"
        return parse_version("0.3.0" if is_old else self.version)

    def find_difference(self, version: str) -> Difference | None:
        return next((each for each in self.differs if version in each.on), None)

    def lay_out(self, root: Path) -> list[Path]:
        """Write the files below a directory; gives the directories of specs, lowest first."""
        host = root / "host"
        host.mkdir()
        (host / "file").touch()
        (host / "link").symlink_to("/dev/null")
        os.mkfifo(host / "fifo")
        for name, text in self._find_files():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("@HOST@", str(host)), encoding="utf-8", newline="")
        for name, target in self.links.items():
            (root / name).symlink_to(target)
        return [root / "0", root / "1", root / "2"]

    def _find_files(self) -> Iterator[tuple[str, str]]:
        if self.spec is not None:
            yield "0/a.yaml", self.spec
        if self.edits is not None:
            yield "0/a.yaml", _EDITS.format(self.version, self.edits)
        yield from self.files.items()


def name_host(config: Any, root: Path) -> Any:
    """A config with the path of the host's directory in place of its name."""
    host = bytes(root / "host")
    return msgspec.json.decode(msgspec.json.encode(config).replace(b"@HOST@", host))


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@cache
def read_cases() -> tuple[Case, ...]:
    """Every case of the table, in its order."""
    return tuple(
        msgspec.convert(case, Case)
        for file in sorted(_TABLE.glob("*.toml"))
        for case in tomllib.loads(file.read_text(encoding="utf-8"))["case"]
    )
