"""CDI names where devices are asked for: by `--device`, and by the annotations of a bundle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import Result, Vmplug, config, device, number_of
from tests.cli.monitors import MemoryVm
from tests.contract.world import journal_rows
from tests.support.disks import disk_image, loop_device

DATA, KEY = "vendor.com/disk=data", "cdi.k8s.io/vendor_1"
REFUSED, ABSENT = 3, 4
POLICY = """
[cdi]
directories = {directories}
[[rule]]
name = "named disks"
cdi-kinds = [{kinds}]
"""


@dataclass(frozen=True, slots=True)
class World:
    """A VM, and a policy that lists a directory of specs."""

    vmplug: Vmplug
    vm: MemoryVm
    directory: Path
    before: frozenset[str]

    def write_policy(self, *, kinds: str = "vendor.com/disk", is_on: bool = True) -> None:
        """Rules for those kinds; `is_on`: names may be looked for at all."""
        directories = json.dumps([str(self.directory / "cdi")] if is_on else [])
        policy = self.directory / "policy.toml"
        policy.write_text(POLICY.format(directories=directories, kinds=json.dumps(kinds)))
        policy.chmod(0o600)

    def write_spec(self, **devices: Mapping[str, object]) -> None:
        """A spec with the edits of each device by its name."""
        listed = [{"name": name, "containerEdits": edits} for name, edits in devices.items()]
        spec = {"cdiVersion": "0.5.0", "kind": "vendor.com/disk", "devices": listed}
        file = self.directory / "cdi/disk.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(spec))
        file.chmod(0o644)

    def run(self, verb: str, *words: str, stdin: str = "") -> Result:
        """The verb with that policy, for ctr1 and sb1 where it takes them."""
        policy = ("--policy", str(self.directory / "policy.toml"))
        owner = ("--owner", "ctr1") if verb in {"attach", "check", "plan"} else ()
        vm = ("--vm", "sb1") if verb in {"attach", "check", "plan"} else ()
        return self.vmplug(verb, *words, *policy, *owner, *vm, stdin=stdin)


@pytest.fixture
def world(vmplug: Vmplug, vm: MemoryVm, tmp_path: Path) -> World:
    made = World(vmplug, vm, tmp_path, vm.names())
    made.write_policy()
    return made


def node(path: str, host_path: str, permissions: str = "rw") -> dict[str, object]:
    return {"deviceNodes": [{"path": path, "hostPath": host_path, "permissions": permissions}]}


def unchanged(world: World, done: Result, status: int) -> str:
    """The one sentence of a refusal; no device is in the VM or in the journal."""
    assert (done.status, done.stdout) == (status, ""), done
    assert not journal_rows(world.vmplug.state_dir)["device"]
    assert world.vm.names() == world.before
    first, *rest = done.stderr.splitlines()
    assert all(line.startswith(("hint: ", "unusable: ", "vmplug: ", "note: ")) for line in rest)
    return first.removeprefix("vmplug: ")


# words


def test_a_name_is_every_node_of_the_device(world: World) -> None:
    edits = {"deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/null"}, {"path": "/dev/zero"}]}
    world.write_spec(data=edits)
    for words in (("--device", DATA), (DATA,)):
        listed = world.run("info", *words, "--json").json()["devices"]
        assert [(each["name"], each["minor"], each["read_only"]) for each in listed] == [
            ("/dev/a", 3, False),
            ("/dev/zero", 5, False),
        ]
        assert all(each["cdi_names"] == [DATA] for each in listed)
        resolved = world.run("resolve", *words, "--json").json()["devices"]
        assert [each["host_path"] for each in resolved] == ["/dev/null", "/dev/zero"]


def test_ro_after_a_name_is_for_all_its_nodes_and_no_other(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"), logs=node("/dev/b", "/dev/zero"))
    words = ("--device", f"{DATA}:ro", "--device", "vendor.com/disk=logs", "-d", "c:1:7:/dev/c")
    listed = world.run("info", *words, "--json").json()["devices"]
    assert {each["name"]: each["read_only"] for each in listed} == {
        "/dev/a": True,
        "/dev/b": False,
        "/dev/c": False,
    }


def test_people_see_the_names_where_there_are_some(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    shown = world.run("info", "--device", DATA, "--device", "c:1:7:/dev/c").stdout.splitlines()
    assert [line.split()[0::7] for line in shown[1:]] == [["/dev/c", "-"], ["/dev/a", DATA]]
    assert shown[0].endswith("  CDI NAME")
    assert "CDI" not in world.run("info", "--device", "c:1:7:/dev/c").stdout


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("-d", "vendor.com/disk=gone"), ABSENT, "unresolvable CDI devices: vendor.com/disk=gone"),
        (("-d", "vendor.com/x=data"), ABSENT, "unresolvable CDI devices: vendor.com/x=data; "),
        (("-d", "1vendor/disk=data"), REFUSED, "'1vendor' is not a vendor"),
        (("-d", f"{DATA}:/dev/xvda"), REFUSED, "is not a name"),
        (("-d", f"{DATA}:rw:"), REFUSED, "is not a name"),
        (("-d", "vendor.com/disk=env"), REFUSED, "has no deviceNodes, only env and hooks"),
        (("-d", "vendor.com/disk=mknod"), REFUSED, "'m' allows neither reading nor writing"),
        (("-d", "vendor.com/disk=absent"), REFUSED, "/dev/not-here is not a device node"),
        (("-d", DATA, "-d", "c:1:5:/dev/a"), REFUSED, "/dev/a: is asked for twice"),
        (("-d", DATA, "-d", "vendor.com/disk=gone"), ABSENT, "unresolvable CDI devices"),
    ],
)
@pytest.mark.parametrize("verb", ["attach", "plan", "check", "resolve"])
def test_what_names_no_device_is_one_sentence_and_nothing_changes(
    world: World, verb: str, words: tuple[str, ...], status: int, told: str
) -> None:
    hook = {"hookName": "createRuntime", "path": str(world.directory / "never-run")}
    world.write_spec(
        data=node("/dev/a", "/dev/null"),
        env={"env": ["A=b"], "hooks": [hook]},
        mknod=node("/dev/a", "/dev/null", "m"),
        absent=node("/dev/a", "/dev/not-here"),
    )
    assert told in unchanged(world, world.run(verb, *words), status)


def test_an_unknown_name_says_where_it_looked_and_what_there_is(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    done = world.run("attach", "-d", "vendor.com/disk=date")
    searched = world.directory / "cdi"
    assert unchanged(world, done, ABSENT).endswith(f"vendor.com/disk=date; searched {searched}")
    assert "hint: vendor.com/disk has data\n" in done.stderr
    (searched / "bad.yaml").write_text("[]")
    done = world.run("attach", "-d", "vendor.com/disk=date")
    assert f"hint: mend {searched}/bad.yaml, which could not be used\n" in done.stderr
    shown = world.vmplug("cdi", "show", "vendor.com/gpu=0", "--spec-dir", str(searched))
    assert (shown.status, shown.stdout) == (ABSENT, "")
    assert f"unusable: {searched}/bad.yaml: $: " in shown.stderr


def test_show_of_an_unknown_kind_has_a_hint(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    words = ("--spec-dir", str(world.directory / "cdi"))
    done = world.vmplug("cdi", "show", "vendor.com/gpu=0", *words)
    assert done.status == ABSENT
    assert done.stderr.splitlines()[-1] == (
        "hint: no file defines the kind vendor.com/gpu; there are vendor.com/disk"
    )


# bundles


def asks(names: str, *devices: Mapping[str, object]) -> str:
    return config(*devices, annotations={KEY: names, "other": "x"})


def test_an_annotation_is_resolved_and_named_as_such(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    told = world.run("info", "-", "--json", stdin=asks(DATA)).json()
    assert [each["name"] for each in told["devices"]] == ["/dev/a"]
    assert told["resolved_annotations"] == [KEY]
    attached = world.run("attach", "-", "--json", stdin=asks(DATA)).json()
    assert attached["resolved_annotations"] == [KEY]
    (hold,) = attached["attachments"]
    assert (hold["name"], hold["host_path"], hold["count"]) == ("/dev/a", "/dev/null", 1)


def test_one_device_in_both_places_is_attached_once(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    text = asks(DATA, device("/dev/a", "1:3", "c"))
    (hold,) = world.run("attach", "-", "--json", stdin=text).json()["attachments"]
    assert (hold["name"], hold["count"]) == ("/dev/a", 1)


@pytest.mark.parametrize(
    ("names", "policy", "status", "told"),
    [
        (DATA, {"is_on": False}, REFUSED, f"{DATA} cannot be resolved: CDI is off on this host"),
        (DATA, {"kinds": "other.com/*"}, REFUSED, "is for the CDI kinds other.com/*"),
        ("vendor.com/disk=gone", {}, ABSENT, "unresolvable CDI devices: vendor.com/disk=gone"),
        ("", {}, REFUSED, f"annotation {KEY}: "),
        ("data", {}, REFUSED, "not a CDI device, expected VENDOR/CLASS=NAME"),
    ],
)
@pytest.mark.parametrize("in_bundle", [False, True])
def test_an_annotation_that_may_not_be_resolved_is_never_ignored(
    world: World,
    names: str,
    policy: dict[str, object],
    status: int,
    told: str,
    *,
    in_bundle: bool,
) -> None:
    """Also where an engine has resolved it."""
    world.write_spec(data=node("/dev/a", "/dev/null"))
    world.write_policy(**policy)  # type: ignore[arg-type]
    devices = [device("/dev/a", "1:3", "c")] if in_bundle else []
    done = world.run("attach", "-", stdin=asks(names, *devices))
    assert told in unchanged(world, done, status)


def test_a_rule_for_kinds_is_not_for_the_same_device_by_its_number(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    done = world.run("attach", "-d", "c:1:3:/dev/a")
    assert "is for the CDI kinds vendor.com/disk" in unchanged(world, done, REFUSED)


def test_a_lease_has_the_device_of_a_name_and_asks_the_policy(world: World) -> None:
    world.write_spec(data=node("/dev/a", "/dev/null"))
    policy = world.directory / "policy.toml"
    ran = world.directory / "ran"
    words = ("lease", "--device", DATA, "--policy", str(policy), "--", "touch", str(ran))
    done = world.vmplug(*words)
    assert (done.status, ran.exists()) == (REFUSED, False)
    assert "names it alone" in done.stderr
    policy.write_text(f'{policy.read_text()}[[rule]]\nname = "null"\nnumbers = ["c:1:3"]\n')
    assert world.vmplug(*words).status == 0
    assert ran.exists()


# a disk


@pytest.mark.root
def test_a_disk_by_name_is_plugged_as_any_other(world: World) -> None:
    image = disk_image(world.directory / "a.img", 2, "a disk")
    with loop_device(image) as disk:
        world.write_spec(data=node("/dev/xvda", str(disk), "r"))
        checked = world.run("check", "--device", DATA)
        assert checked.status == 0, checked
        (hold,) = world.run("attach", "-", "--json", stdin=asks(DATA)).json()["attachments"]
        told = {key: hold[key] for key in ("name", "host_path", "read_only", "kind")}
        assert told == {
            "name": "/dev/xvda",
            "host_path": str(disk),
            "read_only": True,
            "kind": "block",
        }
        assert hold["guest"]["agent"]["options"] == ["ro"]
        assert world.vmplug("detach", "--owner", "ctr1").status == 0


@pytest.mark.root
def test_a_spec_of_an_earlier_boot_is_refused(world: World) -> None:
    """Its number is another device's by now; an engine would hand that over."""
    image = disk_image(world.directory / "a.img", 2, "a disk")
    with loop_device(image) as disk:
        major, minor = map(int, number_of(disk).split(":"))
        edits = node("/dev/xvda", str(disk))["deviceNodes"][0]  # type: ignore[index]
        world.write_spec(
            data={"deviceNodes": [{**edits, "type": "b", "major": major, "minor": minor + 1}]}
        )
        told = unchanged(world, world.run("attach", "--device", DATA), REFUSED)
        assert f"{disk} is b {major}:{minor} on the host, the spec says b " in told


@pytest.mark.qemu
@pytest.mark.root
def test_a_vm_starts_with_the_disk_of_an_annotation(world: World, tmp_path: Path) -> None:
    vmplug = world.vmplug
    bundle = tmp_path / "ctr1"
    bundle.mkdir()
    (bundle / "config.json").write_text(asks(DATA))
    with loop_device(disk_image(tmp_path / "a.img", 2, "a disk")) as disk:
        world.write_spec(data=node("/dev/xvda", str(disk)))
        words = (
            "--accel",
            "tcg",
            "--memory",
            "64",
            "--policy",
            tmp_path / "policy.toml",
            "--json",
        )
        started = vmplug("vm", "start", "cdi1", *words, "--bundle", bundle, "--", "-S").json()
        try:
            (hold,) = started["attachments"]
            assert (hold["name"], hold["host_path"]) == ("/dev/xvda", str(disk))
            assert started["resolved_annotations"] == [KEY]
        finally:
            vmplug("vm", "stop", "cdi1", "--timeout", "0").answer()
