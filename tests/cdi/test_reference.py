"""Debian's CDI library gives each case of the table the same verdict and result, or `differs`."""

import os
from pathlib import Path

import pytest

from tests.cdi import reference
from tests.cdi.table import Case, Verdict, name_host, parse_version, read_cases
from tests.cdi.written import DISK, STABLE, write_all
from tests.support.pci_tree import PciTree
from vmplug import cdi

VERSION = reference.find_version() or "0.8.0"
KNOWN = [case for case in read_cases() if case.wants_version <= parse_version(VERSION)]

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
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


def test_what_cdi_write_makes(program: Path, tmp_path: Path) -> None:
    """Every kind is read, and a disk injected; nodes of VFIO this host has none of."""
    gpu, sound, nic = "0000:41:00.0", "0000:41:00.1", "0000:5e:00.0"
    tree = PciTree(tmp_path / "host").block_device("8:0", "null")
    tree.file("/run/udev/data/b8:0", f"S:disk/by-id/{STABLE}\n")
    tree.pci_function(gpu, group=7, driver="vfio-pci").pci_function(sound, group=7).vfio_group(7)
    tree.pci_function(nic, group=8, class_code=0x020000, cdev=0).vfio_group(8)
    tree.file("/dev/vfio/devices/vfio0")
    tree.mdev_type(gpu, "a.b-1").mdev(UUID, gpu, "a.b-1", group=9).vfio_group(9)
    assert len(write_all(tree, tmp_path)) == 4
    registry = cdi.read_directories([tmp_path / "cdi"])
    assert [*registry.devices] == [
        DISK,
        "vmplug.org/mdev-a-b-1=9",
        "vmplug.org/vfio-8086-0108=7",
        "vmplug.org/vfio-8086-0200=vfio0",
    ]
    config = {"ociVersion": "1.0.2", "linux": {"resources": {"devices": []}}}
    for name in registry.devices:
        is_here = name == DISK
        request = reference.Request(
            dirs=[str(tmp_path / "cdi")],
            devices=[name],
            config=config,
            expected=cdi.inject(config, [name], registry) if is_here else config,
        )
        answer = reference.ask(program, request)
        assert answer
        assert (answer.errors, answer.unresolved) == ({}, [])
        if is_here:
            assert (answer.failure, answer.config) == ("", answer.expected)
        else:
            assert "/dev/vfio/" in answer.failure


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
