"""Specs from text: what is wrong is told with file, field, and what is right."""

import json
import os
from pathlib import Path

import pytest

from tests.unit.cdi.specs import spec_text
from vmplug import cdi
from vmplug.cdi.document import ALIASED_MAX


def problems_of(text: str | bytes) -> list[str]:
    with pytest.raises(cdi.CdiError) as raised:
        cdi.parse_spec(text, file="a.yaml")
    return [str(problem) for problem in raised.value.problems]


EDITS = "$.devices[0].containerEdits"

TOLD = {
    "{env: [FOO]}": f"{EDITS}.env[0]: 'FOO' has no '=', expected KEY=VALUE",
    "{env: [=FOO]}": f"{EDITS}.env[0]: '=FOO' has no name before '=', expected KEY=VALUE",
    "{env: FOO=1}": f"{EDITS}.env: 'FOO=1' is text, expected a list",
    "{env: {FOO: 1}}": f"{EDITS}.env: it is a mapping, expected a list",
    "{env: [[]]}": f"{EDITS}.env[0]: it is a list, expected text",
    "{deviceNodes: [{path: /dev/a, majr: 1}]}": f"{EDITS}.deviceNodes[0].majr: unknown field, "
    "expected one of path, hostPath, type, major, minor, fileMode, permissions, uid, gid",
    "{deviceNodes: [{type: c}]}": f"{EDITS}.deviceNodes[0].path: is missing, "
    "expected the path of the node in the container",
    "{deviceNodes: [{path: /dev/a, major: x}]}": f"{EDITS}.deviceNodes[0].major: 'x' is text, "
    "expected an integer",
    "{deviceNodes: [{path: /dev/a, uid: -1}]}": f"{EDITS}.deviceNodes[0].uid: -1 is out of range, "
    "expected an integer from 0 to 4294967295",
    "{deviceNodes: [{path: /dev/a, minor: -1}]}": f"{EDITS}.deviceNodes[0].minor: -1 is negative, "
    "expected the minor number of a device",
    "{deviceNodes: [{path: /dev/a, permissions: rwx}]}": f"{EDITS}.deviceNodes[0].permissions: "
    "'rwx' is not r, w and m, expected some of these, or 'none'",
    "{deviceNodes: [null]}": f"{EDITS}.deviceNodes[0]: it is null, expected a mapping",
    "{hooks: [{hookName: before, path: /bin/a}]}": f"{EDITS}.hooks[0].hookName: 'before' is not a "
    "hook, expected one of prestart, createRuntime, createContainer, startContainer, poststart, "
    "poststop",
    "{mounts: [{hostPath: /a}]}": f"{EDITS}.mounts[0].containerPath: is missing, "
    "expected where it is mounted in the container",
    "{intelRdt: {closID: a/b}}": f"{EDITS}.intelRdt.closID: 'a/b' is not the name of a file, "
    "expected one, or '/'",
    "{}": f"{EDITS}: is empty, expected at least one edit",
}
"""The edits of a device, in a file of version 0.7.0."""


@pytest.mark.parametrize(("edits", "told"), TOLD.items())
def test_an_error_names_file_field_what_is_wrong_and_right(edits: str, told: str) -> None:
    assert problems_of(spec_text(edits, version="0.7.0")) == [f"a.yaml: {told}"]


