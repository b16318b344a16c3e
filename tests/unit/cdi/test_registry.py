"""Directories of specs: priorities, conflicts, and files that cannot be used."""

from pathlib import Path

import pytest

from tests.unit.cdi.specs import spec_text, write_specs
from vmplug import cdi

DEVICE = "vendor.com/class=dev"


def test_a_later_directory_wins(tmp_path: Path) -> None:
    low = write_specs(tmp_path / "low", a=spec_text("{env: [A=low]}"))
    high = write_specs(tmp_path / "high", a=spec_text("{env: [A=high]}"))
    registry = cdi.read_directories([low, high])
    assert list(registry.devices) == [DEVICE]
    found = registry.devices[DEVICE]
    assert (found.name, found.device.container_edits.env) == (DEVICE, ("A=high",))
    assert found.source.file == str(high / "a.yaml")


def test_a_device_of_two_files_of_one_directory_is_dropped_also_for_a_higher_one(
    tmp_path: Path,
) -> None:
    edits = spec_text("{env: [A=1]}")
    low = write_specs(tmp_path / "low", a=edits, b=edits, c=edits)
    high = write_specs(tmp_path / "high", a=edits, b=spec_text("{env: [A=1]}", name="other"))
    registry = cdi.read_directories([low, high])
    assert list(registry.devices) == ["vendor.com/class=other"]
    files = tuple(str(low / name) for name in ("a.yaml", "b.yaml", "c.yaml"))
    assert registry.conflicts == {DEVICE: files}
    with pytest.raises(cdi.UnresolvableDevices, match="unresolvable CDI devices") as raised:
        registry.resolve([DEVICE])
    assert raised.value.conflicts == {DEVICE: files}
    assert raised.value.hint == f"remove {DEVICE} from all but one of {', '.join(files)}"


def test_a_bad_file_does_not_disturb_good_ones(tmp_path: Path) -> None:
    directory = write_specs(tmp_path / "cdi", a="{", b=spec_text("{env: [A=1]}"))
    (directory / "c.yml").write_text("{")
    (directory / "sub.yaml").mkdir()
    (directory / "gone.json").symlink_to("nowhere")
    registry = cdi.read_directories([tmp_path / "no", directory])
    assert list(registry.devices) == [DEVICE]
    assert [problem.file for problem in registry.problems] == [
        str(directory / "a.yaml"),
        str(directory / "gone.json"),
    ]


def test_what_is_not_there_is_told_with_directories_and_unusable_files(tmp_path: Path) -> None:
    directory = write_specs(tmp_path / "cdi", a="{}")
    missing = ["vendor.com/class=b", "vendor.com/class=a"]
    with pytest.raises(cdi.UnresolvableDevices) as raised:
        cdi.read_directories([tmp_path / "no", directory]).resolve(missing)
    assert str(raised.value) == (
        f"unresolvable CDI devices: {', '.join(missing)}; searched {tmp_path}/no, {directory}"
    )
    assert raised.value.names == tuple(missing)
    assert raised.value.hint == f"mend {directory}/a.yaml, which could not be used"
    assert raised.value.notes[0].startswith(f"unusable: {directory}/a.yaml: $.cdiVersion: is miss")


def test_what_is_known_is_in_the_hint_alone(tmp_path: Path) -> None:
    directory = write_specs(
        tmp_path / "cdi",
        a=spec_text("{env: [A=1]}", name="a"),
        b=spec_text("{env: [A=1]}", name="b").replace("vendor.com", "other.vendor.com"),
    )
    with pytest.raises(cdi.UnresolvableDevices) as raised:
        cdi.read_directories([directory]).resolve(["vendor.com/class=c"])
    assert raised.value.hint == "vendor.com/class has a"
    assert not [fact for fact in raised.value.facts if fact.startswith("_")]
    with pytest.raises(cdi.UnresolvableDevices) as raised:
        cdi.read_directories([directory]).resolve(["r.vendor.com/class=c"])
    assert raised.value.hint == (
        "no file defines the kind r.vendor.com/class; there are other.vendor.com/class, "
        "vendor.com/class"
    )


def test_a_directory_that_is_a_link_or_a_file_is_told(tmp_path: Path) -> None:
    directory = write_specs(tmp_path / "cdi", a=spec_text("{env: [A=1]}"))
    (tmp_path / "link").symlink_to(directory)
    registry = cdi.read_directories([tmp_path / "link", directory / "a.yaml"])
    assert registry.devices == {}
    assert [str(problem) for problem in registry.problems] == [
        f"{tmp_path}/link: $: cannot be read: a symbolic link, expected a directory",
        f"{directory}/a.yaml: $: cannot be read: Not a directory",
    ]
