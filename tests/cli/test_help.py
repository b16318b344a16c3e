"""What the tool says of itself: help, examples, usage errors, completion, version."""

import os
import re
import socket
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cli.command import Result, Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image

VERBS = (
    "host",
    "info",
    "resolve",
    "check",
    "plan",
    "attach",
    "detach",
    "list",
    "watch",
    "resize",
    "bind",
    "unbind",
    "sriov",
    "mdev create",
    "mdev remove",
    "reconcile",
    "import-kata",
    "vm start",
    "vm adopt",
    "vm stop",
    "vm list",
    "cdi list",
    "cdi show",
    "cdi validate",
    "cdi inject",
    "cdi write",
    "record",
    "completion",
    "help",
)
JSON_VERBS = [verb for verb in VERBS if verb not in {"completion", "help"}]
READING_VERBS = ("host", "info", "resolve", "check", "plan", "attach")
VM_OPTION_VERBS = ("plan", "attach", "detach", "list", "watch", "reconcile", "import-kata")


@cache
def help_of(verb: str) -> str:
    """The help, asked for once; it depends on no journal."""
    return Vmplug(Path("/nowhere"))(*verb.split(), "--help").answer()


def complete(vmplug: Vmplug, line: str, shell: str = "bash", **env: str) -> Result:
    """What <Tab> asks at the end of a line. Source: click, Shell Completion; its scripts."""
    words = line.split(" ")
    at = words[-1] if shell == "fish" else str(len(words) - 1)
    asked = {"_VMPLUG_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": at}
    return vmplug(env={**asked, **env})


def test_every_verb_has_an_example_in_its_help() -> None:
    assert [
        verb for verb in VERBS if not re.search(f"^ +vmplug {verb}", help_of(verb), re.MULTILINE)
    ] == []


def test_help_fits_a_terminal_but_for_examples() -> None:
    lines = [line for verb in VERBS for line in help_of(verb).splitlines()]
    assert [line for line in lines if len(line) > 99] == []


def test_every_option_says_what_it_is_for() -> None:
    for verb in VERBS:
        options = help_of(verb).partition("\nOptions:\n")[2].partition("\n\n")[0]
        entries = re.split(r"\n(?=  -)", "\n" + options)[1:]
        assert entries, verb
        for entry in entries:
            described = re.split(r"\s{2,}", entry.strip(), maxsplit=1)[1:]
            words = re.sub(r"\[[^\]]*\]", "", " ".join(described)).strip()
            assert len(words) > 3, (verb, entry)


def test_every_verb_that_answers_takes_json() -> None:
    assert [verb for verb in JSON_VERBS if "--json " not in help_of(verb)] == []


def test_every_verb_that_reads_the_host_takes_a_root() -> None:
    assert [verb for verb in READING_VERBS if "--root " not in help_of(verb)] == []


@pytest.mark.parametrize(
    ("device", "kind", "least"),
    [
        ("file:{image}", "a disk", 11),
        ("share:{directory}:work", "a share", 4),
        ("rng:/dev/null", "random numbers", 2),
        ("net:{socket}", "a vhost-user network", 3),
    ],
)
def test_the_options_of_every_kind_are_all_in_the_help_of_attach(
    vmplug: Vmplug, tmp_path: Path, device: str, kind: str, least: int
) -> None:
    image, path = disk_image(tmp_path / "a.img", 1, "a"), tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as backend:
        backend.bind(str(path))
        asked = device.format(image=image, directory=tmp_path, socket=path)
        hint = vmplug("check", "-d", asked, "-o", "x=y", "--json").error()["hint"]
    known = hint.removeprefix("known options: ").split(", ")
    assert len(known) >= least
    lines = help_of("attach").partition(f"Options of {kind} (")[2].partition("\n\n")[0]
    assert re.findall(r"^    (\S+) +\S", lines, re.MULTILINE) == known


def test_the_help_names_every_verb_and_exit_status(vmplug: Vmplug) -> None:
    text = vmplug("--help").answer()
    assert text == vmplug("-h").answer()
    for verb in {verb.split()[0] for verb in VERBS}:
        assert re.search(rf"^  {verb} +\S", text, re.MULTILINE)
    assert [number for number in range(7) if f"{number} " not in text] == []


@pytest.mark.parametrize("words", [(), ("vm",)])
def test_no_verb_at_all_shows_the_verbs_as_a_usage_error(
    vmplug: Vmplug, words: tuple[str, ...]
) -> None:
    shown = vmplug(*words)
    assert (shown.stdout, shown.status) == ("", 2)
    assert shown.stderr.startswith("Usage: vmplug ")
    assert "list" in shown.stderr


def test_a_usage_error_names_the_mistake_and_not_the_whole_help(vmplug: Vmplug) -> None:
    for verb in VERBS:
        refused = vmplug(*verb.split(), "--frobnicate")
        assert (refused.stdout, refused.status) == ("", 2), verb
        told, hint = refused.stderr.splitlines()
        assert told.startswith("vmplug: "), verb
        assert "--frobnicate" in told
        assert hint == f"hint: vmplug {verb} --help"


def test_a_missing_value_is_remedied_by_the_help_of_the_verb(vmplug: Vmplug) -> None:
    for words in (("check", "--device"), ("vm", "adopt", "sb1", "--qmp")):
        refused = vmplug(*words)
        verb = " ".join(words).partition(" sb1")[0].partition(" --")[0]
        assert refused.stderr.splitlines()[1] == f"hint: vmplug {verb} --help"


