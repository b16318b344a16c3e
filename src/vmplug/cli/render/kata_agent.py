"""A device in the words of Kata's agent: its `Device` message, or `Storage` for a shared one.

Source: Kata Containers, src/libs/protocols/protos/agent.proto and src/agent/src/device.
"""

from typing import TYPE_CHECKING, Any

from vmplug.host.kind import DeviceType

if TYPE_CHECKING:
    from vmplug.drivers.place import GuestAddress
    from vmplug.journal.records import Attachment
    from vmplug.manager.kata.annotations import AgentAnnotations

_NO_WORD = {DeviceType.VHOST_USER_SCSI, DeviceType.VHOST_USER_NET, DeviceType.VIRTIO_RNG}
"""Kata's agent needs no message about these: the guest's kernel finds them."""


def agent_json(
    attachment: "Attachment", annotations: "AgentAnnotations | None" = None
) -> dict[str, Any] | None:
    """`type`, `id`, `vm_path` and `options`; None for what the agent has no word for.

    `annotations` of the container that holds it are there for a device that has some.
    """
    guest = attachment.guest_address
    is_unnamed = guest is not None and guest.nvdimm_handle and guest.nvdimm_id is None
    if guest is None or is_unnamed or attachment.kind in _NO_WORD:
        return None
    if attachment.kind is DeviceType.VFIO:
        own = (annotations or {}).get(attachment.id)
        return _vfio(attachment, guest) | ({"annotations": dict(own)} if own else {})
    if guest.mount_tag:
        is_9p = attachment.kind is DeviceType.VIRTIO_9P
        return {
            "type": "9p" if is_9p else "virtio-fs",
            "id": guest.mount_tag,
            "vm_path": "",
            "fstype": "9p" if is_9p else "virtiofs",
            "options": [
                *(["trans=virtio,version=9p2000.L"] if is_9p else []),
                *(["ro"] if attachment.read_only else []),
            ],
        }
    kind, device_id, vm_path = "blk", str(guest.pci_path), ""
    if guest.nvdimm_id is not None:
        kind, device_id, vm_path = "nvdimm", "", f"/dev/pmem{guest.nvdimm_id}"
    elif guest.scsi_address:
        kind, device_id = "scsi", str(guest.scsi_address)
    elif guest.ccw_devno:
        kind, device_id = "blk-ccw", str(guest.ccw_devno)
    elif guest.virt_path:
        kind, device_id, vm_path = "mmioblk", guest.virt_path, guest.virt_path
    fs_type = attachment.options.get("fstype")
    is_dax = kind == "nvdimm" and fs_type is not None
    return {
        "type": kind,
        "id": device_id,
        "vm_path": vm_path,
        **({"fstype": fs_type} if fs_type else {}),
        "options": [*(["dax"] if is_dax else []), *(["ro"] if attachment.read_only else [])],
    }


_VFIO_TYPES = {"vfio": "vfio-pci", "guest-kernel": "vfio-pci-gk"}
"""By the option `mode`: a container drives it through VFIO, or the guest's own kernel does."""


def _vfio(attachment: "Attachment", guest: "GuestAddress") -> dict[str, Any]:
    """Options are the functions, `BDF=PATH`, or the queues of an adapter.

    The agent knows no functions but of domain 0 by Kata's way of writing; here each has its own.
    """
    node = attachment.name if attachment.name.startswith("/") else attachment.host_path
    record = {"id": node.rpartition("/")[2], "vm_path": ""}
    if not (guest.pci_path or guest.ccw_devno):
        return {"type": "vfio-ap", **record, "options": list(guest.ap_queues)}
    if guest.ccw_devno:
        return {"type": "vfio-ccw", **record, "options": [str(guest.ccw_devno)]}
    return {
        "type": _VFIO_TYPES[attachment.options.get("mode", "vfio")],
        **record,
        "options": [f"{function.host}={function.pci_path}" for function in guest.functions],
    }
