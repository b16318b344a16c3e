"""Specs of CDI are written in a thread, while the loop goes on."""

import asyncio
from pathlib import Path

import pytest

from tests.support.tree import HostTree
from vmplug import PolicyError, Setup, aio, read_policy, write_cdi_specs

RULES = """
[[rule]]
name = "disks"
kinds = ["block"]
"""


def test_a_coroutine_writes_what_the_function_writes(tmp_path: Path) -> None:
    tree = HostTree(tmp_path / "host").block_device("8:0", "sda")
    tree.file("/run/udev/data/b8:0", "S:disk/by-id/wwn-0x5000\n")
    (tmp_path / "policy.toml").write_text(RULES)
    setup = Setup(host=tree.root, policy=read_policy(tmp_path / "policy.toml"))
    written = asyncio.run(aio.write_cdi_specs(tmp_path / "cdi", setup=setup))
    assert [Path(path).name for path in written.written] == ["vmplug.org-disk.yaml"]
    again = write_cdi_specs(tmp_path / "cdi", setup=setup)
    assert (again.devices, again.unchanged) == (written.devices, written.written)


def test_its_errors_come_back(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no policy says which devices"):
        asyncio.run(aio.write_cdi_specs(tmp_path / "cdi", setup=Setup()))
    assert not (tmp_path / "cdi").exists()