OF_VERSIONS = {
    ("0.6.0", "{intelRdt: {closID: a}}"): ".intelRdt: needs cdiVersion 0.7.0 or later",
    ("0.6.0", "{additionalGids: [5]}"): ".additionalGids: needs cdiVersion 0.7.0 or later",
    ("1.0.0", "{netDevices: []}"): ".netDevices: is only valid from 1.1.0 on",
    ("1.0.0", "{intelRdt: {schemata: []}}"): ".intelRdt.schemata: is only valid from 1.1.0 on",
    (
        "1.0.0",
        "{intelRdt: {enableMonitoring: false}}",
    ): ".intelRdt.enableMonitoring: is only valid from 1.1.0 on",
    ("1.1.0", "{intelRdt: {enableCMT: false}}"): ".intelRdt.enableCMT: is only valid before 1.1.0",
    ("1.1.0", "{intelRdt: {enableMBM: true}}"): ".intelRdt.enableMBM: is only valid before 1.1.0",
    ("0.4.0", "{deviceNodes: [{path: /a, hostPath: /b}]}"): ".deviceNodes[0].hostPath: needs "
    "cdiVersion 0.5.0 or later",
    ("0.3.0", "{mounts: [{hostPath: /a, containerPath: /b, type: none}]}"): ".mounts[0].type: "
    "needs cdiVersion 0.4.0 or later",
}


@pytest.mark.parametrize(("version", "edits"), OF_VERSIONS)
@pytest.mark.parametrize("as_json", [False, True])
def test_fields_follow_the_declared_version(version: str, edits: str, *, as_json: bool) -> None:
    text = spec_text(edits, version=version, as_json=as_json)
    first, *_ = problems_of(text)
    told = OF_VERSIONS[version, edits]
    assert first == f"a.yaml: {EDITS}{told}, the file declares {version}"


@pytest.mark.parametrize(
    ("version", "edits"),
    [
        ("1.0.0", "{intelRdt: {enableCMT: true, enableMBM: false}}"),
        ("1.1.0", "{intelRdt: {schemata: [], enableMonitoring: false}}"),
        ("1.1.0", "{netDevices: [{hostInterfaceName: eth1, name: eth0}]}"),
        ("v0.5.0", "{deviceNodes: [{path: /a, hostPath: /b, permissions: none}]}"),
    ],
)
def test_fields_of_the_declared_version_are_read(version: str, edits: str) -> None:
    assert cdi.parse_spec(spec_text(edits, version=version)).devices[0].name == "dev"


SCALARS = {
    "0000:01:00.0": "0000:01:00.0",
    "y": "true",
    "010": "8",
    "0x1f": "31",
    "1.50": "1.5",
    "'1.50'": "1.50",
    "1e6": "1e+06",
    "0.0001": "0.0001",
    "1_0": "10",
    "2026-01-01": "2026-01-01",
    "!!str 010": "010",
    "0.1": "0.1",
    "16777217.0": "1.6777216e+07",
}
"""Values of YAML for a field of text, as the reference reads them."""


@pytest.mark.parametrize(("written", "meant"), SCALARS.items())
def test_a_scalar_is_read_as_the_reference_does(written: str, meant: str) -> None:
    devices = "[{name: dev, containerEdits: {env: [A=1]}}]"
    annotations = f"{{a: {written}}}"
    text = f"cdiVersion: 0.6.0\nkind: a.b/c\nannotations: {annotations}\ndevices: {devices}"
    assert cdi.parse_spec(text).annotations == {"a": meant}


def test_a_pci_address_is_a_name() -> None:
    spec = cdi.parse_spec(spec_text("{env: [A=1]}").replace("name: dev", "name: 0000:01:00.0"))
    assert spec.devices[0].name == "0000:01:00.0"


def test_keys_are_read_in_any_case_as_the_reference_does() -> None:
    spec = cdi.parse_spec(spec_text("{additionalGIDs: [5], ENV: [A=1]}", version="0.7.0"))
    assert spec.devices[0].container_edits == cdi.ContainerEdits(
        additional_gids=(5,), env=("A=1",)
    )


