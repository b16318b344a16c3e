"""Files of CDI for the devices of this host."""

import os
from collections.abc import Sequence

import msgspec

from vmplug.cdi.own import OwnFiles
from vmplug.cdi.registry import DEFAULT_DIRECTORIES
from vmplug.cdi.spec import ContainerEdits, Device, DeviceNode, Spec
from vmplug.cdi.write import format_spec
from vmplug.errors import HostError, NoSuchDevice, PolicyError
from vmplug.host.permissions import why_not_trusted
from vmplug.manager.naming.devices import VENDOR, CdiDevice, LeftOut, find_named_devices
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.policy import DEFAULT_POLICY

DEFAULT_DIRECTORY = DEFAULT_DIRECTORIES[-1]
"""/var/run is empty after a boot, in which a disk may get the node that another one had."""


class WrittenSpecs(msgspec.Struct, frozen=True, kw_only=True):
    """The devices that have a name now, and the files that were changed for that.

    `unchanged` said so already. What is in `left_out` has no name, although the policy allows it.
    """

    devices: tuple[CdiDevice, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def write_cdi_specs(
    directory: str | os.PathLike[str] = DEFAULT_DIRECTORY,
    *,
    dry_run: bool = False,
    setup: Setup = DEFAULT_SETUP,
) -> WrittenSpecs:
    """Make the specs of the directory say what the policy lets this host hand over.

    A file for each kind: VFIO devices by vendor and class, disks by their names in
    /dev/disk/by-id, the nodes of the vhost-user store. Files of kinds that have gone are removed;
    files that vmplug did not write are never touched. `dry_run` changes nothing. Raises
    PolicyError without a policy, NoSuchDevice when it allows nothing that has a name,
    AttributeReadError, HostError when the directory cannot be written, and StateError while
    another process writes there.
    """
    with own_files(directory) as own:
        done = update_specs(own, dry_run=dry_run, setup=setup)
    if not (done.devices or done.left_out):
        policy = setup.policy.name if setup.policy else DEFAULT_POLICY
        raise NoSuchDevice(
            "a device that has a name",
            f"nothing on this host that {policy} allows has a name for CDI",
            hint="disks are named by /dev/disk/by-id, PCI functions once VFIO has them: "
            "vmplug host, vmplug bind",
        )
    return done


def own_files(directory: str | os.PathLike[str]) -> OwnFiles:
    """The files of the directory that `update_specs` writes."""
    return OwnFiles(os.path.abspath(directory), f"{VENDOR}-")


def update_specs(own: OwnFiles, *, dry_run: bool = False, setup: Setup) -> WrittenSpecs:
    """As `write_cdi_specs`, also for nothing; the caller closes `own`."""
    if setup.policy is None:
        raise PolicyError(
            "no policy says which devices of this host may have names",
            hint=f"write {DEFAULT_POLICY}, or pass --policy; docs/security.md has its rules",
        )
    _check_writers(own.directory)
    devices, left_out = find_named_devices(setup, setup.policy)
    theirs = own.names_of_others()
    by_file = dict[str, list[CdiDevice]]()
    for device in devices:
        file = f"{device.kind.replace('/', '-')}.yaml"
        other = theirs.get(str(device))
        if other is None or os.path.basename(other) == file:
            by_file.setdefault(file, []).append(device)
        else:
            left_out.append(_defined_there(other, device))
    texts = {file: _format(named) for file, named in by_file.items()}
    changes = own.compare(texts) if dry_run else own.update(texts)
    taken = {os.path.basename(path): path for path in changes.taken}
    left_out += [_taken(path, by_file[file]) for file, path in taken.items()]
    return WrittenSpecs(
        devices=tuple(d for file, named in by_file.items() if file not in taken for d in named),
        written=changes.written,
        removed=changes.removed,
        unchanged=changes.unchanged,
        left_out=tuple(left_out),
    )


def _check_writers(directory: str) -> None:
    """HostError where others decide what a name stands for: vmplug would refuse each of them."""
    if os.path.isdir(directory) and (why := why_not_trusted(directory)):
        raise HostError(
            f"cannot write specs in {directory}: it {why}",
            hint=f"chown root {directory}; chmod go-w {directory}",
        )


def _defined_there(path: str, device: CdiDevice) -> LeftOut:
    why = f"{path} defines it, and two files of a directory would make it unusable"
    return LeftOut(code="foreign-spec", what=str(device), message=why)


def _taken(path: str, devices: Sequence[CdiDevice]) -> LeftOut:
    kind = devices[0].kind
    why = f"{path} is not as vmplug wrote it: it stays, and no device of kind {kind} is written"
    return LeftOut(code="foreign-spec", what=path, message=why)


def _format(devices: Sequence[CdiDevice]) -> str:
    """The spec of one kind, in the lowest version: 0.5.0 at most.

    As JSON, which is YAML too, and is read and written many times as fast.
    """
    named = tuple(Device(name=each.name, container_edits=_edits(each)) for each in devices)
    return format_spec(Spec(kind=devices[0].kind, devices=named))


def _edits(device: CdiDevice) -> ContainerEdits:
    is_same = device.host_path == device.container_path
    node = DeviceNode(
        path=device.container_path,
        host_path="" if is_same else device.host_path,
        permissions="r" if device.read_only else "rw",
    )
    return ContainerEdits(device_nodes=(node,))
