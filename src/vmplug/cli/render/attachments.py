"""Attachments: for people and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmplug.cli.render.output import access
from vmplug.cli.render.table import (
    Column,
    name_column,
    path_column,
    print_table,
    state_column,
)

if TYPE_CHECKING:
    from vmplug.drivers.place import GuestAddress
    from vmplug.journal.records import Attachment
    from vmplug.manager.kata.annotations import AgentAnnotations
    from vmplug.manager.watching.health import DeviceHealth


def attachments_json(
    attachments: "Iterable[Attachment]", held: "Iterable[Attachment]"
) -> list[dict[str, Any]]:
    """Each of them; `held` is everything that their VMs have."""
    from vmplug.manager.kata.annotations import find_agent_annotations  # noqa: PLC0415  for JSON

    annotations = find_agent_annotations(held)
    return [attachment_json(attachment, annotations) for attachment in attachments]


def attachment_json(
    attachment: "Attachment", annotations: "AgentAnnotations | None" = None
) -> dict[str, Any]:
    """One hold on a device; `guest` is null for a device that is only counted."""
    return {
        "id": attachment.id,
        "device_id": attachment.device_id,
        "vm": attachment.vm,
        "owner": attachment.owner,
        "name": attachment.name,
        "container_path": attachment.container_path,
        "host_path": attachment.host_path,
        "kind": str(attachment.kind),
        "read_only": attachment.read_only,
        "count": attachment.count,
        "state": str(attachment.state),
        "guest": guest_json(attachment, annotations),
    }


def guest_json(
    attachment: "Attachment", annotations: "AgentAnnotations | None" = None
) -> dict[str, Any] | None:
    """Where the guest sees it; null for a device that is only counted."""
    guest = attachment.guest_address
    if guest is None:
        return None
    from vmplug.cli.render.kata_agent import agent_json  # noqa: PLC0415  for JSON

    return {
        "pci_path": str(guest.pci_path) if guest.pci_path else None,
        "scsi_address": str(guest.scsi_address) if guest.scsi_address else None,
        "ccw_devno": str(guest.ccw_devno) if guest.ccw_devno else None,
        "virt_path": guest.virt_path,
        "nvdimm_id": None if guest.nvdimm_id is None else str(guest.nvdimm_id),
        "nvdimm_handle": guest.nvdimm_handle,
        "mount_tag": guest.mount_tag,
        "mac_address": guest.mac_address,
        "functions": [
            {"host": function.host, "pci_path": str(function.pci_path or "") or None}
            for function in guest.functions
        ],
        "ap_queues": list(guest.ap_queues),
        "agent": agent_json(attachment, annotations),
    }


def host_json(health: "DeviceHealth | None") -> dict[str, Any]:
    """What a device is on the host now; no key where it cannot be known."""
    return {"host": {"state": str(health.state), "detail": health.detail}} if health else {}


def guest_text(guest: "GuestAddress | None") -> str:
    """`PCI 04/00`, `SCSI 0:1`, `/dev/pmem0`, or that there is none."""
    return str(guest) or "-" if guest else "- (counted, not given to the VM)"


def print_attachments(
    attachments: "Sequence[Attachment]",
    *,
    with_vm: bool,
    health: "Mapping[str, DeviceHealth] | None" = None,
) -> None:
    """A table of holds; `health` by device id adds the state of the devices on the host."""
    rows = [
        (
            *((hold.vm,) if with_vm else ()),
            hold.id,
            "-" if hold.state == "retained" else hold.owner,
            hold.name,
            hold.host_path,
            hold.device_id,
            access(read_only=hold.read_only),
            str(hold.state) + (f" x{hold.count}" if hold.count > 1 else ""),
            guest_text(hold.guest_address),
            *(() if health is None else (_host_text(health.get(hold.device_id)),)),
        )
        for hold in attachments
    ]
    vm = (name_column("VM"),) if with_vm else ()
    host = () if health is None else (state_column("HOST", 1),)
    print_table((*vm, *_COLUMNS, *host), rows)


_COLUMNS = (
    Column("ATTACHMENT"),
    name_column("OWNER", 2),
    path_column("CONTAINER PATH", 4),
    path_column("HOST PATH"),
    Column("DEVICE", 3),
    Column("RO/RW", 5),
    state_column("STATE"),
    Column("GUEST", 3),
)


def _host_text(health: "DeviceHealth | None") -> str:
    return str(health.state) if health else "-"