TEXTS = {
    "": "$: the document is empty, expected a CDI spec",
    "[1]": "$: it is a list, expected a mapping",
    "{a: 1": "$: not YAML or JSON: did not find expected ',' or '}', line 2, column 1",
    "&a [*a]": "$: an anchor contains itself, line 1",
    "{kind: a, kind: b}": "$.kind: the key is there twice, expected it once",
    '{"kind": "a", "kind": "a"}': "$.kind: the key is there twice, expected it once",
    '{"kind" : "a", "kind": "a"}': "$.kind: the key is there twice, expected it once",
    "\ttab: 1": "$: not YAML or JSON: found character that cannot start any token, line 1",
    "\0": "$: not YAML or JSON: unacceptable character #x0000: control characters",
    "%YAML 1.2\n---\n{}": "$: not YAML 1.1, expected no other %YAML",
    '{"kind": "\\\\\\/"}': "$: not YAML or JSON: found unknown escape \\/, line 1",
    "{a: [": "$: not YAML or JSON: did not find expected node content, line 2, column 1",
    "[" * 100_000: "",
    "{? [a]: 1}": "$: a key is not text, expected the name of a field",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_what_is_not_a_document_is_told(text: str) -> None:
    first, *_ = problems_of(text)
    assert first.startswith(f"a.yaml: {TEXTS[text] or '$: not YAML or JSON: '}")


def test_aliases_cannot_fill_the_memory() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert ALIASED_MAX < 10**8
    assert problems_of("\n".join(lines)) == ["a.yaml: $: too many aliases"]


def test_json_and_yaml_are_read_the_same() -> None:
    edits = "{env: [A=1], deviceNodes: [{path: /dev/a, minor: 0, fileMode: 384}]}"
    as_json = spec_text(edits, as_json=True)
    spec = cdi.parse_spec(as_json)
    assert spec == cdi.parse_spec(spec_text(edits))
    assert spec == cdi.parse_spec(as_json.replace("/dev/a", "\\u002fdev/a"))
    assert spec == cdi.parse_spec(json.dumps(json.loads(as_json), indent="\t"))
    node = cdi.DeviceNode(path="/dev/a", minor=0, file_mode=0o600)
    assert spec.devices[0].container_edits == cdi.ContainerEdits(
        env=("A=1",), device_nodes=(node,)
    )


@pytest.mark.parametrize("escaped", ["\\u003a", "\\u0026", "\\n", "\\\\", '\\"', "\\ud83d\\ude00"])
def test_a_key_twice_is_found_whatever_is_escaped(escaped: str) -> None:
    text = f'{{"kind": "a{escaped}", "kind": "a"}}'
    assert len(problems_of(text)) == 1


def test_an_empty_field_of_another_version_is_found_whatever_is_escaped() -> None:
    text = spec_text("{env: [A=1], netDevices: []}", as_json=True)
    first, *_ = problems_of(text.replace("netDevices", "\\u006eetDevices"))
    assert first.startswith(f"a.yaml: {EDITS}.netDevices: is only valid from 1.1.0 on")


def test_every_mistake_of_a_file_is_told_at_once() -> None:
    devices = "[{name: -}, {name: a}]"
    text = f"{{cdiVersion: 9, kind: vendor, devices: {devices}, containerEdits: {{env: [A]}}}}"
    with pytest.raises(cdi.CdiError) as raised:
        cdi.parse_spec(text, file="/etc/cdi/a.yaml")
    fields = [problem.field for problem in raised.value.problems]
    assert fields == [
        "$.cdiVersion",
        "$.kind",
        "$.containerEdits.env[0]",
        "$.devices[0].name",
        "$.devices[0].containerEdits",
        "$.devices[1].containerEdits",
    ]
    assert str(raised.value).startswith("/etc/cdi/a.yaml: $.cdiVersion: unknown version '9'")
    assert len(raised.value.notes) == 5


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    huge = tmp_path / "huge.json"
    huge.touch()
    os.truncate(huge, 1 << 42)
    for path, why in (
        (tmp_path / "no.json", "No such file"),
        (fifo, "not a regular file"),
        (huge, "longer than 64 MiB"),
    ):
        with pytest.raises(cdi.CdiError, match=f"{path}: \\$: cannot be read: {why}"):
            cdi.read_spec(path)
