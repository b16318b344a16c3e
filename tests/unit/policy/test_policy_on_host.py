"""A policy on a host: by which paths a device goes, and that no detour escapes the rules."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest
from msgspec.structs import replace

from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.drivers.place import PlugMode
from vmplug.errors import NoSuchDevice, PolicyError
from vmplug.host.block.device import DiskFile
from vmplug.host.device import SharedDirectory
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.host.paths import find_paths
from vmplug.host.pci.group import VfioGroup
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.manager.examine import CheckContext, CheckedRequest, examine, refuse_not_allowed
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo, VfioInfo
from vmplug.policy.file import read_policy
from vmplug.policy.gate import PolicyCheck

GPU, AUDIO, NIC, BRIDGE = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0", "0000:3a:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
REMAPPING = "  0:  122  IR-IO-APIC   2-edge      timer\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mknod")

Gates = Callable[..., PolicyCheck]


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host")
    return tree.file("/proc/interrupts", REMAPPING)


@pytest.fixture
def gate(tmp_path: Path) -> Gates:
    def read(*rules: str) -> PolicyCheck:
        path = tmp_path / "policy.toml"
        each = (f'[[rule]]\nname = "r{i}"\n{rule}\n' for i, rule in enumerate(rules))
        path.write_text("".join(each))
        path.chmod(0o600)
        return PolicyCheck(policy=read_policy(path))

    return read


def disk(number: str, path: str = "/dev/xvda") -> DeviceInfo:
    return DeviceInfo(container_path=path, dev_type=DevType.BLOCK, devnum=DevNum.parse(number))


def image(path: str) -> DeviceInfo:
    return DeviceInfo(container_path="/dev/xvda", dev_type=DevType.BLOCK, host_path=path)


def look(request: Request, root: HostRoot, gate: PolicyCheck, **more: object) -> CheckedRequest:
    (examined,) = examine([request], root, known=CheckContext(gate=gate), **more)  # type: ignore[arg-type]
    return examined


def is_allowed(request: Request, root: HostRoot, gate: PolicyCheck, **more: object) -> bool:
    """Whether the policy has nothing against it, whatever else there may be."""
    return Code.NOT_ALLOWED not in {f.code for f in look(request, root, gate, **more).findings}


# what only a lease opens


def test_a_lease_opens_a_character_device_only_where_a_rule_names_it_alone(
    tree: PciTree, gate: Gates
) -> None:
    """A watchdog starts when somebody opens it; in a VM's request it is only counted."""
    tree.file("/dev/watchdog").class_device(
        "/sys/devices/virtual/misc/watchdog", "char", "10:130", "watchdog"
    )
    asked = DeviceInfo(
        container_path="/dev/watchdog", dev_type=DevType.CHAR, devnum=DevNum(10, 130)
    )
    for rule, may_open in (
        ('kinds = ["generic"]', False),
        ('numbers = ["c:10"]', False),
        ('paths = ["/dev/*"]', False),
        ('numbers = ["c:10:130"]', True),
        ('paths = ["/dev/watchdog"]', True),
    ):
        for mode, is_enough in ((PlugMode.HOT, True), (PlugMode.LEASE, may_open)):
            policy = replace(gate(rule), mode=mode)
            assert is_allowed(asked, tree.root, policy) is is_enough, (rule, mode)


# the names of a disk


def test_a_disk_goes_by_its_node_and_the_names_that_udev_read_from_hardware(
    tree: HostTree,
) -> None:
    tree.block_device("8:16", "sdb").file("/dev/sdb")
    lines = (
        "N:sdb",
        "S:disk/by-id/nvme-eui.0001",
        "S:disk/by-path/pci-0000:3b:00.0-nvme-1",
        "S:disk/by-label/written-by-a-guest",
        "S:disk/by-uuid/0001",
        "S:disk/by-partlabel/also",
        "E:DEVLINKS=/dev/disk/by-id/from-the-environment",
    )
    tree.file("/run/udev/data/b8:16", "\n".join(lines) + "\n")
    assert find_paths(resolve(disk("8:16"), tree.root), tree.root) == (
        "/dev/sdb",
        "/dev/disk/by-id/nvme-eui.0001",
        "/dev/disk/by-path/pci-0000:3b:00.0-nvme-1",
    )


def test_a_mapped_device_goes_by_its_name(tree: HostTree) -> None:
    tree.block_device("253:3", "dm-3").file("/sys/devices/virtual/block/dm-3/dm/name", "t-a\n")
    assert "/dev/mapper/t-a" in find_paths(resolve(disk("253:3"), tree.root), tree.root)


