"""A socket is the file that was there when the device was plugged, not whatever has its name."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmplug.errors import StateError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.journal.journal import Journal
from vmplug.manager.manager import DeviceManager
from vmplug.oci.requests import NetInfo, Request, ShareInfo

PATH = "/run/b"
SHARE = ShareInfo(tag="work", source=PATH)
ONCE = NetInfo(label="eth0", socket_path=PATH, driver_options={"reconnect": "0"})
AGAIN = NetInfo(label="eth0", socket_path=PATH)


def serve(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend starts, and takes the name from the one before, if any."""
    (host / "run").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(host / "run")  # the names of sockets must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("new")
    Path("new").rename("b")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    serve(tmp_path / "host", monkeypatch)
    return tmp_path / "host"


@pytest.fixture
def devices(host: Path, tmp_path: Path) -> Iterator[DeviceManager]:
    with Journal.open(tmp_path / "state") as journal:
        yield DeviceManager(
            vm="sb1", host=HostRoot(host), hypervisor=FakeHypervisor(), journal=journal
        )


@pytest.mark.parametrize("wanted", [SHARE, ONCE])
def test_another_backend_at_the_path_is_not_counted_for_the_one_that_the_vm_has(
    host: Path, devices: DeviceManager, monkeypatch: pytest.MonkeyPatch, wanted: Request
) -> None:
    """QEMU has its connection to the one before: the second owner would get that one's data."""
    devices.attach(wanted, owner="c1")
    devices.attach(wanted, owner="c2")
    serve(host, monkeypatch)
    (checked,) = devices.check_places([wanted], owner="c3")
    assert checked.is_refused
    with pytest.raises(StateError) as refusal:
        devices.attach(wanted, owner="c3")
    assert refusal.value.state == "replaced"
    assert {hold.owner for hold in devices.attachments()} == {"c1", "c2"}


def test_a_device_that_reconnects_has_whatever_serves_its_path(
    host: Path, devices: DeviceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.attach(AGAIN, owner="c1")
    serve(host, monkeypatch)
    devices.attach(AGAIN, owner="c2")
    assert [hold.owner for hold in devices.attachments()] == ["c1", "c2"]
