"""A directory where a file is expected: it is refused, and nothing stays open."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vmplug import read_bundle
from vmplug.cdi import read_spec
from vmplug.cdi.own import OwnFiles
from vmplug.errors import DeviceError
from vmplug.policy.file import read_policy


def compare_own(path: Path) -> None:
    changes = OwnFiles(str(path.parent), "").compare({path.name: ""})
    assert changes.taken == (str(path),)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_spec, "a.yaml"),
        (compare_own, "a.yaml"),
        (read_policy, "policy.toml"),
        (lambda path: read_bundle(path.parent), "config.json"),
    ],
    ids=["spec", "own", "policy", "bundle"],
)
def test_a_directory_that_is_no_file_is_closed(
    read: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    before = set(os.listdir("/proc/self/fd"))
    with suppress(DeviceError):
        read(tmp_path / name)
    assert set(os.listdir("/proc/self/fd")) <= before
