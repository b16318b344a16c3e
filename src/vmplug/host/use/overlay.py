"""The names of a file in an overlay and in its layers: one file, with an inode for each.

So neither the open files nor the locks of one name show those of the other. The options of an
overlay name its layers as the mounter saw them: they are looked for in this process's own view,
and where the overlay is seen. vmplug leaves out what users mount in user namespaces of their own:
a server of theirs could keep it waiting.
Source: Documentation/filesystems/overlayfs.rst; fs/overlayfs, ovl_show_options.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import PurePosixPath

import msgspec
from msgspec.structs import replace

from vmplug.devnum import DevNum, FileKey, key_of
from vmplug.host.root import HostRoot
from vmplug.host.use.enter import belongs_to_us
from vmplug.host.use.mounts import MountPoint, parse_mounts, read_mount_points, unescape
from vmplug.host.use.silent import answer_within, find_silent

_OVERLAY = " - overlay "
_NAME = re.compile(r"(?:\\.|[^:\\])+", re.DOTALL)
"""A layer of those in one option: a colon ends it, a backslash is before what is its own."""
_TIMEOUT_S, _LEAST_S = 2.0, 0.1
"""One answers within milliseconds; each that does not leaves half of the time to the next ones."""


class Directory(msgspec.Struct, frozen=True, kw_only=True):
    """A layer, or a mount of an overlay; `shown` is what it shows of that: a directory or file.

    Of a part of a layer that is mounted elsewhere, `path` is the layer's.
    """

    path: str
    key: FileKey
    shown: str = "/"


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """One overlay: its mounts, and its layers, the upper one first.

    `parts` are those of layers that this process's namespace has mounted elsewhere.
    `joins`: the data of a file may be in another layer than its name and owner (metacopy).
    """

    mounts: Sequence[Directory]
    layers: Sequence[Directory]
    joins: bool
    parts: Sequence[Directory] = ()


class _Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A mount of an overlay; `base` is what comes before the paths of its namespace here."""

    base: str
    point: MountPoint

    @property
    def path(self) -> str:
        return f"{self.base}{self.point.path}"


def read_overlays(tables: Mapping[str, str], root: HostRoot) -> list[Overlay]:
    """The overlays of several mount tables; none in the copy of a host.

    One counts several times where its layers may be several: other namespaces may have something
    else by their names.
    """
    if not root.is_live or not any(_OVERLAY in table for table in tables.values()):
        return []
    seen = _find_mounts(tables, root)
    views = {number: list(_name_layers(mounts)) for number, mounts in seen.items()}
    named = {mount.path for mounts in seen.values() for mount in mounts}
    named.update(path for each in views.values() for view in each for path in view)
    parts = list(_list_parts(root))
    silent = find_silent(named.union(*parts), root)

    def look(path: str) -> os.stat_result | None:
        return None if path in silent else root.stat_or_none(path)

    found, timeout_s = list[Overlay](), _TIMEOUT_S
    for number, mounts in seen.items():
        read = answer_within(timeout_s, partial(_read, mounts, views[number], look, root))
        timeout_s = max(_LEAST_S, timeout_s / 2) if read is None else timeout_s
        found += read or ()
    return _add_parts(found, parts, look)


def _find_mounts(tables: Mapping[str, str], root: HostRoot) -> dict[DevNum, list[_Mount]]:
    seen, is_ours = dict[DevNum, list[_Mount]](), cache(belongs_to_us)
    for path, table in tables.items():
        if path.endswith("/ns/mnt") and "/task/" not in path:
            continue  # its process may see another root: each root has a table of its own
        # One table at a time: what two of them say alike, one of them may not lead to.
        lines = "\n".join(line for line in table.split("\n") if _OVERLAY in line)
        for point, namespace in parse_mounts({path: lines}, root):
            if namespace is None or is_ours(namespace):
                base = namespace.replace("/ns/mnt", "/root") if namespace else ""
                seen.setdefault(point.devnum, []).append(_Mount(base=base, point=point))
    return seen


def _name_layers(mounts: Sequence[_Mount]) -> Iterator[list[str]]:
    """The paths that the layers may have, from each view of the overlay.

    docker and containerd give relative ones: from a directory above the overlay or above a layer.
    """
    names = _layers_in(mounts[0].point.fs_options)
    absolute = [name for name in names if name.startswith("/")]
    for base in dict.fromkeys(["", *(mount.base for mount in mounts)]):
        starts = ["/"]
        if len(absolute) < len(names):
            known = [*absolute, *(mount.point.path for mount in mounts if mount.base == base)]
            starts = [str(parent) for path in known for parent in PurePosixPath(path).parents]
        for start in dict.fromkeys(starts):
            yield [f"{base}{os.path.join(start, name)}" for name in names]


_Look = Callable[[str], os.stat_result | None]


def _read(
    mounts: Sequence[_Mount], views: Sequence[Sequence[str]], look: _Look, root: HostRoot
) -> list[Overlay]:
    found = dict[FileKey | None, list[Directory]]()
    for view in views:
        first = _directory(look, view[0])
        key = first.key if first else None
        known = found.get(key, [])
        if len(known) == len(view) or (found and not first):
            continue
        layers = [layer for path in view if (layer := _directory(look, path))]
        if len(layers) > len(known):
            found[key] = layers
    whole = [layers for layers in found.values() if len(layers) == len(views[0])]
    shown, joins = list(_read_mounts(mounts, look)), joins_layers(mounts[0].point.fs_options, root)
    return [
        Overlay(mounts=shown, layers=layers, joins=joins) for layers in whole or found.values()
    ]


