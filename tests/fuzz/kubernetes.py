"""The configuration of the device plugin: what is accepted has names that all readers accept."""

import os
import re
from functools import cache
from pathlib import Path

from tests.fuzz.guard import changes_only
from tests.support.memory import directory_of_this_process
from tests.support.pci_tree import PciTree
from vmplug.cdi.names import QualifiedName, parse_annotations
from vmplug.errors import PolicyError
from vmplug.host.root import HostRoot
from vmplug.kubernetes.answer import describe_allocated
from vmplug.kubernetes.config import Config, Resource, read_config
from vmplug.kubernetes.specs import format_specs
from vmplug.kubernetes.units import Unit, find_units

_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""What Kubernetes takes. Source: k8s.io/apimachinery, IsQualifiedName."""
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_RESOURCE = re.compile(r"(?!requests\.)[a-z0-9.-]{1,244}/[A-Za-z0-9._-]{1,63}")
"""Of a pod's request, which quotas write as `requests.NAME`."""
_FILE_LENGTH_MAX = 240
"""The kernel takes 255; the draft of a file has a longer name."""


@cache
def _place() -> tuple[str, HostRoot]:
    directory = directory_of_this_process("vmplug-fuzz-")
    tree = PciTree(Path(directory) / "host")
    tree.pci_function("0000:3b:00.0", class_code=0x030200, vendor=0x10DE, group=26)
    tree.pci_function("0000:3b:00.1", class_code=0x040300, vendor=0x10DE, group=26)
    tree.pci_function("0000:3c:00.0", driver="vfio-pci", group=27, numa_node=1)
    tree.block_device("259:0", "nvme0n1")
    tree.file("/run/udev/data/b259:0", "S:disk/by-id/nvme-disk_S1\nI:1\n")
    return os.path.join(directory, "device-plugin.toml"), HostRoot(tree.path)


def check(data: bytes) -> None:
    """Any bytes are refused in one sentence, or select devices that can be given."""
    path, host = _place()
    Path(path).write_bytes(data)
    with changes_only():
        first, second = _read(path), _read(path)
        assert first == second
        if isinstance(first, Config):
            _check_given(first, find_units(first, host, {}))
        else:
            assert first.startswith(f"the configuration {path} ")


def _read(path: str) -> Config | str:
    try:
        return read_config(path)
    except PolicyError as error:
        return error.message


def _check_given(config: Config, units: list[Unit]) -> None:
    variables = set[str]()
    for resource in config.resources:
        assert _RESOURCE.fullmatch(resource.name)
        own = [unit for unit in units if unit.resource == resource]
        assert len({unit.id for unit in own}) == len(own)
        assert all(_ID.fullmatch(unit.id) for unit in own)
        _check_answer(resource, own)
        assert resource.in_env not in variables
        variables.add(resource.in_env)
    texts = format_specs(units)
    assert len(texts) == len({unit.resource.name for unit in units if unit.resource.given.is_cdi})
    assert all(len(os.fsencode(name)) <= _FILE_LENGTH_MAX for name in texts)


def _check_answer(resource: Resource, units: list[Unit]) -> None:
    answer = describe_allocated(resource, units)
    assert all(_VARIABLE.fullmatch(name) for name in answer.envs)
    annotated = parse_annotations(dict(answer.annotations)).values()
    names = [name for each in annotated for name in each]
    names += [device.name for device in answer.cdi_devices]
    assert len(names) == (len(units) if resource.given.is_cdi else 0)
    assert [str(QualifiedName.parse(name)) for name in names] == names
