"""`vmplug cdi`: what people and programs see of specs, and of a config.json with their devices."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Result, Vmplug, config, device, write_bundle
from tests.cli.screen import WIDTHS, on_screen
from vmplug import cdi

DATA = "vendor.com/disk=data"
LOGS = "vendor.com/disk=logs"
SPEC = """
cdiVersion: 0.7.0
kind: vendor.com/disk
annotations: {rack: "7"}
containerEdits:
  env: [DISKS=all]
  hooks: [{hookName: createRuntime, path: /bin/false, args: [hook, --now]}]
devices:
- name: data
  containerEdits:
    env: [DISK=data]
    deviceNodes:
    - {path: /dev/data, hostPath: /dev/null, permissions: r}
    - {path: /dev/zero, permissions: none}
    mounts: [{hostPath: /usr, containerPath: /usr/local, options: [ro]}]
- name: logs
  containerEdits: {additionalGids: [7], intelRdt: {closID: a}, deviceNodes: [{path: /dev/full}]}
"""
GONE = """{"cdiVersion": "0.5.0", "kind": "vendor.com/gone", "devices": [
    {"name": "a", "containerEdits": {"env": ["A=b"], "deviceNodes": [{"path": "/dev/not-here"}]}}
]}"""
BAD = """{"cdiVersion": "0.5.0", "kind": "vendor.com/bad", "devices": [
    {"name": "a", "containerEdits": {"env": ["FOO"], "deviceNode": []}}]}"""
ENV = "$.devices[0].containerEdits.env[0]"
ENV_PROBLEM = "'FOO' has no '=', expected KEY=VALUE"


@pytest.fixture
def specs(tmp_path: Path) -> Iterator[Path]:
    """A directory of good specs; no verb changes anything in it."""
    directory = tmp_path / "specs"
    directory.mkdir()
    (directory / "disk.yaml").write_text(SPEC)
    (directory / "gone.json").write_text(GONE)
    yield directory
    assert (directory / "disk.yaml").read_text() == SPEC
    assert (directory / "gone.json").read_text() == GONE


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A directory of higher priority."""
    directory = tmp_path / "later"
    directory.mkdir()
    return directory


def at(*directories: Path) -> list[str]:
    return [word for directory in directories for word in ("--spec-dir", str(directory))]


def add_bad(directory: Path, text: str = BAD) -> str:
    """A file that is not valid."""
    file = directory / "bad.json"
    file.write_text(text.replace(', "deviceNode": []', ""))
    return str(file)


def add_conflict(directory: Path) -> None:
    """A second file of the directory that defines `data`."""
    (directory / "again.yaml").write_text(SPEC.replace("logs", "other"))


# list


def test_list_has_a_row_for_each_device(vmplug: Vmplug, specs: Path) -> None:
    heading, *rows = vmplug("cdi", "list", *at(specs)).answer().splitlines()
    assert re.split(r"  +", heading) == ["DEVICE", "NODES", "OTHER EDITS", "FILE"]
    assert [re.split(r"  +", row) for row in rows] == [
        [DATA, "/dev/null ro, /dev/zero none", "1 env, 1 mount", f"{specs}/disk.yaml"],
        [LOGS, "/dev/full rw", "1 intelRdt, 1 group", f"{specs}/disk.yaml"],
        ["vendor.com/gone=a", "/dev/not-here rw", "1 env", f"{specs}/gone.json"],
    ]


@pytest.mark.parametrize("columns", WIDTHS)
def test_list_fits_the_terminal(vmplug: Vmplug, specs: Path, columns: int) -> None:
    screen = on_screen(vmplug, "cdi", "list", *at(specs), columns=columns)
    for name in (DATA, LOGS, "vendor.com/gone=a"):
        assert screen.row(name).startswith(name)
    assert len(screen.rows) == 4 + ("not shown" in screen.text)


def test_list_without_a_device_names_the_directories(
    vmplug: Vmplug, tmp_path: Path, later: Path
) -> None:
    missing = tmp_path / "missing"
    shown = vmplug("cdi", "list", *at(missing, later)).answer()
    assert shown == f"no usable file in {missing}, {later} defines a CDI device\n"
    assert not missing.exists()


