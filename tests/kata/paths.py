"""Host paths and kinds: where a request leads on the host, and what it is."""

from contextlib import chdir

from tests.kata.host import add_node, build_host, open_store, request
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Facts,
    attempt,
    error_of,
    katas_result,
    kind_of,
)
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.host.block.loop import LoopBacking, read_backing_file
from vmplug.host.host_path import find_sysfs_node, get_host_path
from vmplug.host.kind import DeviceType
from vmplug.host.resolve import classify
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.oci.info import DeviceInfo, DevType


def _sysfs_directory(case: Case) -> Answer:
    """Each directory of sysfs names another node, so that the answer tells which was read."""
    number = f"{case.input['Major']}:{case.input['Minor']}"
    tree, sys_dev = HostTree(case.path), case.setup["SysDevPrefix"]
    directories = {f"/dev/{name}": f"{sys_dev}/{name}/{number}" for name in ("char", "block")}
    for node, directory in directories.items():
        tree.file(f"{directory}/uevent", f"DEVNAME={node.removeprefix('/dev/')}\n")
    tree.file("uevent", "DEVNAME=relative\n")
    with chdir(case.path):
        answer = attempt(
            lambda: find_sysfs_node(request({"ContainerPath": "/dev/x", **case.input}), tree.root)
        )
    ours = directories[answer] if isinstance(answer, str) else answer
    return Answer(ours, case.expected["result"])


def _host_path(case: Case) -> Answer:
    assert case.setup["SysDevPrefix"] == "$ROOT/sys/dev"
    katas = katas_result(case.expected).removeprefix("$ROOT")
    # Where Kata refuses for a reason of its own, the sockets must not be ours to refuse.
    refused = case.expected["error"] is not None
    tree = build_host(case, with_sockets=case.mended or refused)
    device: Facts = case.input["device"]
    if case.mended and katas == device["ContainerPath"]:
        assert _refusal_of_another_node(tree, device) == "NoSuchDevice"
        add_node(tree, device)
    cwd = case.path / case.setup.get("cwd", "$ROOT").removeprefix("$ROOT").lstrip("/")
    cwd.mkdir(exist_ok=True)
    store = open_store(case, tree, case.input)
    with chdir(cwd):
        ours = attempt(lambda: get_host_path(request(device), tree.root, store))
    return Answer(ours, katas)


def _refusal_of_another_node(tree: HostTree, device: Facts) -> str | None:
    """What a container path gives that is a node of the next number, or a file for a FIFO."""
    node = tree.path / device["ContainerPath"].lstrip("/")
    if device["DevType"] == "p":
        tree.file(device["ContainerPath"])
    else:
        add_node(tree, {**device, "Minor": device["Minor"] + 1})
    error = error_of(attempt(lambda: get_host_path(request(device), tree.root)))
    node.unlink()
    return error.kind if error else None


def _backing_file(case: Case) -> Answer:
    tree = build_host(case)
    sysfs_path = case.setup["sys_dev_path"].removeprefix("$ROOT")
    backing = attempt(lambda: read_backing_file(sysfs_path, tree.root))
    ours = backing.backing_file if isinstance(backing, LoopBacking) else backing
    return Answer(ours, katas_result(case.expected))


def _cgroup_read_only(case: Case) -> Answer:
    device = {
        "ContainerPath": "/dev/x",
        "DevType": case.input["type"],
        "Major": case.input["major"],
        "Minor": case.input["minor"],
    }
    rules = case.input["rules"] or []
    words = [{key.lower(): value for key, value in rule.items()} for rule in rules]
    return Answer(request(device, rules=words).read_only, case.expected["result"])


def _empty_path(case: Case) -> Answer:
    device = {
        "ContainerPath": case.input["path"],
        "DevType": case.input["type"],
        "Major": case.input["major"],
        "Minor": case.input["minor"],
    }
    return Answer(attempt(lambda: request(device)), kind_of(case.expected["error"]))


def _is_block(case: Case) -> Answer:
    device = {"ContainerPath": "/dev/x", "Major": 8, "Minor": 0, **case.input}
    is_block = attempt(lambda: classify(request(device), "/dev/x") is DeviceType.BLOCK)
    return Answer(is_block, case.expected["result"])


def _is_vfio(case: Case) -> Answer:
    kind = classify(_VFIO_CHAR, case.input["path"])
    return Answer(kind is DeviceType.VFIO, case.expected["result"])


def _is_vfio_control(case: Case) -> Answer:
    """The control device has a number of its own, 10:196, and the kernel says where it is."""
    control = {"ContainerPath": "/dev/x", "DevType": "c", "Major": 10, "Minor": 196}
    tree = HostTree(case.path).char_device("10:196", "vfio/vfio")
    host_path = get_host_path(request(control), tree.root)
    assert classify(request(control), host_path) is DeviceType.GENERIC
    return Answer(case.input["path"] == host_path, case.expected["result"])


def _vhost_user_kind(case: Case) -> Answer:
    file = {"HostPath": "/disk.img"} if case.input["Major"] == -1 else {}
    info = request({"ContainerPath": "/dev/x", "Minor": 0, **case.input, **file})
    kind = classify(info, "/dev/x", VhostUserStore("/vu"))
    ours = {
        "is_vhost_user_blk": kind is DeviceType.VHOST_USER_BLK,
        "is_vhost_user_scsi": kind is DeviceType.VHOST_USER_SCSI,
    }
    return Answer(ours, dict(case.expected))


_VFIO_CHAR = DeviceInfo(
    container_path="/dev/x", dev_type=DevType.CHAR, devnum=DevNum(major=252, minor=3)
)

ADAPTERS: dict[str, Adapter] = {
    "config.getSysDevPathImpl": _sysfs_directory,
    "config.GetHostPath": _host_path,
    "config.getBackingFile": _backing_file,
    "oci.deviceCgroupAccessIsReadOnly": _cgroup_read_only,
    "oci.newLinuxDeviceInfo": _empty_path,
    "manager.isBlock": _is_block,
    "manager.IsVFIODevice": _is_vfio,
    "manager.IsVFIOControlDevice": _is_vfio_control,
    "manager.IsVhostUserBlk / manager.isVhostUserSCSI": _vhost_user_kind,
}