def _read_mounts(mounts: Sequence[_Mount], look: _Look) -> Iterator[Directory]:
    """All of this process's own mounts, and of others one for each directory that they show."""
    known = set[str]()
    for mount in mounts:
        shown, number = mount.point.shown, mount.point.devnum
        status = None if mount.base and shown in known else look(mount.path)
        if status is None:
            continue
        is_covered = status.st_dev != os.makedev(number.major, number.minor)
        # Files may have the number of their layer.
        if not stat.S_ISDIR(status.st_mode) or not is_covered:
            known.add(shown)
            yield Directory(path=mount.path, key=key_of(status), shown=shown)


def _directory(look: _Look, path: str) -> Directory | None:
    status = look(path)
    is_directory = status and stat.S_ISDIR(status.st_mode)
    return Directory(path=path, key=key_of(status), shown="/") if status and is_directory else None


def _layers_in(options: Sequence[str]) -> list[str]:
    upper, lower = list[str](), list[str]()
    for name, _, text in (option.partition("=") for option in options):
        if name == "upperdir":
            upper.append(_unquote(unescape(text)))
        elif name == "lowerdir":
            lower += map(_unquote, _NAME.findall(unescape(text)))
        elif name in {"lowerdir+", "datadir+"}:
            lower.append(unescape(text))
    return [*upper, *lower]


def _list_parts(root: HostRoot) -> Iterator[tuple[str, str]]:
    """Where parts of file systems are mounted, and their paths where the whole of each is."""
    mounts = read_mount_points(root)
    wholes = {mount.devnum: mount.path for mount in mounts if mount.shown == "/"}
    for mount in mounts:
        if mount.shown != "/" and mount.devnum in wholes:
            yield mount.path, f"{wholes[mount.devnum].rstrip('/')}{mount.shown}"


def _add_parts(
    overlays: Sequence[Overlay], parts: Iterable[tuple[str, str]], look: _Look
) -> list[Overlay]:
    layers, found = dict[FileKey, list[tuple[int, str]]](), dict[int, list[Directory]]()
    for number, overlay in enumerate(overlays):
        for layer in overlay.layers:
            layers.setdefault(layer.key, []).append((number, layer.path))
    for path, whole in parts:
        status = look(path)
        if status is None or look(whole) is None:
            continue
        for parent in PurePosixPath(whole).parents:
            above = _directory(look, str(parent))
            for number, layer_path in layers.get(above.key, ()) if above else ():
                shown = f"/{PurePosixPath(whole).relative_to(parent)}"
                part = Directory(path=layer_path, key=key_of(status), shown=shown)
                found.setdefault(number, []).append(part)
    return [replace(each, parts=found.get(number, ())) for number, each in enumerate(overlays)]


def _unquote(name: str) -> str:
    return re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL)


def joins_layers(options: Sequence[str], root: HostRoot) -> bool:
    """The options of a mount show only what is not the module's default."""
    if any(option.startswith("metacopy=") for option in options):
        return "metacopy=on" in options
    return (root.read_text("/sys/module/overlay/parameters/metacopy") or "").strip() == "Y"


def find_other_names(path: str, overlays: Sequence[Overlay], root: HostRoot) -> list[str]:
    """The names of a file in the layers of its overlay, and in overlays over its directory.

    Two overlays that share a lower layer do not share its files: each copies what it writes.
    """
    found = dict[str, None]()
    for step in (_below, _above):
        waiting = [path]
        while waiting:
            names = [name for each in waiting for name in _ask(step, each, overlays, root)]
            waiting = [name for name in dict.fromkeys(names) if name not in {path, *found}]
            found |= dict.fromkeys(waiting)
    return list(found)


Step = Callable[[Overlay, Mapping[FileKey, str]], Iterator[str]]


def _ask(step: Step, path: str, overlays: Sequence[Overlay], root: HostRoot) -> Iterator[str]:
    """What a step finds with a file, the directories above it, and its name in each of them."""
    name = PurePosixPath(path)
    above = ((parent, root.stat_or_none(str(parent))) for parent in (name, *name.parents))
    names = {key_of(status): str(name.relative_to(parent)) for parent, status in above if status}
    for overlay in overlays:
        known = overlay.mounts if step is _below else (*overlay.layers, *overlay.parts)
        if any(each.key in names for each in known):  # a look at one layer may wait for another
            yield from answer_within(_TIMEOUT_S, partial(_list, step, overlay, names)) or ()


def _list(step: Step, overlay: Overlay, names: Mapping[FileKey, str]) -> list[str]:
    return list(step(overlay, names))


def _below(overlay: Overlay, names: Mapping[FileKey, str]) -> Iterator[str]:
    for mount in overlay.mounts:
        if mount.key in names:
            name = PurePosixPath(mount.shown, names[mount.key])
            yield from _shown_as(str(name), overlay)


def _above(overlay: Overlay, names: Mapping[FileKey, str]) -> Iterator[str]:
    for layer in (*overlay.layers, *overlay.parts):
        if layer.key not in names:
            continue
        name = PurePosixPath(layer.shown, names[layer.key])
        if f"{layer.path}{name}" in _shown_as(str(name), overlay):
            mounts = (each for each in overlay.mounts if name.is_relative_to(each.shown))
            paths = (PurePosixPath(each.path, name.relative_to(each.shown)) for each in mounts)
            yield from filter(os.path.isfile, map(str, paths))


def _shown_as(name: str, overlay: Overlay) -> list[str]:
    """The file of that name in the first layer that has it; in all of them if they are joined."""
    paths = [f"{layer.path}{name}" for layer in overlay.layers]
    has = [path for path in paths if os.path.lexists(path)]
    return [path for path in (has if overlay.joins else has[:1]) if os.path.isfile(path)]