def test_list_reports_what_cannot_be_used_and_keeps_the_rest(vmplug: Vmplug, specs: Path) -> None:
    bad = add_bad(specs)
    add_conflict(specs)
    shown = vmplug("cdi", "list", *at(specs))
    assert shown.status == 0
    assert [row.split()[0] for row in shown.stdout.splitlines()[1:]] == [
        LOGS,
        "vendor.com/disk=other",
        "vendor.com/gone=a",
    ]
    files = f"{specs}/again.yaml, {specs}/disk.yaml"
    assert shown.stderr.splitlines() == [
        f"vmplug: unusable: {bad}: {ENV}: {ENV_PROBLEM}",
        f"vmplug: unusable: {DATA} is defined by several files of one directory: {files}",
    ]


def test_list_as_json_has_it_all(vmplug: Vmplug, specs: Path) -> None:
    bad = add_bad(specs)
    add_conflict(specs)
    listed = vmplug("cdi", "list", "--json", *at(specs)).json()
    assert listed["directories"] == [str(specs)]
    assert [each["name"] for each in listed["devices"]] == [
        LOGS,
        "vendor.com/disk=other",
        "vendor.com/gone=a",
    ]
    assert listed["problems"] == [{"file": bad, "field": ENV, "message": ENV_PROBLEM}]
    assert listed["conflicts"] == {DATA: [f"{specs}/again.yaml", f"{specs}/disk.yaml"]}


def test_what_a_spec_says_has_no_power_over_the_terminal(vmplug: Vmplug, later: Path) -> None:
    spec = json.loads(GONE)
    spec["devices"][0]["containerEdits"]["env"] = ["A=\x1b[31mred\n"]
    (later / "a.json").write_text(json.dumps(spec))
    shown = vmplug("cdi", "show", "vendor.com/gone=a", *at(later)).answer()
    assert r"A=\x1b[31mred\n" in shown
    add_bad(later, BAD.replace("FOO", r"\u001b[31mred"))
    for verb in ("list", "validate"):
        done = vmplug("cdi", verb, *at(later))
        assert "\x1b" not in done.stdout + done.stderr
        assert "red" in done.stdout + done.stderr


# show


def test_show_has_every_edit(vmplug: Vmplug, specs: Path) -> None:
    shown = vmplug("cdi", "show", DATA, LOGS, *at(specs)).answer()
    assert shown.splitlines() == [
        DATA,
        f"  file        {specs}/disk.yaml, CDI 0.7.0",
        "  annotation  rack=7",
        "  node        /dev/null as /dev/data, ro, c 1:3",
        "  node        /dev/zero, none, c 1:5",
        "  env         DISK=data",
        "  mount       /usr at /usr/local (ro)",
        "  once for all devices of the file:",
        "    env       DISKS=all",
        "    hook      createRuntime hook --now, /bin/false",
        "",
        LOGS,
        f"  file        {specs}/disk.yaml, CDI 0.7.0",
        "  annotation  rack=7",
        "  node        /dev/full, rw, c 1:7",
        "  intelRdt    closID=a",
        "  group       7",
        "  once for all devices of the file:",
        "    env       DISKS=all",
        "    hook      createRuntime hook --now, /bin/false",
    ]


def test_show_says_that_a_node_is_missing(vmplug: Vmplug, specs: Path) -> None:
    missing = "/dev/not-here is not a device node: No such file or directory"
    shown = vmplug("cdi", "show", "vendor.com/gone=a", *at(specs)).answer()
    assert f"  node  /dev/not-here, rw: {missing}\n" in shown
    (found,) = vmplug("cdi", "show", "vendor.com/gone=a", "--json", *at(specs)).json()["devices"]
    assert found["nodes"] == [
        {
            "host_path": "/dev/not-here",
            "container_path": "/dev/not-here",
            "device_type": None,
            "major": None,
            "minor": None,
            "access": "rw",
            "problem": missing,
        }
    ]


