"""Cold plug of vhost-user devices: their options, and the life of a share that begins so."""

from typing import Any

from tests.kata.cold import ColdMachine
from tests.kata.command_lines import answer, written
from tests.kata.terms import Terms, command_line
from tests.kata.vector import Adapter, Answer, Case, Refusal, attempt, error_of
from tests.kata.vhost_user import SOCKET, open_store, stored
from tests.support.tree import HostTree
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.errors import BackendError
from vmplug.host.kind import DeviceType
from vmplug.host.vhost_user.virtiofsd import VIRTIOFSD_PROGRAMS
from vmplug.hypervisor.qemu.start.machine import Machine
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.journal.records import Attachment
from vmplug.oci.requests import NetInfo, Request, ShareInfo


def _written_for_qemu(case: Case) -> Answer:
    said = case.input
    said.skip("ours are drawn", "CharDevID", "TypeDevID")
    assert said.get("Transport", "ccw") == "ccw"
    assert said.get("DevNo", "fe.0.0001") == "fe.0.0001"
    words = {"CacheSize": "cache-size", "QueueSize": "queue-size"}
    options = {option: str(said[key]) for key, option in words.items() if key in said}
    kind, path = f"{said['VhostUserType']}-pci", said["SocketPath"]
    info = attempt(
        lambda: _request(DeviceType(kind), path, said.get("Address"), said.get("Tag", ""), options)
    )
    if isinstance(info, Refusal):
        case.setup.skip("the request is refused", "machine")
        return answer(case, info)
    machine = attempt(lambda: Machine(case.setup["machine"]))
    return answer(case, machine if isinstance(machine, Refusal) else _plug(case, machine, info))


def _request(
    kind: DeviceType, path: str, mac: str | None, tag: str, options: dict[str, str]
) -> Request:
    match kind:
        case DeviceType.VHOST_USER_NET:
            said = {"mac": mac} if mac else {}
            return NetInfo(label="eth0", socket_path=path, driver_options=said)
        case DeviceType.VHOST_USER_FS:
            return ShareInfo(tag=tag, source=path, driver_options=options)
        case _:
            return stored(kind)


def _plug(case: Case, machine: Machine, info: Request) -> Terms | Refusal:
    """The socket of the store has a place of its own, so Kata's word for it is put there."""
    path = case.input["SocketPath"]
    tree = HostTree(case.path)
    store = None
    if isinstance(info, NetInfo | ShareInfo):
        tree.node(_absolute(path), "s")
    else:
        store = open_store(tree, DeviceType.VHOST_USER_SCSI)
    terms = written(ColdMachine(case, tree.root, machine, store=store), info)
    for _, facts in () if isinstance(terms, Refusal) else terms:
        if facts.get("path") == SOCKET:
            facts["path"] = _absolute(path)
    return terms


def _absolute(path: str) -> str:
    return f"/{path.lstrip('/')}"


def _appended(case: Case) -> Answer:
    """Ours takes no relative path; the file that Kata's means is at the root."""
    said = case.input
    said.skip("ours is drawn", "DevID")
    assert case.expected["error"] is None
    kind, path = DeviceType(said["Type"]), _absolute(said["SocketPath"])
    info = _request(kind, path, said["MacAddress"], said["Tag"], {})
    ours = _plug(case, Machine(case.setup["machine"]), info)
    katas = command_line([word.replace("path=", "path=/") for word in case.expected["argv"]])
    return Answer(ours, katas)


class _Daemons(HostVirtiofsdRunner):
    """Daemons that cannot be started."""

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        raise BackendError(daemon.program, f"{device_id}: boom")


def _share_life(case: Case) -> Answer:
    """A share by its socket goes in and out; one with a daemon of ours fails."""
    assert case.input["steps"] == ["attach", "detach", "attach with failing AppendDevice"]
    tree = HostTree(case.path).node("/vu/s", "s").file(VIRTIOFSD_PROGRAMS[0])
    (case.path / "data").mkdir()
    machine = ColdMachine(case, tree.root, daemons=_Daemons("the VM"))
    hold = machine.try_attach(ShareInfo(tag="kataShared", source="/vu/s"))
    assert isinstance(hold, Attachment)
    (record,) = machine.records()
    appended = [facts["driver"] for option, facts in machine.terms() if option == "-device"]
    errors = [None, machine.try_detach(hold)]
    left = machine.terms()
    errors.append(error_of(machine.try_attach(ShareInfo(tag="other", source="/data"))))
    ours: dict[str, Any] = {
        "attrs_type": appended[0],
        "count_after_failed_attach": len(machine.manager.attachments()),
        "dev_id_hex_length": len(record.id),
        "device_type": str(record.kind),
        "errors": errors,
        "receiver_calls": [f"AppendDevice({driver})" for driver in appended],
        "saved_state_has_vhost_user_dev": record.guest_address is not None,
        "saved_state_type": str(record.kind),
        "left_after_detach": left,
    }
    katas_errors = [
        "BackendError" if error == "boom" else error for error in case.expected["errors"]
    ]
    return Answer(
        ours, {**case.expected, "errors": katas_errors, "left_after_detach": "all of it"}
    )


ADAPTERS: dict[str, Adapter] = {
    "drivers.vhost-user-fs": _share_life,
    "govmm qemu.VhostUserDevice.QemuParams": _written_for_qemu,
    "qemuArchBase.appendVhostUserDevice": _appended,
}