def test_a_misspelt_option_is_guessed(vmplug: Vmplug) -> None:
    assert "--read-only" in vmplug("check", "--readonly").stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("atach", "attach"),
        ("lst", "list"),
        ("vm strat", "start"),
        ("mdev craete", "create"),
        ("start", "vm start"),
        ("help reconsile", "reconcile"),
        ("help vm lst", "list"),
    ],
)
def test_a_mistyped_verb_is_guessed(vmplug: Vmplug, words: str, meant: str) -> None:
    refused = vmplug(*words.split())
    assert (refused.status, refused.stdout) == (2, "")
    word = words.rpartition(" ")[2]
    assert refused.stderr.splitlines()[0] == (
        f"vmplug: no such verb {word!r}. Did you mean {meant!r}?"
    )


def test_a_word_that_is_like_no_verb_is_not_guessed(vmplug: Vmplug) -> None:
    assert vmplug("frobnicate").stderr.startswith("vmplug: no such verb 'frobnicate'\n")


def test_help_of_a_verb_is_what_its_option_prints(vmplug: Vmplug) -> None:
    assert vmplug("help").answer() == vmplug("--help").answer()
    for verb in (*VERBS, "vm"):
        assert vmplug("help", *verb.split()).answer() == help_of(verb)


def test_help_of_a_verb_that_has_none_below_says_so(vmplug: Vmplug) -> None:
    refused = vmplug("help", "list", "all")
    assert refused.stderr.startswith("vmplug: vmplug list has no verbs of its own\n")
    assert refused.status == 2


@pytest.mark.parametrize("size", ["0", "2X", "2g", "2GiB", "-1", "1.5G", "9999999T", ""])
def test_a_size_says_which_letters_it_takes(vmplug: Vmplug, size: str) -> None:
    refused = vmplug("resize", "0123456789abcdef", "--size", size)
    assert refused.status == 2
    assert f"'--size': '{size}' is not a number from 1 to 9223372036854775807, " in refused.stderr
    assert "optionally with K, M, G or T\n" in refused.stderr


@pytest.mark.parametrize("memory", ["63", "2X", "2g", "64K", "1.5G", "-1", "2GB", ""])
def test_memory_says_which_letters_it_takes(vmplug: Vmplug, memory: str) -> None:
    refused = vmplug.here("vm", "start", "sb1", "--memory", memory)
    assert refused.status == 2
    wanted = "a number of MiB from 64, optionally with M, G or T"
    assert f"'--memory': '{memory}' is not {wanted}\n" in refused.stderr


def test_the_version_is_the_installed_one(vmplug: Vmplug) -> None:
    assert vmplug("--version").answer() == f"vmplug {version('vmplug')}\n"


# completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_vmplug(vmplug: Vmplug, shell: str) -> None:
    script = vmplug("completion", shell).answer()
    assert f"_VMPLUG_COMPLETE={shell}_complete" in script
    assert "vmplug" in script


def test_bash_takes_the_script(vmplug: Vmplug) -> None:
    script = vmplug("completion", "bash").answer()
    command = f"{script}\ncomplete -p vmplug"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "_vmplug_completion" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("vmplug re", {"resolve", "resize", "reconcile", "record"}),
        ("vmplug vm st", {"start", "stop"}),
        ("vmplug completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_verbs_are_completed(vmplug: Vmplug, line: str, words: set[str]) -> None:
    done = complete(vmplug, line)
    assert {entry.partition(",")[2] for entry in done.answer().split()} == words


def test_things_are_completed(vmplug: Vmplug) -> None:
    functions = os.listdir("/sys/bus/pci/devices")
    done = complete(vmplug, "vmplug host 0000:")
    assert {entry.partition(",")[2] for entry in done.answer().split()} == set(functions)


def adopt(vmplug: Vmplug, *names: str) -> None:
    """VMs in memory that vmplug knows from then on; they are gone already."""
    for name in names:
        with MemoryVm(vmplug.state_dir.with_name(f"{name}.sock")) as vm:
            vmplug("vm", "adopt", name, "--qmp", vm.socket_path).answer()


def test_names_of_vms_are_completed(vmplug: Vmplug) -> None:
    adopt(vmplug, "sb1", "sb2", "other")
    for verb in VM_OPTION_VERBS:
        assert complete(vmplug, f"vmplug {verb} --vm s").answer() == "plain,sb1\nplain,sb2\n"
    assert complete(vmplug, "vmplug vm stop o").answer() == "plain,other\n"
    assert complete(vmplug, "vmplug list --vm sb2").answer() == "plain,sb2\n"
    assert complete(vmplug, "vmplug list --vm s", "fish").answer() == "plain,sb1\nplain,sb2\n"
    assert "sb1" in complete(vmplug, "vmplug list --vm s", "zsh").answer()


def test_names_are_completed_out_of_the_state_directory_on_the_line(vmplug: Vmplug) -> None:
    adopt(vmplug, "sb1")
    line = f"vmplug list --state-dir {vmplug.state_dir} --vm s"
    elsewhere = str(vmplug.state_dir.with_name("empty"))
    assert complete(vmplug, line, VMPLUG_STATE_DIR=elsewhere).answer() == "plain,sb1\n"


def test_completing_makes_no_journal(vmplug: Vmplug) -> None:
    assert complete(vmplug, "vmplug list --vm ").answer().strip() == ""
    assert not vmplug.state_dir.exists()


def test_completing_on_a_damaged_journal_says_nothing(vmplug: Vmplug) -> None:
    vmplug.state_dir.mkdir(mode=0o700)
    (vmplug.state_dir / "journal.db").write_bytes(b"scribble" * 4096)
    done = complete(vmplug, "vmplug list --vm ")
    assert (done.stdout.strip(), done.stderr) == ("", "")
