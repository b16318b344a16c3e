"""Debian's CDI library: reference/main.go is built on it, and puts a case to it.

Debian 12 has 0.5.2 of it, under its old name, Debian 13 has 0.8.0.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import msgspec

from tests.cdi.table import Config

NEEDS = "needs Debian's golang-go and its CDI library: tools/install-packages test"
_GOPATH = Path("/usr/share/gocode")
_NAME = "tags.cncf.io/container-device-interface"
_OLD_NAME = "github.com/container-orchestrated-devices/container-device-interface"
_SOURCE = Path(__file__).parent / "reference" / "main.go"
_BUILT = Path("build", "cdi-reference")
_PANIC = 2
"""How a program in Go ends that crashes."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    dirs: list[str]
    devices: list[str]
    config: Config
    expected: Config


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`config` is that after the injection, `expected` the request's, as the library writes it."""

    errors: dict[str, list[str]]
    unresolved: list[str]
    failure: str
    config: Config
    expected: Config


def find_library() -> str | None:
    """The import path of the library; None if it, or Go, is not installed."""
    names = (name for name in (_NAME, _OLD_NAME) if (_GOPATH / "src" / name).is_dir())
    return next(names, None) if shutil.which("go") else None


def find_version() -> str | None:
    """The newest version of CDI that the library knows; None without a library."""
    library = find_library()
    if library is None:
        return None
    text = (_GOPATH / "src" / library / "specs-go" / "config.go").read_text()
    found = re.search(r'CurrentVersion = "([0-9.]+)"', text)
    assert found, text
    return found[1]


def build() -> Path:
    """The program; it is built once for each library and source."""
    library = find_library()
    assert library, NEEDS
    source = _SOURCE.read_text().replace(_NAME, library)
    _BUILT.mkdir(parents=True, exist_ok=True)
    program = _BUILT / f"reference-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    with (_BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _compile(source, program)
    return program.resolve()


def _compile(source: str, program: Path) -> None:
    folder = _BUILT / "source"
    folder.mkdir(exist_ok=True)
    (folder / "main.go").write_text(source)
    draft = program.with_suffix(".draft")
    go = {"GO111MODULE": "off", "GOPATH": str(_GOPATH), "GOFLAGS": "", "GOTOOLCHAIN": "local"}
    go["GOCACHE"] = str((_BUILT / "cache").resolve())
    built = subprocess.run(
        ["go", "build", "-o", draft, folder / "main.go"],
        env=os.environ | go,
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    shutil.rmtree(_BUILT / "cache")
    draft.rename(program)


def ask(program: Path, request: Request) -> Answer | None:
    """The library's answer; None if it crashes."""
    done = subprocess.run(
        [program],
        input=msgspec.json.encode(request),
        check=False,
        capture_output=True,
        timeout=120,
    )
    if done.returncode == _PANIC:
        return None
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return msgspec.json.decode(done.stdout, type=Answer)