def test_a_loop_device_is_where_its_file_is(tree: HostTree, gate: Gates) -> None:
    tree.file("/data/images/a.img").link("/srv", "/data")
    tree.block_device("7:0", "loop0", loop={"backing_file": "/srv/images/a.img\n"})
    assert is_allowed(disk("7:0"), tree.root, gate('paths = ["/data/images/*"]'))
    assert is_allowed(disk("7:0"), tree.root, gate('paths = ["/dev/loop*"]'))
    assert not is_allowed(disk("7:0"), tree.root, gate('paths = ["/srv/images/*"]'))


def test_no_rule_matches_a_deleted_file(tree: HostTree, gate: Gates) -> None:
    tree.block_device("7:0", "loop0", loop={"backing_file": "/srv/a.img (deleted)\n"})
    assert not is_allowed(disk("7:0"), tree.root, gate('paths = ["/srv/**"]'))


# no way around


@pytest.mark.parametrize(
    "asked",
    [
        "/srv/images/../secret",
        "/srv/images/t1/../../secret",
        "/srv/images/link",
        "/srv/images/up/secret",
        "/srv/images/./link",
        "/srv/images/chain",
    ],
)
def test_a_rule_matches_the_target_of_a_path(tree: HostTree, gate: Gates, asked: str) -> None:
    tree.file("/srv/secret", b"x" * 512).file("/srv/images/t1/a.img", b"x" * 512)
    tree.link("/srv/images/link", "/srv/secret").link("/srv/images/up", "..")
    tree.link("/srv/images/chain", "t1/../link")
    rules = gate('paths = ["/srv/images/**"]')
    found = look(image(asked), tree.root, rules)
    assert [finding.code for finding in found.findings] == [Code.NOT_ALLOWED]
    assert "/srv/secret (block): no rule" in found.findings[0].message
    with pytest.raises(PolicyError, match=r"^/dev/xvda: /srv/secret \(block\)"):
        refuse_not_allowed([found])
    assert is_allowed(image("/srv/images/t1/a.img"), tree.root, rules)


def test_a_link_is_allowed_when_its_target_is_allowed(tree: HostTree, gate: Gates) -> None:
    tree.file("/srv/images/a.img", b"x" * 512).link("/home/t1/mine", "/srv/images/a.img")
    assert is_allowed(image("/home/t1/mine"), tree.root, gate('paths = ["/srv/images/*"]'))
    assert not is_allowed(image("/home/t1/mine"), tree.root, gate('paths = ["/home/**"]'))


@needs_root
def test_a_rule_matches_the_target_of_the_path_in_a_request(tree: HostTree, gate: Gates) -> None:
    """A number that sysfs does not list is looked for at the path in the container."""
    tree.node("/hidden/disk", "b", "240:1").link("/srv/images/a.img", "/hidden/disk")
    asked = disk("240:1", "/srv/images/a.img")
    assert not is_allowed(asked, tree.root, gate('paths = ["/srv/images/*"]'))
    assert is_allowed(asked, tree.root, gate('paths = ["/hidden/*"]'))


class Attacked(HostRoot):
    """This host, with a tenant who shows an innocent name whenever that is asked for."""

    def __init__(self, path: Path, innocent: Path, secret: Path) -> None:
        super().__init__()
        self._path, self._innocent, self._secret = path, innocent, secret
        self._turn(secret)

    def _turn(self, target: Path) -> None:
        draft = self._path.with_name("draft")
        draft.symlink_to(target) if target == self._secret else os.link(target, draft)
        draft.rename(self._path)

    def real_path(self, path: str) -> str:
        """See HostRoot."""
        self._turn(self._innocent)
        try:
            return super().real_path(path)
        finally:
            self._turn(self._secret)


def test_a_name_is_that_of_the_file_which_was_found(tmp_path: Path, gate: Gates) -> None:
    """A tenant may turn a path of his own into a link and back, at any moment."""
    mine, innocent, secret = (tmp_path / name for name in ("mine/a.img", "good", "secret"))
    mine.parent.mkdir()
    innocent.write_bytes(b"x" * 512)
    secret.write_bytes(b"y" * 512)
    root, check = Attacked(mine, innocent, secret), gate(f'paths = ["{mine.parent}/*"]')
    assert not is_allowed(image(str(mine)), root, check)
    mine.unlink()
    mine.write_bytes(b"x" * 512)
    assert is_allowed(image(str(mine)), HostRoot(), check)


_SHOW_INNOCENT = """
mount -t tmpfs none "$0"
touch "$0/a.img"
mount --bind "$1" "$0/a.img"
echo
read -r end
"""


