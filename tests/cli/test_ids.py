"""What people call an attachment: by its id, its device's, or as much of one as is enough."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 2, "a")


def attach(vmplug: Vmplug, device: str, owner: str = "c1") -> dict[str, Any]:
    told = vmplug("attach", "-d", device, "--vm", "sb1", "--owner", owner, "--json").json()
    (attachment,) = told["attachments"]
    return dict(attachment)


def test_the_id_of_the_device_is_shown_everywhere(
    vmplug: Vmplug, vm: MemoryVm, image: Path
) -> None:
    hold = attach(vmplug, f"file:{image}")
    device = hold["device_id"]
    assert f"vmplug-{device}" in vm.names()
    (listed,) = vmplug("list", "--json").json()["attachments"]
    assert (listed["id"], listed["device_id"]) == (hold["id"], device)
    heading, line = vmplug("list").answer().splitlines()
    assert dict(zip(split(heading), split(line), strict=True))["DEVICE"] == device
    resized = vmplug("resize", device, "--json").json()
    assert resized == {"id": hold["id"], "device_id": device, "size_bytes": 2 * MIB}
    image.unlink()
    assert f"attachment {hold['id']}, device {device}\n" in vmplug("watch", "--timeout=0").answer()
    told = vmplug("detach", hold["id"]).answer()
    assert told == f"detached {hold['id']}  {image}  from VM sb1  device {device}\n"


def split(line: str) -> list[str]:
    return re.split(r"\s{2,}", line)


@pytest.mark.parametrize("digits", [16, 9])
@pytest.mark.parametrize("key", ["id", "device_id"])
def test_every_verb_takes_either_and_a_beginning(
    vmplug: Vmplug, vm: MemoryVm, image: Path, key: str, digits: int
) -> None:
    hold = attach(vmplug, f"file:{image}")
    name = hold[key][:digits]
    assert vmplug("resize", name).answer() == f"{image} has 2 MiB in VM sb1\n"
    assert vmplug("detach", name).answer().startswith(f"detached {hold['id']} ")
    assert vmplug("list").answer() == "nothing is attached\n"


def test_a_device_with_several_attachments_is_refused_where_one_is_meant(
    vmplug: Vmplug, vm: MemoryVm, image: Path
) -> None:
    holds = [attach(vmplug, f"file:{image}", owner) for owner in ("c1", "c2")]
    device = holds[0]["device_id"]
    refused = vmplug("detach", device)
    listed = ", ".join(f"{h['id']} of {h['owner']} ({image} in VM sb1)" for h in holds)
    assert refused.stderr == (
        f"vmplug: {device} means 2 attachments: {listed}\nhint: pass the id of one of them\n"
    )
    assert (refused.stdout, refused.status) == ("", 6)
    error = vmplug("detach", device[:8], "--json").error()
    assert error["facts"]["ids"] == [hold["id"] for hold in holds]
    assert len(vmplug("list", "--json").json()["attachments"]) == 2
    assert vmplug("resize", device).status == 0  # which is about the disk


@pytest.mark.parametrize("name", ["", "xyz", "0" * 16])
def test_an_id_that_nothing_has_is_said_to_be_none(
    vmplug: Vmplug, vm: MemoryVm, image: Path, name: str
) -> None:
    attach(vmplug, f"file:{image}")
    for verb in ("detach", "resize"):
        refused = vmplug(verb, name)
        assert refused.stderr.startswith(f"vmplug: no attachment or device has the id '{name}'\n")
        assert refused.status == 6


# what happened to it


def test_what_another_owner_holds_is_only_released(
    vmplug: Vmplug, vm: MemoryVm, image: Path
) -> None:
    first, _ = (attach(vmplug, f"file:{image}", owner) for owner in ("c1", "c2"))
    told = f"{first['id']}  {image}  stays in VM sb1, held by c2  device {first['device_id']}\n"
    assert vmplug("detach", first["id"]).answer() == f"released {told}"
    attach(vmplug, f"file:{image}", "c1")
    (done,) = vmplug("detach", "--owner", "c1", "--json").json()["detached"]
    assert (done["outcome"], done["held_by"]) == ("released", ["c2"])
    (done,) = vmplug("detach", "--owner", "c2", "--json").json()["detached"]
    assert (done["outcome"], done["held_by"]) == ("detached", [])


def test_one_count_of_several_leaves_it_attached(
    vmplug: Vmplug, vm: MemoryVm, image: Path
) -> None:
    for _ in range(2):
        hold = attach(vmplug, f"file:{image}")
    assert vmplug("detach", hold["id"]).answer() == (
        f"still held {hold['id']}  {image}  in VM sb1: c1 has attached it 1 more time"
        f"  device {hold['device_id']}\n"
    )


def test_what_was_only_counted_was_never_in_the_vm(vmplug: Vmplug, vm: MemoryVm) -> None:
    hold = attach(vmplug, "c:1:3")
    assert vmplug("detach", hold["id"]).answer() == (
        f"released {hold['id']}  /dev/null  was only counted, never in VM sb1"
        f"  device {hold['device_id']}\n"
    )


def test_what_stays_until_the_vm_ends_is_said_so_again(
    vmplug: Vmplug, vm: MemoryVm, image: Path
) -> None:
    hold = attach(vmplug, f"nvdimm:{image}")
    assert "stays in VM sb1 until that ends" in vmplug("detach", hold["id"]).answer()
    heading, line = vmplug("list").answer().splitlines()
    listed = dict(zip(split(heading), split(line), strict=True))
    assert (listed["STATE"], listed["OWNER"]) == ("retained", "-")
    for name in (listed["ATTACHMENT"], listed["DEVICE"]):
        refused = vmplug("detach", name)
        assert refused.stderr == (
            f"vmplug: c1 has released {image} already: it stays in VM sb1 until that ends, "
            "as QEMU cannot unplug it\nhint: no action needed\n"
        )
        assert refused.status == 6


def test_an_owner_without_anything_is_said_in_good_words(vmplug: Vmplug, vm: MemoryVm) -> None:
    assert vmplug("detach", "--owner", "nobody").stderr.startswith(
        "vmplug: nothing is attached for owner 'nobody'\nhint: "
    )
