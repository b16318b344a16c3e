"""A wrong type is a TypeError that names the argument, whatever public callable gets it."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import vmplug
from tests.contract.sandbox import Hooked
from tests.test_public_closure import PUBLIC, hints
from vmplug.arguments import INSIDE, LOOKUPS, check_arguments


class Nonsense:
    """Of no type that an argument has."""


def methods_of(kind: type) -> Iterator[tuple[str, Callable[..., object]]]:
    for name, member in vars(kind).items():
        function = getattr(member, "__func__", member)
        is_called = kind.__name__ not in INSIDE and not vars(kind).get("_is_protocol")
        is_public = not name.startswith("_") and is_called
        makes = name == "__init__" or (name == "__new__" and "_fields" not in vars(kind))
        if inspect.isfunction(function) and (is_public or makes):
            yield f"{kind.__name__}.{name}", function


def calls() -> Iterator[tuple[str, Callable[..., object]]]:
    """Every public function, method and constructor that takes an argument."""
    for name, value in PUBLIC.items():
        found = methods_of(value) if isinstance(value, type) else [(name, value)]
        for where, function in found:
            if inspect.isfunction(function) and set(hints(function)) - {"return"}:
                yield where, function


def arguments_of(function: Any) -> Iterator[str]:
    """Those that not every value is right for."""
    for name, annotation in hints(function).items():
        if name != "return" and annotation not in {Any, object}:
            yield name


@pytest.mark.parametrize(("where", "function"), list(calls()), ids=lambda part: str(part)[:60])
def test_each_argument_is_named(where: str, function: Any) -> None:
    inner = function.__wrapped__
    for name in arguments_of(function):
        with pytest.raises(TypeError, match=rf": {name} must be .*, not Nonsense"):
            check_arguments(inner, [], {name: Nonsense()})


SHARE = vmplug.ShareInfo(tag="work", source="/srv")
HOST = vmplug.HostRoot("/")

DISK = vmplug.DeviceInfo(
    container_path="/dev/null", dev_type=vmplug.DevType.CHAR, devnum=vmplug.DevNum(1, 3)
)

api: Any = vmplug
"""As for those who have no type checker."""

WRONG: dict[str, Callable[[], object]] = {
    "detach_owner: owner must be str, not int": lambda: api.detach_owner(7),
    "start_vm: spec must be VmSpec, not str": lambda: api.start_vm("sb1"),
    "check_requests: requests must be Sequence[.*], not str": lambda: api.check_requests("a"),
    "check_requests: requests must be .*, not ShareInfo": lambda: api.check_requests(SHARE),
    "check_requests: requests must be .*, not DeviceInfo": lambda: api.check_requests(DISK),
    "check_requests: requests must be .*, not list of int": lambda: api.check_requests([1]),
    "check_requests: allow must be Iterable.Code., not list of str": lambda: api.check_requests(
        [], allow=["mounted-on-host"]
    ),
    "list_vms: setup must be Setup, not str": lambda: api.list_vms(setup="/run/vmplug"),
    "reconcile_host: timeout_s must be float, not bool": lambda: api.reconcile_host(
        timeout_s=True
    ),
    "DeviceManager.open: host must be HostRoot, not str": lambda: api.DeviceManager.open(
        vm="sb1", host="/", hypervisor=vmplug.FakeHypervisor()
    ),
    "DeviceManager.open: hypervisor must be Hypervisor, not str": lambda: api.DeviceManager.open(
        vm="sb1", host=HOST, hypervisor="/run/qmp"
    ),
    "HostRoot: root must be str or PathLike.str., not int": lambda: api.HostRoot(7),
    "DevNum: minor must be int, not str": lambda: api.DevNum(8, "0"),
    "DeviceInfo: read_only must be bool, not str": lambda: api.DeviceInfo(
        container_path="/dev/a", dev_type=vmplug.DevType.CHAR, read_only="no"
    ),
    "Bdf.parse: text must be str, not int": lambda: api.Bdf.parse(7),
    "get_host_path: root must be HostRoot, not str": lambda: api.get_host_path(DISK, "/"),
    "get_host_path: info must be DeviceInfo, not int": lambda: api.get_host_path(7, HOST),
    "resolve_all: .* must be .*, not list of int": lambda: api.resolve_all([7], HOST),
    "HostPathCache.get_host_path: info must be DeviceInfo, not int": lambda: api.HostPathCache(
        HOST
    ).get_host_path(7),
    "VmSpec: cpus must be int, not str": lambda: api.VmSpec(name="sb1", cpus="2"),
    "VmSpec: kernel must be str or None, not PosixPath": lambda: api.VmSpec(
        name="sb1", kernel=Path("/vmlinuz")
    ),
    "Setup: host must be HostRoot, not str": lambda: api.Setup(host="/"),
    "Setup: policy must be Policy or None, not str": lambda: api.Setup(policy="/etc/p.toml"),
    "NetInfo: label must be str, not int": lambda: api.NetInfo(label=7, socket_path="/s"),
    "ShareInfo: source must be str, not PosixPath": lambda: api.ShareInfo(
        tag="work", source=Path("/srv")
    ),
    "RngInfo: source must be str, not NoneType": lambda: api.RngInfo(source=None),
    "VfioInfo: device must be str, not Bdf": lambda: api.VfioInfo(
        label="gpu", device=vmplug.Bdf.parse("0000:3b:00.0")
    ),
    "VfSettings: vlan must be int or None, not str": lambda: api.VfSettings(vlan="7"),
}
"""What a person sees, and the call."""


@pytest.mark.parametrize(("said", "call"), WRONG.items(), ids=lambda part: str(part)[:40])
def test_the_error_names_the_argument(said: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=f"^{said.replace('[.*]', '.*')}$"):
        call()


def test_nothing_is_begun_when_one_argument_is_wrong(tmp_path: Path) -> None:
    machine = vmplug.FakeHypervisor()
    with vmplug.DeviceManager.open(
        vm="sb1", host=HOST, hypervisor=machine, state_dir=tmp_path / "state"
    ) as devices:
        with pytest.raises(TypeError, match=r"DeviceManager.attach: owner must be str or None"):
            devices.attach(DISK, owner=7)  # type: ignore[arg-type]
        assert devices.attachments() == []
        assert devices.attach(DISK, owner="ctr1").owner == "ctr1"


def test_the_check_of_a_hypervisor_asks_it_nothing(tmp_path: Path) -> None:
    machine = vmplug.FakeHypervisor()
    asked = list[str]()
    machine._monitor = Hooked(machine._monitor, lambda command: asked.append(command.execute))
    vmplug.DeviceManager.open(
        vm="sb1", host=HOST, hypervisor=machine, state_dir=tmp_path / "state"
    ).close()
    assert asked == []


def test_a_call_is_checked_though_one_like_it_has_passed() -> None:
    for options in ({}, {"cache": "none"}):
        api.ShareInfo(tag="work", source="/srv", driver_options=options)
        api.DevNum(1, 3)
        api.DeviceInfo(container_path="/dev/x", dev_type=vmplug.DevType.FIFO, uid=0)
    with pytest.raises(TypeError, match="driver_options must be"):
        api.ShareInfo(tag="work", source="/srv", driver_options={"cache": 1})
    with pytest.raises(TypeError, match="minor must be int, not str"):
        api.DevNum(1, "3")
    with pytest.raises(TypeError, match="gid must be int or None, not str"):
        api.DeviceInfo(container_path="/dev/x", dev_type=vmplug.DevType.FIFO, gid="0")
    with pytest.raises(TypeError, match="driver_options must be"):
        api.DeviceInfo(
            container_path="/dev/x", dev_type=vmplug.DevType.FIFO, driver_options={"a": 1}
        )


class Two(NamedTuple):
    """As a caller may have."""

    one: object
    other: object


@pytest.mark.parametrize("other", [DISK, 7])
def test_a_named_tuple_is_no_list_of_its_fields(other: object) -> None:
    with pytest.raises(TypeError, match=r"requests must be .*, not Two$"):
        api.check_requests(Two(DISK, other))


def test_an_iterator_is_not_read_before_its_time(tmp_path: Path) -> None:
    codes = iter([vmplug.Code.IS_SWAP])
    vmplug.check_requests([DISK], allow=codes, setup=vmplug.Setup(state_dir=tmp_path))
    assert list(codes) == []


def test_what_is_checked_looks_as_it_was_written() -> None:
    assert inspect.signature(vmplug.detach_owner) == inspect.signature(
        vmplug.detach_owner.__wrapped__  # type: ignore[attr-defined]
    )
    assert str(vmplug.detach_owner.__doc__).startswith("Take back everything")
    assert {"get_host_path", "resolve"} <= LOOKUPS