@pytest.mark.root
def test_a_name_in_the_mounts_of_another_process_is_none(tmp_path: Path, gate: Gates) -> None:
    """Any user can make a mount namespace, and mount a file there under an innocent name."""
    mine, secret = tmp_path / "mine", tmp_path / "secret"
    mine.mkdir()
    secret.write_bytes(b"y" * 512)
    command = ["unshare", "--mount", "sh", "-ec", _SHOW_INNOCENT, str(mine), str(secret)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as tenant:
        assert tenant.stdin
        assert tenant.stdout
        assert tenant.stdout.readline() == b"\n"
        found = resolve(image(str(secret)), HostRoot())
        assert isinstance(found, DiskFile)
        (mine / "a.img").symlink_to(f"/proc/{tenant.pid}/root{mine}/a.img")
        turned = found._replace(host_path=f"{mine}/a.img")  # since it was found there
        with pytest.raises(NoSuchDevice, match=r"mine/a\.img was replaced"):
            find_paths(turned, HostRoot())
        assert find_paths(found, HostRoot()) == (str(secret),)
        tenant.stdin.close()


def test_a_directory_above_what_is_allowed_is_not(tree: HostTree, gate: Gates) -> None:
    tree.file("/srv/t1/work/a").file("/srv/t2/a")
    rules = gate('paths = ["/srv/t1/**"]')
    for source, allowed in (("/srv/t1/work", True), ("/srv/t1", False), ("/srv", False)):
        assert is_allowed(ShareInfo(tag="a", source=source), tree.root, rules) is allowed
    assert not is_allowed(ShareInfo(tag="a", source="/srv/t1/work/.."), tree.root, rules)


# kinds


@needs_root
def test_each_kind_goes_by_its_word(tree: PciTree, gate: Gates) -> None:
    tree.node("/dev/urandom", "c", "1:9").node("/run/vpp/eth0.sock", "s").file("/srv/work/a")
    tree.char_device("1:3", "null").pci_function(GPU, driver="vfio-pci", group=26).vfio_group(26)
    tree.block_device("8:16", "sdb").node("/dev/sdb", "b", "8:16")
    requests: dict[str, Request] = {
        "virtio-rng-pci": RngInfo(),
        "virtio-net-pci": NetInfo(label="eth0", socket_path="/run/vpp/eth0.sock"),
        "virtio-fs": ShareInfo(tag="work", source="/srv/work"),
        "virtio-9p": ShareInfo(
            tag="work", source="/srv/work", driver_options={"filesystem": "virtio-9p"}
        ),
        "generic": DeviceInfo(
            container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3)
        ),
        "vfio": VfioInfo(label="gpu0", device=GPU),
        "block": disk("8:16"),
    }
    others = {"vhost-user-blk-pci", "vhost-user-scsi-pci"}
    assert requests.keys() | others == {kind.word for kind in DeviceType}
    for word in requests:
        rules = gate(f'kinds = ["{word}"]')
        allowed = {kind for kind, asked in requests.items() if is_allowed(asked, tree.root, rules)}
        assert allowed == {word}


@needs_root
@pytest.mark.parametrize(
    ("rule", "is_named"),
    [
        ('numbers = ["c:10:200"]', True),
        ('paths = ["/dev/own-rng"]', True),
        ('kinds = ["virtio-rng-pci"]', False),
        ('numbers = ["c:10"]', False),
        ('paths = ["/dev/*"]', False),
        ('paths = ["/dev/**"]', False),
    ],
)
def test_a_rule_makes_a_source_of_the_device_that_it_names(
    tree: HostTree, gate: Gates, rule: str, *, is_named: bool
) -> None:
    tree.node("/dev/own-rng", "c", "10:200").node("/dev/urandom", "c", "1:9")
    found = look(RngInfo(source="/dev/own-rng"), tree.root, gate(rule)).findings
    assert [finding.code for finding in found] == ([] if is_named else [Code.NOT_RANDOM])
    overruled = look(RngInfo(source="/dev/own-rng"), tree.root, gate(rule), allowed=Code)
    assert overruled.is_refused is not is_named
    kernels = look(RngInfo(), tree.root, gate('kinds = ["virtio-rng-pci"]'))
    assert not kernels.findings


@needs_root
def test_a_socket_of_the_store_goes_by_its_number_and_its_path(
    tree: HostTree, gate: Gates
) -> None:
    tree.node("/store/block/devices/d0", "b", "241:0").node("/store/block/sockets/d0", "s")
    store = VhostUserStore("/store", root=tree.root)
    for rule in (
        'numbers = ["b:241"]',
        'paths = ["/store/block/sockets/*"]',
        'kinds = ["vhost-user-blk-pci"]',
    ):
        assert is_allowed(disk("241:0"), tree.root, gate(rule), vhost_user_store=store)
    for rule in ('numbers = ["b:242"]', 'paths = ["/store/block/devices/*"]', 'kinds = ["block"]'):
        assert not is_allowed(disk("241:0"), tree.root, gate(rule), vhost_user_store=store)


