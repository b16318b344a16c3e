"""--policy on the command line: each verb that hands over asks it, and says what it says."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import VMPLUG, Result, Vmplug, config, first_in_path
from tests.cli.monitors import MemoryVm
from tests.contract.world import journal_rows
from tests.support.disks import disk_image

NOT_ALLOWED, HYPERVISOR = 3, 5
RULES = """
[[rule]]
name = "images"
kinds = ["block"]
paths = ["{images}/**"]
vms = ["sb*"]
owners = ["ctr1", "bundle"]
"""


@dataclass(frozen=True, slots=True)
class World:
    """A VM, two disks, and a policy that is for one of them."""

    vmplug: Vmplug
    vm: MemoryVm
    directory: Path

    @property
    def policy(self) -> Path:
        return self.directory / "policy.toml"

    def write(self, text: str) -> None:
        self.policy.write_text(text)
        self.policy.chmod(0o600)

    def asked(self, name: str) -> str:
        return f"file:{self.directory / name}:/dev/xvda"

    def run(self, verb: str, name: str, *words: str) -> Result:
        """The verb for one disk, with the policy."""
        owner = () if "--owner" in words else ("--owner", "ctr1")
        request = ("--device", self.asked(name), "--vm", "sb1", *owner, "--policy", self.policy)
        return self.vmplug(verb, *request, *words)


@pytest.fixture
def world(vmplug: Vmplug, tmp_path: Path) -> Iterator[World]:
    (tmp_path / "images").mkdir()
    disk_image(tmp_path / "images/a.img", 1, "a")
    disk_image(tmp_path / "b.img", 1, "b")
    socket = vmplug.state_dir.with_name("qmp.sock")
    with MemoryVm(socket) as vm:
        made = World(vmplug, vm, tmp_path)
        made.write(RULES.format(images=tmp_path / "images"))
        vmplug("vm", "adopt", "sb1", "--qmp", socket).answer()
        yield made


def sentence(done: Result) -> tuple[str, str]:
    assert done.stdout == ""
    message, hint = done.stderr.splitlines()
    return message.removeprefix("vmplug: "), hint.removeprefix("hint: ")


def test_what_a_rule_allows_goes(world: World) -> None:
    assert world.run("check", "images/a.img").answer().endswith("may be handed over\n")
    assert world.run("plan", "images/a.img").status == 0
    assert world.run("attach", "images/a.img").status == 0


@pytest.mark.parametrize("verb", ["plan", "attach"])
def test_what_no_rule_allows_is_refused_and_nothing_has_changed(world: World, verb: str) -> None:
    before = journal_rows(world.vmplug.state_dir), world.vm.names()
    done = world.run(verb, "b.img")
    message, hint = sentence(done)
    assert done.status == NOT_ALLOWED
    assert message == (
        f"/dev/xvda: {world.directory}/b.img (block): no rule of {world.policy} allows it; "
        f"the closest, 'images', is for {world.directory}/images/**"
    )
    assert (
        hint
        == f"the operator of this host decides in {world.policy} which devices may be handed over"
    )
    assert world.run(verb, "b.img", "--json").error()["code"] == "not-allowed"
    assert (journal_rows(world.vmplug.state_dir), world.vm.names()) == before


def test_check_shows_it_as_a_finding(world: World) -> None:
    done = world.run("check", "b.img", "--json")
    assert done.status == NOT_ALLOWED
    told = done.json()
    (problem,) = told["problems"]
    assert (told["ok"], problem["code"], problem["severity"]) == (False, "not-allowed", "error")
    assert "'images'" in problem["message"]


@pytest.mark.parametrize("verb", ["check", "attach"])
def test_it_is_for_a_vm_and_an_owner(world: World, verb: str) -> None:
    rule = RULES.format(images=world.directory / "images")
    for text, words, wanted in (
        (rule.replace("sb*", "web*"), (), "is for the VMs web*"),
        (rule, ("--owner", "ctr2"), "is for the owners ctr1, bundle"),
    ):
        world.write(text)
        done = world.run(verb, "images/a.img", *words)
        assert done.status == NOT_ALLOWED
        assert wanted in done.stdout + done.stderr


def test_a_finding_that_no_rule_lets_be_overruled_stays_one(world: World) -> None:
    base, image = world.directory / "b.img", world.directory / "images/c.qcow2"
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(image)]
    subprocess.run(make, check=True, timeout=30)
    words = ("-o", "format=qcow2", "--allow", "has-backing-file")
    done = world.run("attach", "images/c.qcow2", *words)
    assert done.status == NOT_ALLOWED
    assert "lists has-backing-file in `allow`" in sentence(done)[0]
    world.write(RULES.format(images=world.directory / "images") + 'allow = ["has-backing-file"]\n')
    assert world.run("attach", "images/c.qcow2", *words).status == 0


def test_the_word_itself_cannot_be_allowed(world: World) -> None:
    done = world.run("attach", "b.img", "--allow", "not-allowed")
    assert done.status == NOT_ALLOWED
    assert "not a finding that can be allowed" in sentence(done)[0]


def test_without_a_vm_check_holds_no_vm_against_it(world: World) -> None:
    words = ("--device", world.asked("images/a.img"), "--policy", world.policy)
    assert world.vmplug("check", *words).status == 0
    assert world.vmplug("check", *words, "--owner", "ctr2").status == NOT_ALLOWED


def test_the_owner_of_a_bundle_is_its_name(world: World) -> None:
    asked = {"org.vmplug.rng.a": "{}"}
    for name, status in (("bundle", 0), ("mallory", NOT_ALLOWED)):
        (world.directory / name).mkdir()
        (world.directory / name / "config.json").write_text(config(annotations=asked))
        world.write('[[rule]]\nname = "r"\nkinds = ["virtio-rng-pci"]\nowners = ["bundle"]\n')
        words = ("check", world.directory / name, "--policy", world.policy)
        assert world.vmplug(*words).status == status


def test_the_environment_may_name_it(world: World) -> None:
    words = ("check", "--device", world.asked("b.img"))
    assert world.vmplug(*words).status == 0
    named = {"VMPLUG_POLICY": str(world.policy)}
    assert world.vmplug(*words, env=named).status == NOT_ALLOWED
    gone = {"VMPLUG_POLICY": str(world.directory / "gone.toml")}
    message, _ = sentence(world.vmplug(*words, env=gone))
    assert message.endswith("gone.toml cannot be read: No such file or directory")


@pytest.mark.parametrize("verb", ["check", "attach"])
def test_a_mistake_in_it_hands_nothing_over(world: World, verb: str) -> None:
    world.write(RULES.format(images=world.directory / "images") + "read_only = true\n")
    before = journal_rows(world.vmplug.state_dir), world.vm.names()
    done = world.run(verb, "images/a.img")
    message, hint = sentence(done)
    assert done.status == NOT_ALLOWED
    assert message.endswith("is wrong at rule[0] ('images'): unknown field read_only")
    assert "until it is fixed" in hint
    assert (journal_rows(world.vmplug.state_dir), world.vm.names()) == before


def test_what_others_can_write_is_not_followed(world: World) -> None:
    world.policy.chmod(0o666)
    done = world.run("attach", "images/a.img")
    assert done.status == NOT_ALLOWED
    assert "is writable by others (mode 0666): vmplug refuses to use it" in sentence(done)[0]


def test_names_in_it_and_in_a_spec_reach_the_terminal_escaped(world: World) -> None:
    disk_image(world.directory / "\x1b[31m\n.img", 1, "c")
    world.write('[[rule]]\nname = "\\u001b[2J"\nkinds = ["generic"]\n')
    done = world.run("attach", "\x1b[31m\n.img")
    message, _ = sentence(done)
    assert "\x1b" not in done.stderr
    assert "\\x1b[31m\\n.img" in message


# vm start


def start(world: World, name: str, *words: str) -> Result:
    """A start that gets as far as QEMU, which is stood in for by a program that says so."""
    programs = world.directory / "bin"
    programs.mkdir(exist_ok=True)
    fake = programs / "qemu-system-x86_64"
    fake.write_text("#!/bin/sh\necho QEMU was started; exit 1\n")
    fake.chmod(0o755)
    request = ("--device", world.asked(name), "--owner", "ctr1", "--policy", str(world.policy))
    path = first_in_path(programs)
    return world.vmplug("vm", "start", "sb9", *request, *words, env=path)


def test_a_vm_is_not_started_with_what_no_rule_allows(world: World) -> None:
    before = journal_rows(world.vmplug.state_dir)
    done = start(world, "b.img")
    assert done.status == NOT_ALLOWED
    assert "no rule of" in sentence(done)[0]
    assert journal_rows(world.vmplug.state_dir) == before
    assert not (world.vmplug.state_dir / "vm/sb9").exists()
    allowed = start(world, "images/a.img")
    assert allowed.status == HYPERVISOR
    assert "QEMU was started" in allowed.stderr


def test_what_is_for_the_start_only_is_not_for_a_running_vm(world: World) -> None:
    world.write(RULES.format(images=world.directory / "images") + "cold-only = true\n")
    assert start(world, "images/a.img").status == HYPERVISOR
    done = world.run("attach", "images/a.img")
    assert done.status == NOT_ALLOWED
    assert "allows it only before the VM starts" in sentence(done)[0]


# the host's own


@pytest.mark.root
def test_the_hosts_own_policy_is_followed_without_being_named(world: World) -> None:
    """In a mount namespace whose /etc has nothing but the policy."""
    etc = world.directory / "etc"
    (etc / "vmplug").mkdir(parents=True)
    policy, answers = etc / "vmplug/policy.toml", []
    for text in (None, RULES.format(images="/elsewhere"), "[[rule]"):
        if text is not None:
            policy.write_text(text)
        script = 'mount --bind "$0" /etc && exec "$@"'
        check = (VMPLUG, "check", "--device", world.asked("images/a.img"))
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, str(etc), *map(str, check)],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env=world.vmplug.environment,
        )
        answers.append((done.returncode, "/etc/vmplug/policy.toml" in done.stdout + done.stderr))
    assert answers == [(0, False), (NOT_ALLOWED, True), (NOT_ALLOWED, True)]
