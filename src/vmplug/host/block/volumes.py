"""Everything that a bundle requests, with its volumes: mounts whose source is a device."""

import stat
from collections.abc import Iterable, Sequence
from functools import cache

from vmplug.errors import SpecError
from vmplug.host.block.loop import read_backing_file
from vmplug.host.block.loop_files import LoopIndex, read_loops
from vmplug.host.block.pmem import read_pfn_info
from vmplug.host.root import HostRoot, node_number
from vmplug.host.use.mounts import MountPoint, read_mount_points
from vmplug.host.use.silent import find_silent, no_answer
from vmplug.oci.info import DeviceInfo, DevType, Mount
from vmplug.oci.requests import Request
from vmplug.oci.spec import Bundle, check_paths

_BIND = frozenset({None, "", "none", "bind"})


def find_requests(
    bundle: Bundle, root: HostRoot, cdi_directories: Sequence[str] | None = None
) -> list[Request]:
    """Devices, those that CDI names bring too, then volumes, then the requests in annotations.

    `cdi_directories` have the CDI specs; see `find_cdi_devices`, also for what it raises.
    """
    devices = _find_devices(bundle, root, cdi_directories)
    return [*devices, *find_volumes(bundle.mounts, root), *bundle.annotated]


def _find_devices(
    bundle: Bundle, root: HostRoot, cdi_directories: Sequence[str] | None
) -> Sequence[DeviceInfo]:
    if not bundle.cdi_annotations:
        return bundle.devices
    from vmplug.host.cdi.find import find_cdi_devices  # noqa: PLC0415  most bundles name none
    from vmplug.host.cdi.join import add_cdi_devices  # noqa: PLC0415  the same

    named = find_cdi_devices(bundle.cdi_names, root, cdi_directories)
    paths = {device.container_path for device in named}
    check_paths(path for path in bundle.cdi_options if path not in paths)
    return add_cdi_devices(bundle.devices, named, bundle.cdi_options)


def find_volumes(mounts: Iterable[Mount], root: HostRoot) -> list[DeviceInfo]:
    """The bind mounts whose source is a device, as requests for that device.

    That is a block device, or, for a mount with the option `block-driver=nvdimm`, a file system on
    persistent memory: it is mounted from a loop device whose backing file the guest can map as an
    NVDIMM. Without that option a directory stays a directory, whatever is on its loop device: a
    guest can have written that. Raises SpecError where that option cannot be followed.
    """
    mount_points = cache(lambda: read_mount_points(root))  # only directories need them
    volumes = []
    bound = [mount for mount in mounts if mount.type in _BIND and mount.source.startswith("/")]
    silent = find_silent({mount.source for mount in bound}, root)
    for mount in bound:
        if mount.source in silent:
            raise no_answer(mount.source)
        source = root.real_path(mount.source)
        status = root.stat_or_none(source)
        if status and stat.S_ISBLK(status.st_mode):
            volumes.append(
                DeviceInfo(
                    container_path=mount.destination,
                    dev_type=DevType.BLOCK,
                    devnum=node_number(status),
                    read_only=mount.read_only,
                    driver_options=mount.driver_options,
                )
            )
        elif mount.driver_options.get("block-driver") == "nvdimm":
            volumes.append(_find_pmem(mount, source, mount_points(), root))
    return volumes


def _find_pmem(
    mount: Mount, source: str, mount_points: Sequence[MountPoint], root: HostRoot
) -> DeviceInfo:
    """The file behind a directory, if the guest would see the same files in it.

    So the directory must be the whole file system. The loop device must begin where the guest's
    kernel expects the data, or show the whole file, and end with the file.
    """
    shown = next((m for m in reversed(mount_points) if m.path == source), None)
    if shown is None or shown.shown != "/":
        raise _not_pmem(mount, "is not the mount point of a whole file system")
    sysfs_path = f"{root.sys_dev}/block/{shown.devnum}"
    backing = read_backing_file(sysfs_path, root)
    if backing is None or backing.deleted:
        raise _not_pmem(mount, "is not mounted from a loop device on a file that still exists")
    loop = LoopIndex(read_loops(root), root).by_number.get(shown.devnum) if root.is_live else None
    if loop and not loop.shows(backing.backing_file, root):
        raise _not_pmem(
            mount,
            f"is on a file that was {backing.backing_file} when its loop device was made, and "
            "that is another file now",
        )
    pfn = read_pfn_info(backing.backing_file, root)
    if pfn is None:
        raise _not_pmem(mount, f"is on {backing.backing_file}, which has no NVDIMM_PFN_INFO block")
    if backing.size_limit_bytes or backing.offset_bytes not in {0, pfn.data_offset_bytes}:
        raise _not_pmem(
            mount,
            "is on a loop device that does not show the part of "
            f"{backing.backing_file} that the guest would mount",
        )
    is_mounted_read_only = shown.read_only or shown.shown_read_only
    is_read_only = is_mounted_read_only or bool(root.read_int(f"{sysfs_path}/ro"))
    return DeviceInfo(
        container_path=mount.destination,
        dev_type=DevType.BLOCK,
        host_path=backing.backing_file,
        pmem=True,
        read_only=mount.read_only or is_read_only,
        driver_options={"fstype": shown.fs_type, **mount.driver_options},
    )


def _not_pmem(mount: Mount, why: str) -> SpecError:
    return SpecError(
        f"mount {mount.destination}",
        f"block-driver=nvdimm is not possible: {mount.source} {why}",
        hint="leave block-driver out to share the directory, or mount a loop device on a file "
        "that was made for it (ndctl, pmem-csi)",
    )
