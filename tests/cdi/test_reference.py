"""Debian's CDI library gives each case of the table the same verdict and result, or `differs`."""

import os
from pathlib import Path

import pytest

from tests.cdi import reference
from tests.cdi.table import Case, Verdict, name_host, parse_version, read_cases
from vmplug import cdi

VERSION = reference.find_version() or "0.8.0"
KNOWN = [case for case in read_cases() if case.wants_version <= parse_version(VERSION)]

WRITTEN = [
    case for case in KNOWN if case.result and not (case.differs or case.refused or case.files)
]


@pytest.fixture(scope="module")
def program() -> Path:
    if reference.find_library() is None and "CI" not in os.environ:
        pytest.skip(reference.NEEDS)
    return reference.build()


@pytest.mark.slow
@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.name)
def test_case(case: Case, program: Path, tmp_path: Path) -> None:
    difference = case.find_difference(VERSION)
    expected = difference.result if difference else case.result
    request = reference.Request(
        dirs=[str(path) for path in case.lay_out(tmp_path)],
        devices=list(case.devices),
        config=name_host(case.config, tmp_path),
        expected=name_host(case.config if expected is None else expected, tmp_path),
    )
    answer = reference.ask(program, request)
    assert _find_verdict(answer) == (difference or case).verdict, answer
    if answer is None:
        return
    assert _find_refused(answer, tmp_path) == sorted((difference or case).refused)
    if difference is None:
        assert answer.unresolved == case.wants_unresolved
    if difference is None or difference.result is not None:
        assert answer.config == answer.expected


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_what_vmplug_writes(case: Case, suffix: str, program: Path, tmp_path: Path) -> None:
    """It means the same, in the lowest version that has it."""
    for file in cdi.read_directories(case.lay_out(tmp_path)).files:
        os.unlink(file.file)
        cdi.write_spec(file.spec, Path(file.file).with_suffix(suffix))
    request = reference.Request(
        dirs=[str(tmp_path / "0"), str(tmp_path / "1")],
        devices=list(case.devices),
        config=name_host(case.config, tmp_path),
        expected=name_host(case.result, tmp_path),
    )
    answer = reference.ask(program, request)
    assert answer
    assert (answer.errors, answer.failure) == ({}, "")
    assert answer.config == answer.expected


def _find_verdict(answer: reference.Answer | None) -> Verdict:
    if answer is None:
        return "crash"
    if answer.unresolved:
        return "unresolved"
    return "failed" if answer.failure else "injected"


def _find_refused(answer: reference.Answer, root: Path) -> list[str]:
    """The files that cannot be used; of those that only conflict, the other devices can be."""
    return sorted(
        str(Path(path).relative_to(root))
        for path, errors in answer.errors.items()
        if any("conflicting device" not in error for error in errors)
    )
