"""The operator's policy: how its file is read, what its rules mean, and what they stop."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from tests.support.disks import disk_image, qcow2_image
from vmplug import Policy
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.drivers.place import PlugMode
from vmplug.errors import InUse, PolicyError
from vmplug.host.finding import NEVER_ALLOWED, Code
from vmplug.host.kind import DeviceType
from vmplug.host.pci.function import PciFunction
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.limits import REQUEST_S
from vmplug.policy.file import read_policy
from vmplug.policy.pattern import ClassPattern, NumberPattern, PathPattern, PciPattern
from vmplug.policy.rules import PolicySubject, Rule

DISK = PolicySubject(
    name="/dev/sdb",
    kind=DeviceType.BLOCK,
    number=("b", DevNum(8, 16)),
    paths=("/dev/sdb", "/dev/disk/by-id/nvme-a"),
    vm="sb-1",
    owner="ctr1",
    mode=PlugMode.HOT,
)
GPU = PolicySubject(
    name="0000:3b:00.0",
    kind=DeviceType.VFIO,
    paths=("/sys/devices/pci0000:3a/0000:3b:00.0",),
    function=PciFunction(
        bdf=Bdf.parse("0000:3b:00.0"), class_code=0x030200, vendor_id=0x10DE, device_id=0x1DB4
    ),
    vm="sb-1",
    owner="ctr1",
    mode=PlugMode.HOT,
)
NAMED = structs.replace(DISK, cdi_kinds=("vendor.com/disk", "other.com/disk"))
ANY = 'name = "any"\nkinds = ["block", "vfio"]\n'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_one(text: str) -> Path:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        path.chmod(0o644)
        return path

    return write_one


@pytest.fixture
def rules(write: Callable[[str], Path]) -> Callable[..., Policy]:
    """The policy of these rules, each given as its lines."""
    return lambda *each: read_policy(write("".join(f"[[rule]]\n{rule}\n" for rule in each)))


def allows(policy: Policy, *parts: PolicySubject) -> bool:
    return not policy.judge(parts).refusals


# what a rule matches

MATCHERS = [
    ('kinds = ["block"]', DISK),
    ('kinds = ["vfio", "generic"]', GPU),
    ('numbers = ["b:8"]', DISK),
    ('numbers = ["c:8:16", "b:8:16"]', DISK),
    ('numbers = ["b:8:*"]', DISK),
    ('paths = ["/dev/sd?"]', DISK),
    ('paths = ["/dev/disk/by-id/nvme-*"]', DISK),
    ('paths = ["/sys/devices/**/0000:3b:00.*"]', GPU),
    ('pci = ["8086:*", "10de:1db4"]', GPU),
    ('pci = ["10DE:*"]', GPU),
    ('pci = ["*:*"]', GPU),
    ('classes = ["0x03"]', GPU),
    ('classes = ["0302"]', GPU),
    ('classes = ["0x030200"]', GPU),
    ('kinds = ["vfio"]\npci = ["10de:*"]\nclasses = ["0x03"]', GPU),
    ('cdi-kinds = ["vendor.com/disk"]', NAMED),
    ('cdi-kinds = ["a.b/c", "vendor.com/*"]\nkinds = ["block"]', NAMED),
    ('kinds = ["block"]', NAMED),
]
OTHERS = [
    ('kinds = ["generic"]', DISK),
    ('numbers = ["c:8"]', DISK),
    ('numbers = ["b:8:17"]', DISK),
    ('numbers = ["b:80"]', DISK),
    ('numbers = ["b:8"]', GPU),
    ('paths = ["/dev/*/sdb"]', DISK),
    ('paths = ["/dev"]', DISK),
    ('paths = ["/dev/sdb/**"]', DISK),
    ('pci = ["10de:1db5"]', GPU),
    ('pci = ["*:*"]', DISK),
    ('classes = ["0x0300"]', GPU),
    ('classes = ["0x03"]', DISK),
    ('kinds = ["vfio"]\npci = ["10de:*"]\nclasses = ["0x02"]', GPU),
    ('cdi-kinds = ["*/*"]', DISK),
    ('cdi-kinds = ["vendor.com/dis", "vendor/disk", "a/*"]', NAMED),
    ('cdi-kinds = ["vendor.com/disk"]\nkinds = ["vfio"]', NAMED),
]


@pytest.mark.parametrize(("matchers", "asked"), MATCHERS)
def test_a_rule_allows_what_it_is_for(
    rules: Callable[..., Policy], matchers: str, asked: PolicySubject
) -> None:
    assert allows(rules(f'name = "it"\n{matchers}'), asked)


@pytest.mark.parametrize(("matchers", "asked"), OTHERS)
def test_a_rule_allows_nothing_else(
    rules: Callable[..., Policy], matchers: str, asked: PolicySubject
) -> None:
    verdict = rules(f'name = "it"\n{matchers}').judge([asked])
    (refusal,) = verdict.refusals
    assert refusal.code is Code.NOT_ALLOWED
    assert "the closest, 'it', is for " in refusal.message
    assert verdict.allow == frozenset()


def test_an_unknown_fact_of_a_function_matches_no_rule(
    rules: Callable[..., Policy],
) -> None:
    silent = structs.replace(GPU, function=PciFunction(bdf=Bdf.parse("0000:3b:00.0")))
    assert not allows(rules('name = "it"\npci = ["10de:*"]'), silent)
    assert not allows(rules('name = "it"\nclasses = ["0x03"]'), silent)


# how it may be handed over

USES = [
    ('vms = ["sb-*"]', {"vm": "sb-2"}, {"vm": "web"}, "is for the VMs sb-*"),
    ('owners = ["ctr?"]', {"owner": "ctr2"}, {"owner": "ctr10"}, "is for the owners ctr?"),
    ("read-only = true", {"read_only": True}, {"read_only": False}, "allows it only read-only"),
    (
        "cold-only = true",
        {"mode": PlugMode.COLD},
        {"mode": PlugMode.HOT},
        "allows it only before the VM starts",
    ),
    ("share-rw = false", {"share_rw": False}, {"share_rw": True}, "does not allow share-rw"),
]


@pytest.mark.parametrize(("line", "good", "bad", "wanted"), USES)
def test_a_use_that_the_rule_does_not_allow_is_refused_with_what_it_wants(
    rules: Callable[..., Policy],
    line: str,
    good: dict[str, object],
    bad: dict[str, object],
    wanted: str,
) -> None:
    policy = rules(f"{ANY}{line}")
    assert allows(policy, structs.replace(DISK, **good))
    (refusal,) = policy.judge([structs.replace(DISK, **bad)]).refusals
    assert refusal.message == (
        "/dev/sdb (block, b:8:16, /dev/disk/by-id/nvme-a): no rule of "
        f"{policy.name} allows it; the closest, 'any', {wanted}"
    )
    assert refusal.hint.startswith("request it as the rule requires")


def test_share_rw_is_allowed_where_a_rule_says_so(rules: Callable[..., Policy]) -> None:
    assert allows(rules(f"{ANY}share-rw = true"), structs.replace(DISK, share_rw=True))


@pytest.mark.parametrize("unsaid", ["vm", "owner", "mode"])
def test_facts_that_are_not_known_yet_match_any_rule(
    rules: Callable[..., Policy], unsaid: str
) -> None:
    policy = rules(f'{ANY}vms = ["sb-1"]\nowners = ["ctr1"]\ncold-only = true')
    cold = structs.replace(DISK, mode=PlugMode.COLD)
    assert allows(policy, structs.replace(cold, **{unsaid: None}))


@pytest.mark.parametrize("mode", list(PlugMode))
def test_cold_only_is_all_but_hot(rules: Callable[..., Policy], mode: PlugMode) -> None:
    """A lease is made before its VMM starts."""
    policy = rules(f"{ANY}cold-only = true")
    assert allows(policy, structs.replace(DISK, mode=mode)) is (mode is not PlugMode.HOT)


# several rules, several parts


def test_one_rule_that_allows_it_is_enough_whatever_their_order(
    rules: Callable[..., Policy],
) -> None:
    narrow = 'name = "narrow"\nkinds = ["block"]\nread-only = true'
    wide = 'name = "wide"\nkinds = ["block"]\nvms = ["sb-1"]'
    for policy in (rules(narrow, wide), rules(wide, narrow)):
        assert allows(policy, DISK)
        assert not allows(policy, structs.replace(DISK, vm="sb-2"))
        assert allows(policy, structs.replace(DISK, vm="sb-2", read_only=True))


def test_two_rules_do_not_add_up(rules: Callable[..., Policy]) -> None:
    policy = rules(
        'name = "a"\nkinds = ["block"]\nvms = ["other"]', 'name = "b"\npaths = ["/srv/**"]'
    )
    assert not allows(policy, DISK)


def test_every_part_of_a_group_must_be_allowed(rules: Callable[..., Policy]) -> None:
    sound = structs.replace(
        GPU,
        name="0000:3b:00.1",
        function=PciFunction(
            bdf=Bdf.parse("0000:3b:00.1"), class_code=0x040300, vendor_id=0x10DE, device_id=0x10F2
        ),
    )
    policy = rules('name = "gpus"\nclasses = ["0x03"]')
    (refusal,) = policy.judge([GPU, sound]).refusals
    assert refusal.message.startswith(
        "0000:3b:00.1 (vfio, 10de:10f2, class 0x040300, /sys/devices/pci0000:3a/0000:3b:00.0): "
    )
    both = rules('name = "gpus"\nclasses = ["0x03"]', 'name = "sound"\nclasses = ["0x04"]')
    assert allows(both, GPU, sound)


def test_the_closest_rule_is_the_one_that_wants_least(rules: Callable[..., Policy]) -> None:
    policy = rules(
        'name = "far"\nkinds = ["vfio"]\npaths = ["/x"]',
        'name = "near"\nnumbers = ["b:8"]\nread-only = true\nvms = ["web"]',
        'name = "also"\nnumbers = ["b:9"]',
    )
    (refusal,) = policy.judge([DISK]).refusals
    assert "'near', is for the VMs web and allows it only read-only" in refusal.message


def test_a_file_without_rules_allows_nothing(write: Callable[[str], Path]) -> None:
    path = write("# nothing yet\n")
    (refusal,) = read_policy(path).judge([DISK]).refusals
    assert f"{path} has no rules, so it allows nothing" in refusal.message


def test_findings_may_be_overruled_where_every_part_has_a_rule_for_it(
    rules: Callable[..., Policy],
) -> None:
    policy = rules(
        'name = "a"\nkinds = ["block"]\nallow = ["mounted-on-host", "is-swap"]',
        'name = "b"\nnumbers = ["b:8"]\nallow = ["no-medium"]',
        'name = "c"\nkinds = ["vfio"]\nallow = ["is-swap"]',
        'name = "d"\nkinds = ["generic"]\nallow = ["no-reset"]',
    )
    assert policy.judge([DISK]).allow == {"mounted-on-host", "is-swap", "no-medium"}
    assert policy.judge([DISK, GPU]).allow == {"is-swap"}


# paths

PATHS = [
    ("/srv/images/**", "/srv/images/a.img", True),
    ("/srv/images/**", "/srv/images/t1/deep/a.img", True),
    ("/srv/images/**", "/srv/images", False),
    ("/srv/images/**", "/srv/images2/a.img", False),
    ("/srv/images/**", "/srv", False),
    ("/srv/images/**", "/", False),
    ("/srv/images/*", "/srv/images/a.img", True),
    ("/srv/images/*", "/srv/images/t1/a.img", False),
    ("/srv/**/a.img", "/srv/a.img", True),
    ("/srv/**/a.img", "/srv/x/y/a.img", True),
    ("/srv/**/a.img", "/srv/x/a.img/b", False),
    ("/**/b/**/d", "/a/b/b/c/d", True),
    ("/**", "/anything/at/all", True),
    ("/**", "/", False),
    ("/srv/[ab].img", "/srv/b.img", True),
    ("/srv/[!ab].img", "/srv/b.img", False),
    ("/srv/a[[]1].img", "/srv/a[1].img", True),
    ("/srv/*", "/srv/new\nline", True),
    ("/srv/a.img", "/srv/aximg", False),
]


@pytest.mark.parametrize(("pattern", "path", "is_match"), PATHS)
def test_a_path_is_matched_name_by_name(pattern: str, path: str, *, is_match: bool) -> None:
    assert PathPattern.parse(pattern).matches(path) is is_match


names = st.sampled_from(["a", "b", "*", "?", "**", "ab"])


@given(st.lists(names, min_size=1, max_size=6), st.lists(st.sampled_from("ab"), max_size=6))
def test_path_patterns_agree_with_a_regular_expression(
    pattern: list[str], path: list[str]
) -> None:
    """An independent reading: one expression for the whole path."""
    words = {"*": "/[^/]+", "?": "/[^/]", "**": "(/[^/]+)*"}
    expression = "".join(words.get(part, f"/{part}") for part in pattern)
    if pattern[-1] == "**":
        expression += "/[^/]+"
    expected = re.fullmatch(expression, "".join(f"/{name}" for name in path))
    matched = PathPattern.parse("/" + "/".join(pattern)).matches("/" + "/".join(path))
    assert matched is (expected is not None)


@given(st.text(max_size=12))
def test_a_pattern_without_wildcards_is_that_path_alone(name: str) -> None:
    if not name.isprintable() or set(name) & set("*?[/") or name in {"", ".", ".."}:
        return
    pattern = PathPattern.parse(f"/srv/{name}")
    assert pattern.matches(f"/srv/{name}")
    assert str(pattern) == f"/srv/{name}"
    assert not pattern.matches(f"/srv/{name}x")


def test_many_wildcards_take_no_time_beyond_both_lengths() -> None:
    pattern = PathPattern.parse("/" + "**/a*/" * 60 + "b")
    assert not pattern.matches("/a" * 600)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (PathPattern, "/srv/images/**"),
        (NumberPattern, "b:8:16"),
        (NumberPattern, "c:10"),
        (PciPattern, "8086:*"),
        (ClassPattern, "0x0302"),
    ],
)
def test_a_pattern_is_told_as_it_was_written(
    kind: type[PathPattern | NumberPattern | PciPattern | ClassPattern], text: str
) -> None:
    assert str(kind.parse(text)) == text


# the file

MISTAKES = [
    ("rule = 3", "is wrong at rule: expected array, got int"),
    ("rules = []", "is wrong at the file: unknown field rules"),
    (f"[[rule]]\n{ANY}[[rule]]\n{ANY}", "has two rules named 'any'"),
    ('[[rule]]\nkinds = ["block"]', "is wrong at rule[0]: object missing required field name"),
    ('[[rule]]\nname = ""\nkinds = ["block"]', "is wrong at rule[0].name"),
    (f"[[rule]]\n{ANY}pathes = []", "is wrong at rule[0] ('any'): unknown field pathes"),
    (f"[[rule]]\n{ANY}read_only = true", "is wrong at rule[0] ('any'): unknown field read_only"),
    (f"[[rule]]\n{ANY}read-only = 1", "is wrong at rule[0].read-only ('any'): expected bool"),
    (
        '[[rule]]\nname = "a"\nkinds = "block"',
        "rule[0].kinds ('a'): expected array | null, got str",
    ),
    (
        '[[rule]]\nname = "a"\nkinds = ["blok"]',
        "rule[0].kinds[0] ('a'): 'blok' is not one of vfio",
    ),
    (
        f'[[rule]]\n{ANY}allow = ["all"]',
        "rule[0].allow[0] ('any'): 'all' is not one of acs-override",
    ),
    (f'[[rule]]\n{ANY}allow = ["no-iommu"]', "rule 'any': no-iommu cannot be overruled"),
    (f"[[rule]]\n{ANY}paths = []", "rule[0].paths ('any'): expected array of length >= 1"),
    ('[[rule]]\nname = "a"\nvms = ["x"]', "rule 'a' that names no devices"),
    (f'[[rule]]\n{ANY}paths = ["srv/x"]', "paths of rule 'any': 'srv/x' cannot match a path"),
    (f'[[rule]]\n{ANY}paths = ["/srv/../etc"]', "'/srv/../etc' cannot match a path"),
    (f'[[rule]]\n{ANY}paths = ["/srv//x"]', "'/srv//x' cannot match a path"),
    (f'[[rule]]\n{ANY}paths = ["/srv/"]', "'/srv/' cannot match a path"),
    (f'[[rule]]\n{ANY}paths = ["/"]', "'/' cannot match a path"),
    (
        f'[[rule]]\n{ANY}paths = ["/srv/a**"]',
        "has other text next to '**', which must be a whole name",
    ),
    (f'[[rule]]\n{ANY}paths = ["/srv\\u001b"]', "cannot match a path"),
    (
        f'[[rule]]\n{ANY}numbers = ["8:0"]',
        "'8:0' is not a device number: write b:8, b:8:16 or c:10",
    ),
    (f'[[rule]]\n{ANY}numbers = ["b:5000"]', "major 5000 is not in 0..4095"),
    (f'[[rule]]\n{ANY}numbers = ["p:1"]', "'p:1' is not a device number"),
    (f'[[rule]]\n{ANY}pci = ["8086"]', "'8086' is not a PCI ID"),
    (f'[[rule]]\n{ANY}pci = ["8086:1*"]', "'8086:1*' is not a PCI ID"),
    (f'[[rule]]\n{ANY}classes = ["0x3"]', "'0x3' is not a PCI class"),
    (f'[[rule]]\n{ANY}cdi-kinds = ["vendor.com"]', "'vendor.com' is not a CDI kind"),
    (f'[[rule]]\n{ANY}cdi-kinds = ["a/b=c"]', "'a/b=c' is not a CDI kind"),
    ("[cdi]", "is wrong at cdi: object missing required field directories"),
    ('[cdi]\ndirectories = ["cdi"]', "is wrong at cdi.directories: 'cdi' is not an absolute path"),
    ("[cdi]\ndirectories = []\nkinds = []", "is wrong at cdi: unknown field kinds"),
    ("[[rule]\n", "is not TOML: "),
    ('[[rule]]\nname = "a"\nname = "b"\n', "is not TOML: Cannot overwrite a value (at line 3"),
    ("x = " + "[" * 5000, "is not TOML: "),
    ("\0", "is not TOML: "),
]


@pytest.mark.parametrize(("text", "told"), MISTAKES)
def test_a_mistake_is_told_with_the_rule_and_key_and_nothing_is_allowed(
    write: Callable[[str], Path], text: str, told: str
) -> None:
    path = write(text)
    with pytest.raises(PolicyError) as caught:
        read_policy(path)
    assert f"the policy {path} " in caught.value.message
    assert told in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_bytes_that_are_not_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="is not TOML"):
        read_policy(path)


def test_a_rule_may_overrule_the_findings_that_allow_accepts(rules: Callable[..., Policy]) -> None:
    codes = sorted(set(Code) - NEVER_ALLOWED)
    words = ", ".join(f'"{code}"' for code in codes)
    policy = rules(f"{ANY}allow = [{words}]")
    assert policy.judge([DISK]).allow == set(codes)
    assert Code.NOT_ALLOWED in NEVER_ALLOWED


@pytest.mark.parametrize("path", ["missing.toml", "missing/policy.toml", ".", "a\0b", "loop"])
def test_an_unreadable_policy_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(PolicyError, match="cannot be read"):
        read_policy(tmp_path / path)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(PolicyError, match="is not a regular file"):
        read_policy(tmp_path / "fifo")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(PolicyError, match="is longer than 1 MiB"):
        read_policy(path)


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o622])
def test_a_file_that_others_can_write_is_not_followed(
    write: Callable[[str], Path], mode: int
) -> None:
    path = write(f"[[rule]]\n{ANY}")
    path.chmod(mode)
    with pytest.raises(PolicyError, match=f"is writable by others .mode 0{mode:o}."):
        read_policy(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: chown")
def test_a_file_or_a_link_of_somebody_else_is_not_followed(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write(f"[[rule]]\n{ANY}")
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    assert len(read_policy(link).rules) == 1
    os.lchown(link, 12345, 12345)
    with pytest.raises(PolicyError, match="is a symlink that user 12345 made"):
        read_policy(link)
    os.chown(path, 12345, 0)
    with pytest.raises(PolicyError, match="belongs to user 12345"):
        read_policy(path)


# a manager with a policy


@pytest.fixture
def open_manager(tmp_path: Path) -> Iterator[Callable[[Policy], DeviceManager]]:
    opened: list[DeviceManager] = []

    def open_one(policy: Policy) -> DeviceManager:
        opened.append(
            DeviceManager.open(
                vm="sb-1",
                host=HostRoot("/"),
                hypervisor=FakeHypervisor(),
                state_dir=tmp_path / f"state{len(opened)}",
                policy=policy,
            )
        )
        return opened[-1]

    yield open_one
    for manager in opened:
        manager.close()


def disk(path: Path, **more: str) -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/xvda",
        dev_type=DevType.BLOCK,
        host_path=str(path),
        driver_options=more,
    )


def test_a_manager_refuses_what_no_rule_allows_and_nothing_has_changed(
    tmp_path: Path,
    rules: Callable[..., Policy],
    open_manager: Callable[[Policy], DeviceManager],
) -> None:
    good, bad = disk_image(tmp_path / "good.img", 1, "a"), disk_image(tmp_path / "bad.img", 1, "b")
    devices = open_manager(rules(f'name = "good"\npaths = ["{good}"]'))
    for act in (devices.attach_all, devices.plan):
        with pytest.raises(PolicyError) as caught:
            act([disk(good), disk(bad)._replace(container_path="/dev/xvdb")])
        assert caught.value.message.startswith(f"/dev/xvdb: {bad} (block): no rule of ")
    assert devices.attachments() == []
    assert devices.attach(disk(good)).host_path == str(good)


def test_an_owner_without_a_rule_gets_no_hold_on_a_plugged_device(
    tmp_path: Path,
    rules: Callable[..., Policy],
    open_manager: Callable[[Policy], DeviceManager],
) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    devices = open_manager(rules(f'{ANY}owners = ["ctr1"]'))
    held = devices.attach(disk(image), owner="ctr1")
    with pytest.raises(PolicyError, match="is for the owners ctr1"):
        devices.attach(disk(image), owner="ctr2")
    assert devices.attachments() == [held]


def test_a_running_vm_is_hot(
    tmp_path: Path,
    rules: Callable[..., Policy],
    open_manager: Callable[[Policy], DeviceManager],
) -> None:
    devices = open_manager(rules(f"{ANY}cold-only = true"))
    with pytest.raises(PolicyError, match="allows it only before the VM starts"):
        devices.attach(disk(disk_image(tmp_path / "a.img", 1, "a")))


def test_a_finding_is_overruled_only_where_a_rule_lets_it(
    tmp_path: Path,
    rules: Callable[..., Policy],
    open_manager: Callable[[Policy], DeviceManager],
) -> None:
    base, image = qcow2_image(tmp_path / "base.qcow2", 1, "a"), tmp_path / "a.qcow2"
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(image)]
    subprocess.run(make, check=True, timeout=30)
    wanted, allow = disk(image, format="qcow2"), (Code.HAS_BACKING_FILE,)
    strict = open_manager(rules(ANY))
    with pytest.raises(InUse):
        strict.attach(wanted)
    with pytest.raises(PolicyError, match="lists has-backing-file in `allow`"):
        strict.attach(wanted, allow=allow)
    assert strict.attachments() == []
    lenient = open_manager(rules(f'{ANY}allow = ["has-backing-file"]'))
    with pytest.raises(InUse):
        lenient.attach(wanted)
    assert lenient.attach(wanted, allow=allow).host_path == str(image)


def test_share_rw_is_something_to_be_allowed(
    tmp_path: Path,
    rules: Callable[..., Policy],
    open_manager: Callable[[Policy], DeviceManager],
) -> None:
    wanted = disk(disk_image(tmp_path / "a.img", 1, "a"), **{"share-rw": "on"})
    with pytest.raises(PolicyError, match="does not allow share-rw"):
        open_manager(rules(ANY)).attach(wanted)
    lenient = open_manager(rules(f"{ANY}share-rw = true"))
    assert lenient.attachments() == []
    assert lenient.attach(wanted).options == {"share-rw": "on"}


# the manual


def test_the_policy_of_the_manual_is_one(write: Callable[[str], Path]) -> None:
    manual = (Path(__file__).parents[3] / "docs/security.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", manual, re.DOTALL)
    assert len(read_policy(write(example)).rules) == example.count("[[rule]]")
    for word in (*(kind.word for kind in DeviceType), *fields_of_a_rule()):
        assert f"`{word}" in manual, word


def fields_of_a_rule() -> list[str]:
    return [name.replace("_", "-") for name in Rule.__struct_fields__]


# the limits


def test_a_policy_sets_the_time_of_a_request(write: Callable[[str], Path]) -> None:
    assert read_policy(write(f"[[rule]]\n{ANY}")).request_s == REQUEST_S
    limited = read_policy(write(f"[limits]\nrequest-seconds = 20\n[[rule]]\n{ANY}"))
    assert limited.request_s == 20
    assert [rule.name for rule in limited.rules] == ["any"]


@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "86401", '"20"', "true"])
def test_a_time_that_is_none_is_refused(write: Callable[[str], Path], said: str) -> None:
    with pytest.raises(PolicyError, match=r"is wrong at limits\.request-seconds"):
        read_policy(write(f"[limits]\nrequest-seconds = {said}\n"))


def test_an_unknown_limit_is_refused(write: Callable[[str], Path]) -> None:
    with pytest.raises(PolicyError, match="is wrong at limits: unknown field request_seconds"):
        read_policy(write("[limits]\nrequest_seconds = 20\n"))


def test_the_file_says_where_names_of_cdi_are_looked_for(write: Callable[[str], Path]) -> None:
    read = {
        text: read_policy(write(text)).cdi_directories
        for text in ("", "[cdi]\ndirectories = []", '[cdi]\ndirectories = ["/a", "/b"]')
    }
    assert list(read.values()) == [None, (), ("/a", "/b")]


def test_a_refusal_says_by_which_kinds_it_came(rules: Callable[..., Policy]) -> None:
    policy = rules('name = "x"\ncdi-kinds = ["vendor.com/gpu"]')
    (refusal,) = policy.judge([NAMED]).refusals
    assert "CDI vendor.com/disk, CDI other.com/disk" in refusal.message
    assert "the closest, 'x', is for the CDI kinds vendor.com/gpu" in refusal.message