def test_show_names_the_files_that_are_overridden(
    vmplug: Vmplug, specs: Path, later: Path
) -> None:
    (later / "disk.yaml").write_text(SPEC.replace("/dev/null", "/dev/zero"))
    shown = vmplug("cdi", "show", DATA, *at(specs, later)).answer()
    assert f"  file        {later}/disk.yaml, CDI 0.7.0\n" in shown
    assert f"  overrides   {specs}/disk.yaml\n" in shown
    (found,) = vmplug("cdi", "show", DATA, "--json", *at(later, specs)).json()["devices"]
    assert (found["file"], found["overrides"]) == (
        f"{specs}/disk.yaml",
        [f"{later}/disk.yaml"],
    )


def test_show_as_json_has_the_edits_in_the_words_of_the_file(vmplug: Vmplug, specs: Path) -> None:
    (found,) = vmplug("cdi", "show", DATA, "--json", *at(specs)).json()["devices"]
    assert found["name"] == DATA
    assert found["cdi_version"] == "0.7.0"
    assert found["annotations"] == {"rack": "7"}
    assert found["spec_edits"]["hooks"][0]["hookName"] == "createRuntime"
    assert found["device_edits"]["mounts"] == [
        {"hostPath": "/usr", "containerPath": "/usr/local", "options": ["ro"]}
    ]
    assert [(node["major"], node["minor"], node["access"]) for node in found["nodes"]] == [
        (1, 3, "ro"),
        (1, 5, "none"),
    ]


@pytest.mark.parametrize("verb", ["show", "inject"])
def test_an_unknown_name_is_reported_with_directories_and_unusable_files(
    vmplug: Vmplug, specs: Path, later: Path, verb: str
) -> None:
    bad = add_bad(later)
    words = ["cdi", verb, *(["-"] if verb == "inject" else []), DATA, "vendor.com/bad=a"]
    refused = vmplug(*words, *at(specs, later), stdin=config())
    assert (refused.stdout, refused.status) == ("", 4)
    assert refused.stderr.splitlines() == [
        f"vmplug: unresolvable CDI devices: vendor.com/bad=a; searched {specs}, {later}",
        f"hint: mend {bad}, which could not be used",
        f"vmplug: unusable: {bad}: {ENV}: {ENV_PROBLEM}",
    ]
    error = vmplug(*words, "--json", *at(specs, later), stdin=config()).error()
    assert error["code"] == "unresolvable-cdi-device"
    assert error["facts"]["names"] == ["vendor.com/bad=a"]
    assert error["facts"]["directories"] == [str(specs), str(later)]
    assert error["facts"]["problems"] == [f"{bad}: {ENV}: {ENV_PROBLEM}"]


@pytest.mark.parametrize("name", ["disk", "vendor.com/disk", "vendor/disk=", "1/disk=data", "=a"])
def test_a_malformed_name_is_a_bad_request(vmplug: Vmplug, specs: Path, name: str) -> None:
    for words in (("show", name), ("inject", "-", name)):
        refused = vmplug("cdi", *words, *at(specs), stdin=config())
        assert (refused.stdout, refused.status) == ("", 3)
        assert refused.stderr.startswith(f"vmplug: {name}: ")


# validate


def test_validate_lists_files_that_are_valid(vmplug: Vmplug, specs: Path) -> None:
    heading, *rows = vmplug("cdi", "validate", *at(specs)).answer().splitlines()
    assert re.split(r"  +", heading) == ["VALID FILE", "KIND", "DEVICES", "VERSION", "NEEDED"]
    assert [row.split() for row in rows] == [
        [f"{specs}/disk.yaml", "vendor.com/disk", "2", "0.7.0", "0.7.0"],
        [f"{specs}/gone.json", "vendor.com/gone", "1", "0.5.0", "0.3.0"],
    ]
    assert vmplug("cdi", "validate", specs).stdout.splitlines() == [heading, *rows]
    assert vmplug("cdi", "validate", specs, "--json").json() == {
        "ok": True,
        "files": [
            {
                "file": f"{specs}/disk.yaml",
                "kind": "vendor.com/disk",
                "devices": ["data", "logs"],
                "cdi_version": "0.7.0",
                "minimum_version": "0.7.0",
            },
            {
                "file": f"{specs}/gone.json",
                "kind": "vendor.com/gone",
                "devices": ["a"],
                "cdi_version": "0.5.0",
                "minimum_version": "0.3.0",
            },
        ],
        "problems": [],
        "conflicts": {},
    }