def test_a_backend_that_is_not_allowed_is_not_probed(tmp_path: Path, gate: Gates) -> None:
    """A socket of somebody else's service hears nothing of it."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "s"
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(0)
        asked = NetInfo(label="eth0", socket_path=str(path))
        found = look(asked, HostRoot("/"), gate('paths = ["/run/vpp/*"]'))
        assert [finding.code for finding in found.findings] == [Code.NOT_ALLOWED]
        with pytest.raises(BlockingIOError):
            listener.accept()


# groups of functions


def group_of_two(tree: PciTree) -> PciTree:
    tree.pci_function(BRIDGE, class_code=0x060400, driver="pcieport", group=26)
    for bdf, class_code, device in ((GPU, 0x030000, 0x1DB4), (AUDIO, 0x040300, 0x10F2)):
        tree.pci_function(
            bdf,
            class_code=class_code,
            vendor=0x10DE,
            device=device,
            driver="vfio-pci",
            group=26,
            below=BRIDGE,
        )
    return tree.vfio_group(26)


def test_every_function_of_a_group_must_be_allowed_and_no_bridge(
    tree: PciTree, gate: Gates
) -> None:
    group_of_two(tree)
    for asked in (GPU, AUDIO, "/dev/vfio/26"):
        request = VfioInfo(label="a", device=asked)
        for rules in (
            gate('pci = ["10de:*"]'),
            gate('classes = ["0x03"]', 'classes = ["0x0403"]'),
            gate('paths = ["/sys/devices/**/0000:3b:00.*"]'),
        ):
            assert is_allowed(request, tree.root, rules)
        found = look(request, tree.root, gate('classes = ["0x03"]'))
        assert [finding.code for finding in found.findings] == [Code.NOT_ALLOWED]
        assert found.findings[0].message.startswith(f"{AUDIO} (vfio, 10de:10f2, class 0x040300")
        assert not is_allowed(request, tree.root, gate('paths = ["/dev/**"]'))


def test_a_mediated_device_goes_by_its_kind_and_its_path(tree: PciTree, gate: Gates) -> None:
    tree.pci_function(GPU, driver="nvidia").mdev_type(GPU, "nvidia-222")
    tree.mdev(UUID, GPU, "nvidia-222", group=30)
    request = VfioInfo(label="a", device=UUID)
    assert is_allowed(request, tree.root, gate(f'paths = ["/sys/devices/**/{GPU}/*"]'))
    assert is_allowed(request, tree.root, gate('kinds = ["vfio"]'))
    assert not is_allowed(request, tree.root, gate('pci = ["*:*"]'))
    assert not is_allowed(request, tree.root, gate(f'paths = ["/sys/devices/**/{NIC}/*"]'))


def test_a_group_without_facts_is_allowed_by_its_kind_alone(tree: PciTree, gate: Gates) -> None:
    empty = VfioGroup(number=9, device_node="/dev/vfio/9", functions=(), unknown_members=("x",))
    request = VfioInfo(label="a", device="/dev/vfio/9")
    for rule, allowed in (('kinds = ["vfio"]', True), ('paths = ["/**"]', False)):
        verdict = gate(rule).judge(request, empty, None, tree.root)
        assert (not verdict.refusals) is allowed


def test_an_unreadable_device_is_not_allowed(tree: HostTree, gate: Gates) -> None:
    tree.link("/srv/a", "/srv/b").link("/srv/b", "/srv/a")
    shared = SharedDirectory(DeviceType.VHOST_USER_FS, "/srv/a", "a")
    request = ShareInfo(tag="a", source="/srv/a")
    verdict = gate('kinds = ["vhost-user-fs-pci"]').judge(request, shared, None, tree.root)
    (refusal,) = verdict.refusals
    assert refusal.code is Code.NOT_ALLOWED
    assert "cannot decide about it: cannot read /srv/a" in refusal.message


@pytest.mark.parametrize("word", ["virtio-fs", "vhost-user-fs-pci"])
def test_a_share_has_the_word_of_its_option_in_messages(
    tree: HostTree, gate: Gates, word: str
) -> None:
    tree.file("/srv/work/a")
    shared = SharedDirectory(DeviceType.VIRTIO_9P, "/srv/work", "work")
    request = ShareInfo(tag="work", source="/srv/work")
    verdict = gate(f'kinds = ["{word}"]').judge(request, shared, None, tree.root)
    (refusal,) = verdict.refusals
    assert refusal.message.startswith("/srv/work (virtio-9p): no rule of ")
    assert refusal.message.endswith("is for virtio-fs")
