"""The trees of disks and files: partitions, what is built on them, loop devices, files."""

import os
from collections.abc import Iterator

from msgspec.structs import replace

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, HostError
from vmplug.host.block.device import BlockDevice, DiskFile, DiskPart
from vmplug.host.block.loop import LoopBacking
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.block.relations import relate_block
from vmplug.host.block.sysfs import read_block_device
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.device import find_disk_users
from vmplug.host.check.thing import identify_block
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot, node_number
from vmplug.host.thing.thing import Relation, Thing, ThingKind
from vmplug.host.thing.uses import place_uses
from vmplug.host.use.file_handle import identify_file

_NOT_FOLLOWED = "vmplug does not follow what its header names"
_KINDS = {
    "dm-": ThingKind.DEVICE_MAPPER,
    "md": ThingKind.MD,
    "bcache": ThingKind.BCACHE,
    "loop": ThingKind.LOOP,
}


def _kind_of(name: str) -> ThingKind:
    """By the kernel's name; that of a partition looks like its disk's."""
    return next((kind for text, kind in _KINDS.items() if name.startswith(text)), ThingKind.DISK)


class DiskReader:
    """Reads the things on disks; each block device is in the tree once."""

    def __init__(self, usage: HostUsage, root: HostRoot) -> None:
        self._usage = usage
        self._root = root
        self._known = set[DevNum]()
        self._unreadable = dict[DevNum, str]()

    def disk(self, device: BlockDevice) -> Thing:
        """The device that was asked for: what is on it, and what it depends on."""
        self._known.add(device.devnum)
        own = self._thing(device, None)
        is_part = own.kind is ThingKind.PARTITION
        parts = [
            *(self._relatives(device, Relation.DISK) if is_part else ()),
            *self._on(device, with_partitions=not is_part),
            *self._twins(device),
            *self._below(device),
        ]
        return replace(own, made_of=tuple(parts))

    def of_function(self, number: DevNum) -> Thing | None:
        """A disk of a function, with all that is on it; None when it is in the tree already.

        Its uses are found with those of the function.
        """
        if number in self._known:
            return None
        self._known.add(number)
        device = relate_block(self._read(number), self._usage, self._root)
        parts = (*self._on(device, with_partitions=True), *self._twins(device))
        return replace(self._thing(device, Relation.DISK), made_of=parts)

    def file(self, file: DiskFile) -> Thing:
        """A disk image, an NVDIMM file or any other."""
        others = (self._file(name, Relation.SAME_FILE, name) for name in file.other_names)
        parts = [*others, *self._loops(file), *self._files_of(file.image)]
        header = file.qcow2
        names = (header.backing_file, header.external_data) if header else ()
        is_followed = file.image or not any(names)
        if header and header.backing_file and not is_followed:
            parts.append(self._file(header.backing_file, Relation.BACKING_FILE, file.host_path))
        return Thing(
            kind=ThingKind.FILE,
            name=file.host_path,
            identity=identify_file(file.host_path, self._root) if self._root.is_live else None,
            # Only its looks: a guest can write either into a raw disk.
            title="like an NVDIMM" if file.pfn else "like qcow2" if file.qcow2 else None,
            size_bytes=file.size_bytes,
            made_of=tuple(parts),
            unknown=() if is_followed else ("the other files of the image: " + _NOT_FOLLOWED,),
        )

    def _files_of(self, image: ImageFile | None) -> Iterator[Thing]:
        """The data file and the backing file of an image, each with those that it names."""
        if image is None:
            return
        for file, relation in (
            (image.data_file, Relation.DATA_FILE),
            (image.backing, Relation.BACKING_FILE),
        ):
            if file:
                thing = self._image_file(file, relation)
                yield replace(thing, made_of=tuple(self._files_of(file)))

    def _image_file(self, file: ImageFile, relation: Relation) -> Thing:
        status = self._root.stat_or_none(file.path)
        if file.is_device and status:
            return self._thing(self._read(node_number(status)), relation)
        return self._file(file.path, relation, file.path)

    def _thing(self, device: BlockDevice, relation: Relation | None) -> Thing:
        path, root = device.sysfs_path, self._root
        kind = _kind_of(device.device_node.removeprefix("/dev/"))
        if path and root.stat_or_none(f"{path}/partition"):
            kind = ThingKind.PARTITION
        return Thing(
            kind=kind,
            name=device.device_node,
            identity=identify_block(device.devnum, path, root) if path else None,
            relation=relation,
            title=self._title(path) if path else None,
            size_bytes=device.size_bytes,
            unknown=(broken,) if (broken := self._unreadable.get(device.devnum)) else (),
        )

    def _title(self, path: str) -> str | None:
        """The name of a device-mapper device, which is a link in /dev/mapper."""
        name = self._root.read_attribute(f"{path}/dm/name")
        return os.fsdecode(name).removesuffix("\n") if name else None

    def _read(self, part: DiskPart | DevNum) -> BlockDevice:
        number = part if isinstance(part, DevNum) else part.devnum
        name = self._root.real_path(f"{self._root.sys_dev}/block/{number}").rpartition("/")[2]
        node = f"/dev/{name.replace('!', '/')}" if isinstance(part, DevNum) else part.device_node
        try:
            return read_block_device(number, node, FoundBy.SYSFS, self._root)
        except AttributeReadError as error:  # a broken neighbour must not hide all others
            self._unreadable[number] = error.message
            return BlockDevice(devnum=number, device_node=node, found_by=FoundBy.SYSFS)

    def _relatives(self, device: BlockDevice, relation: Relation) -> Iterator[Thing]:
        """Its partitions, or the disk that it is one of; each with what is built on it."""
        for part in device.relatives:
            if part.devnum not in self._known:
                self._known.add(part.devnum)
                read = self._read(part)
                on_it = tuple(self._on(read, with_partitions=False))
                yield replace(self._thing(read, relation), made_of=on_it)

    def _on(self, device: BlockDevice, *, with_partitions: bool) -> Iterator[Thing]:
        if with_partitions:
            yield from self._relatives(device, Relation.PARTITION)
        for name in device.holders or ():
            number = self._root.read_devnum(f"/sys/class/block/{name}/dev")
            above = self._above(number) if number else None
            if above:
                yield above
            elif not number:  # as in an incomplete copy
                yield Thing(
                    kind=_kind_of(name),
                    name=f"/dev/{name.replace('!', '/')}",
                    relation=Relation.BUILT_ON_IT,
                )
        yield from self._loops(device)

    def _loops(self, disk: BlockDevice | DiskFile) -> Iterator[Thing]:
        """The loop devices on it; those on its other parts are there."""
        own = disk.nodes if isinstance(disk, DiskFile) else (disk.host_path,)
        for loop in [each for n in own for each in self._usage.loop_index.find_on(n)]:
            if above := self._above(loop.devnum):
                yield above

    def _above(self, number: DevNum) -> Thing | None:
        """A device that was built on another one, with its own uses."""
        if number in self._known:
            return None
        self._known.add(number)
        device = self._read(number)
        parts = tuple(self._on(device, with_partitions=True))
        thing = replace(self._thing(device, Relation.BUILT_ON_IT), made_of=parts)
        try:
            found = list(find_disk_users(device, self._usage, self._root))
        except HostError as error:
            return replace(thing, unknown=(*thing.unknown, error.message))
        return place_uses(thing, found)

    def _twins(self, device: BlockDevice) -> Iterator[Thing]:
        for part in device.twins or ():
            if part.devnum not in self._known:
                self._known.add(part.devnum)
                read = self._read(part)
                on_it = tuple(self._on(read, with_partitions=False))
                thing = self._thing(read, Relation.SAME_DISK)
                yield replace(thing, made_of=on_it)

    def _below(self, device: BlockDevice) -> Iterator[Thing]:
        """What it is built from, and the files behind it; a loop device's own file first."""
        own = device.backing.backing_file if device.backing else None
        below = [self._read(number) for number in device.below]
        if device.backing and own not in [each.device_node for each in below]:
            yield self._behind(device, device.backing)
        for each in below:
            if each.devnum not in self._known:
                self._known.add(each.devnum)
                yield self._thing(each, Relation.BUILT_FROM)
        for path in device.below_files:
            if path not in {own, *(each.device_node for each in below)}:
                yield self._file(path, Relation.FILE, path)

    def _behind(self, device: BlockDevice, backing: LoopBacking) -> Thing:
        """The file behind a loop device, with the other loop devices on it."""
        index = self._usage.loop_index
        own = index.by_number.get(device.devnum)
        others = index.find_beside(own) if own else []
        above = (self._above(loop.devnum) for loop in others)
        thing = self._file(backing.backing_file, Relation.FILE, backing.backing_file)
        is_elsewhere = own and own.opened and not own.shows(backing.backing_file, self._root)
        if backing.deleted or is_elsewhere:
            title = "deleted" if backing.deleted else "the name that it was opened by"
            why = "no name that vmplug can see leads to it, so only the loop device shows it"
            thing = replace(thing, identity=None, title=title, size_bytes=None, unknown=(why,))
        return replace(thing, made_of=tuple(part for part in above if part))

    def _file(self, path: str, relation: Relation, beside: str) -> Thing:
        """A file by its name, which may be relative to that of another."""
        found = os.path.join(os.path.dirname(beside), path)
        status = self._root.stat_or_none(found)
        identity = identify_file(found, self._root) if status and self._root.is_live else None
        return Thing(
            kind=ThingKind.FILE,
            name=found,
            identity=identity,
            relation=relation,
            size_bytes=status.st_size if status else None,
            unknown=() if status else ("no such file at that name",),
        )