def test_validate_prints_each_mistake_and_the_status_is_3(
    vmplug: Vmplug, specs: Path, later: Path
) -> None:
    bad = add_bad(later)
    lines = [f"{bad}: {ENV}: {ENV_PROBLEM}"]
    for words in ([bad], [str(later)], at(later)):
        shown = vmplug("cdi", "validate", *words)
        assert (shown.status, shown.stderr, shown.stdout.splitlines()) == (3, "", lines)
    both = vmplug("cdi", "validate", specs / "gone.json", bad, "--json")
    assert both.status == 3
    document = both.json()
    assert document["ok"] is False
    assert [file["file"] for file in document["files"]] == [f"{specs}/gone.json"]
    assert document["problems"] == [{"file": bad, "field": ENV, "message": ENV_PROBLEM}]


def test_validate_finds_what_two_files_of_a_directory_define(vmplug: Vmplug, specs: Path) -> None:
    add_conflict(specs)
    shown = vmplug("cdi", "validate", specs)
    assert shown.status == 3
    assert shown.stdout.splitlines()[-1] == (
        f"unusable: {DATA} is defined by several files of one directory: "
        f"{specs}/again.yaml, {specs}/disk.yaml"
    )


def test_validate_takes_standard_input(vmplug: Vmplug) -> None:
    assert "vendor.com/gone" in vmplug("cdi", "validate", "-", stdin=GONE).answer()
    shown = vmplug("cdi", "validate", "-", stdin=GONE.replace("A=b", "FOO"))
    assert (shown.status, shown.stdout) == (3, f"-: {ENV}: {ENV_PROBLEM}\n")


