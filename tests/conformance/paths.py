"""Host paths and kinds: where a request leads on the host, and what it is."""

from contextlib import chdir

from tests.conformance.host import add_node, build_host, open_store, request
from tests.conformance.vector import Adapter, Answer, Case, Deviation, Facts, attempt, kind_of
from tests.support.tree import HostTree
from vmplug.address import DevNum
from vmplug.host.device import DeviceType
from vmplug.host.loop import LoopBacking, read_backing_file
from vmplug.host.resolve import classify, find_sysfs_node, get_host_path
from vmplug.host.vhost_user import VhostUserStore
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.spec import parse_config


def _sysfs_directory(case: Case) -> Answer:
    """Each directory of sysfs names another node, so that the answer tells which was read."""
    number = f"{case.input['Major']}:{case.input['Minor']}"
    tree, sys_dev = HostTree(case.path), case.setup["SysDevPrefix"]
    directories = {f"/dev/{name}": f"{sys_dev}/{name}/{number}" for name in ("char", "block")}
    for node, directory in directories.items():
        tree.file(f"{directory}/uevent", f"DEVNAME={node.removeprefix('/dev/')}\n")
    tree.file("uevent", "DEVNAME=relative\n")
    with chdir(case.path):
        node = attempt(lambda: find_sysfs_node(request({**case.input, **_ANYWHERE}), tree.root))
    ours = directories[node] if isinstance(node, str) else node
    return Answer(ours, case.expected["result"])


_ANYWHERE = {"ContainerPath": "/dev/x"}


def _host_path(case: Case) -> Answer:
    assert case.setup["SysDevPrefix"] == "$ROOT/sys/dev"
    tree = build_host(case)
    device: Facts = case.input["device"]
    if case.mended and case.expected["result"] == device["ContainerPath"]:
        add_node(tree, device)
    cwd = case.path / case.setup.get("cwd", "$ROOT").removeprefix("$ROOT").lstrip("/")
    cwd.mkdir(exist_ok=True)
    store = open_store(case, tree, case.input)
    with chdir(cwd):
        ours = attempt(lambda: get_host_path(request(device), tree.root, store))
    katas = case.expected["result"].removeprefix("$ROOT")
    return Answer(ours, kind_of(case.expected["error"]) or katas)


def _backing_file(case: Case) -> Answer:
    tree = build_host(case)
    sysfs_path = case.setup["sys_dev_path"].removeprefix("$ROOT")
    backing = attempt(lambda: read_backing_file(sysfs_path, tree.root))
    ours = backing.backing_file if isinstance(backing, LoopBacking) else backing
    return Answer(ours, kind_of(case.expected["error"]) or case.expected["result"])


def _cgroup_read_only(case: Case) -> Answer:
    rules = [
        {key.lower(): value for key, value in rule.items()} for rule in case.input["rules"] or ()
    ]
    linux = {"devices": [device], "resources": {"devices": rules}}
