"""The names of a file in an overlay and in its layers: one file, with an inode for each.

So neither the open files nor the locks of one name show those of the other. The options of an
overlay name its layers as the mounter saw them: they are looked for where the overlay is seen,
then in this process's own view. vmplug leaves out what users mount in user namespaces of their
own: a server of theirs could keep it waiting.
Source: Documentation/filesystems/overlayfs.rst; fs/overlayfs, ovl_show_options.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import PurePosixPath

import msgspec

from vmplug.devnum import DevNum, FileKey, key_of
from vmplug.host.root import HostRoot
from vmplug.host.use.enter import belongs_to_us
from vmplug.host.use.mounts import MountPoint, parse_mounts, unescape
from vmplug.host.use.silent import answer_within, find_silent

_OVERLAY = " - overlay "
_COLON = re.compile(r"(?<!\\):")
_TIMEOUT_S = 2.0


class Directory(msgspec.Struct, frozen=True, kw_only=True):
    """A layer, or a mount of an overlay; `shown` is the directory of the overlay that it shows."""

    path: str
    key: FileKey
    shown: str = "/"


class Overlay(msgspec.Struct, frozen=True, kw_only=True):
    """One overlay: its mounts, and its layers, the upper one first.

    `joins`: the data of a file may be in another layer than its name and owner (metacopy).
    """

    mounts: Sequence[Directory]
    layers: Sequence[Directory]
    joins: bool


def read_overlays(tables: Mapping[str, str], root: HostRoot) -> list[Overlay]:
    """The overlays of several mount tables; none in the copy of a host."""
    if not root.is_live or not any(_OVERLAY in table for table in tables.values()):
        return []
    seen, is_ours = dict[DevNum, list[tuple[str, MountPoint]]](), cache(belongs_to_us)
    for mount, namespace in parse_mounts(tables, root):
        if mount.fs_type == "overlay" and (namespace is None or is_ours(namespace)):
            mounts = seen.setdefault(mount.devnum, [])
            if namespace is None or mount.shown not in [known.shown for _, known in mounts]:
                base = namespace.replace("/ns/mnt", "/root") if namespace else ""
                mounts.append((base, mount))
    read = (answer_within(_TIMEOUT_S, partial(_read, mounts, root)) for mounts in seen.values())
    return [overlay for overlay in read if overlay]


def _read(mounts: Sequence[tuple[str, MountPoint]], root: HostRoot) -> Overlay:
    bases = dict.fromkeys([*(base for base, _ in mounts), ""])
    options = mounts[0][1].fs_options
    named = [[f"{base}{layer}" for base in bases] for layer in _layers_in(options)]
    shown = {f"{base}{mount.path}": mount.shown for base, mount in mounts}
    silent = find_silent([*shown, *(path for paths in named for path in paths)], root)

    def find(paths: Iterable[str], shown: str = "/") -> Iterator[Directory]:
        for path in paths:
            status = None if path in silent else root.stat_or_none(path)
            if status and stat.S_ISDIR(status.st_mode):
                yield Directory(path=path, key=key_of(status), shown=shown)
                return

    return Overlay(
        mounts=[each for path, inside in shown.items() for each in find([path], inside)],
        layers=[each for paths in named for each in find(paths)],
        joins="metacopy=on" in options,
    )


def _layers_in(options: Sequence[str]) -> list[str]:
    upper, lower = list[str](), list[str]()
    for name, _, text in (option.partition("=") for option in options):
        if name == "upperdir":
            upper.append(unescape(text))
        elif name == "lowerdir":
            lower += (re.sub(r"\\(.)", r"\1", part) for part in _COLON.split(unescape(text)))
        elif name in {"lowerdir+", "datadir+"}:
            lower.append(unescape(text))
    return [layer for layer in (*upper, *lower) if layer.startswith("/")]


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
    """What a step finds with the directories above a file, and its name in each of them."""
    name = PurePosixPath(path)
    above = ((parent, root.stat_or_none(str(parent))) for parent in name.parents)
    names = {key_of(status): str(name.relative_to(parent)) for parent, status in above if status}
    for overlay in overlays:
        yield from step(overlay, names)


def _below(overlay: Overlay, names: Mapping[FileKey, str]) -> Iterator[str]:
    for mount in overlay.mounts:
        if mount.key in names:
            yield from _shown_as(os.path.join(mount.shown, names[mount.key]), overlay)


def _above(overlay: Overlay, names: Mapping[FileKey, str]) -> Iterator[str]:
    for layer in overlay.layers:
        if layer.key not in names:
            continue
        name = PurePosixPath("/", names[layer.key])
        if f"{layer.path}{name}" in _shown_as(str(name), overlay):
            mounts = (each for each in overlay.mounts if name.is_relative_to(each.shown))
            paths = (os.path.join(each.path, name.relative_to(each.shown)) for each in mounts)
            yield from filter(os.path.isfile, paths)


def _shown_as(name: str, overlay: Overlay) -> list[str]:
    """The file of that name in the first layer that has it; in all of them if they are joined."""
    paths = [f"{layer.path}{name}" for layer in overlay.layers]
    has = [path for path in paths if os.path.lexists(path)]
    return [path for path in (has if overlay.joins else has[:1]) if os.path.isfile(path)]