def test_validate_of_a_file_that_is_not_there_is_not_valid(vmplug: Vmplug, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    shown = vmplug("cdi", "validate", missing)
    assert shown.stdout == f"{missing}: $: cannot be read: No such file or directory\n"
    assert shown.status == 3
    assert not missing.exists()


def test_validate_of_nothing_says_so(vmplug: Vmplug, later: Path) -> None:
    assert vmplug("cdi", "validate", later).answer() == "there is no file to validate\n"


# inject


def expected(container: str, specs: Path, *names: str) -> dict[str, Any]:
    return cdi.inject(json.loads(container), names, cdi.read_directories([specs]))


def test_inject_prints_what_the_library_makes(vmplug: Vmplug, specs: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "ctr1", device("/dev/sda", "8:0"))
    container = (bundle / "config.json").read_text()
    wanted = expected(container, specs, LOGS, DATA)
    assert [node["path"] for node in wanted["linux"]["devices"]] == [
        "/dev/sda",
        "/dev/full",
        "/dev/data",
        "/dev/zero",
    ]
    for source in (bundle, bundle / "config.json", "-"):
        shown = vmplug("cdi", "inject", source, LOGS, DATA, *at(specs), stdin=container)
        assert json.loads(shown.answer()) == wanted
    answer = vmplug("cdi", "inject", bundle, LOGS, DATA, "--json", *at(specs)).json()
    assert answer == {"devices": [LOGS, DATA], "config": wanted}
    assert (bundle / "config.json").read_text() == container
    assert os.listdir(bundle) == ["config.json"]


def test_inject_takes_names_from_annotations(vmplug: Vmplug, specs: Path) -> None:
    asked = {"cdi.k8s.io/b": DATA, "cdi.k8s.io/a": f"{LOGS},{DATA}", "other": "x"}
    container = config(annotations=asked)
    answer = vmplug("cdi", "inject", "-", "--json", *at(specs), stdin=container).json()
    assert answer["devices"] == [LOGS, DATA, DATA]
    assert answer["config"] == expected(container, specs, LOGS, DATA, DATA)
    named = vmplug("cdi", "inject", "-", LOGS, "--json", *at(specs), stdin=container).json()
    assert named["devices"] == [LOGS]


def test_inject_without_a_name_is_a_usage_error(vmplug: Vmplug, specs: Path) -> None:
    refused = vmplug("cdi", "inject", "-", *at(specs), stdin=config(annotations={"a": "b"}))
    assert (refused.stdout, refused.status) == ("", 2)
    assert refused.stderr.splitlines() == [
        "vmplug: name a device, as vendor.com/class=name: no annotation cdi.k8s.io/* does",
        "hint: vmplug cdi inject --help",
    ]


def test_inject_of_a_missing_node_prints_nothing(vmplug: Vmplug, specs: Path) -> None:
    words = ("cdi", "inject", "-", DATA, "vendor.com/gone=a", *at(specs))
    refused = vmplug(*words, stdin=config())
    assert (refused.stdout, refused.status) == ("", 3)
    field = "$.devices[0].containerEdits.deviceNodes[0].path"
    assert f"{specs}/gone.json: {field}: /dev/not-here is not a device node" in refused.stderr
    assert vmplug(*words, "--json", stdin=config()).error()["code"] == "no-such-cdi-node"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "standard input: not JSON: "),
        ("[]", "standard input: not an OCI config.json"),
        ("{}", "standard input: not an OCI config.json"),
        ('{"ociVersion": "1", "a": NaN}', "standard input: not JSON: "),
        ('{"ociVersion": "1", "a": 1, "a": 2}', "standard input: the key 'a' appears twice"),
        ('{"ociVersion": ' + "[" * 1000 + "]" * 1000 + "}", "nested too deeply"),
        ('{"ociVersion": "1", "annotations": {"a": 1}}', "$.annotations: expected a mapping"),
        ('{"ociVersion": "1", "annotations": {"cdi.k8s.io/a": "b"}}', "cdi.k8s.io/a: "),
        ('{"ociVersion": "1", "annotations": {"cdi.k8s.io/a": "a/b=c"}, "process": 1}', "a/b=c"),
    ],
)
def test_inject_refuses_another_document(
    vmplug: Vmplug, specs: Path, text: str, message: str
) -> None:
    refused = vmplug("cdi", "inject", "-", *at(specs), stdin=text)
    assert refused.stdout == ""
    assert refused.status == (4 if message == "a/b=c" else 3)
    assert message in refused.stderr


# completion and directories


def offered(vmplug: Vmplug, line: str) -> list[str]:
    """The words that <Tab> offers at the end of a line of bash."""
    asked = {"_VMPLUG_COMPLETE": "bash_complete", "COMP_WORDS": line}
    shown = vmplug(env=asked).answer()
    return [entry.partition(",")[2] for entry in shown.splitlines() if entry]


def test_names_are_completed_once(vmplug: Vmplug, specs: Path) -> None:
    add_bad(specs)
    line = f"vmplug cdi show --spec-dir {specs} "
    assert offered(vmplug, f"{line}vendor.com/d") == [DATA, LOGS]
    assert offered(vmplug, f"{line}{DATA} vendor.com/d") == [LOGS]
    assert offered(vmplug, f"vmplug cdi inject --spec-dir {specs} bundle {LOGS[:17]}") == [LOGS]
    assert offered(vmplug, "vmplug cdi ") == ["inject", "list", "show", "validate", "write"]


def test_reading_creates_nothing(vmplug: Vmplug, tmp_path: Path) -> None:
    missing = at(tmp_path / "missing")
    runs: list[Result] = [
        vmplug("cdi", "list", *missing),
        vmplug("cdi", "show", DATA, *missing),
        vmplug("cdi", "validate", *missing),
        vmplug("cdi", "inject", "-", DATA, *missing, stdin=config()),
    ]
    assert [run.status for run in runs] == [0, 4, 0, 4]
    assert os.listdir(tmp_path) == []
    assert not vmplug.state_dir.exists()
