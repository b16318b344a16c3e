"""Host paths: live, repeated, and through a vhost-user store."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, compare, scaled
from vmplug import (
    DeviceInfo,
    DevNum,
    DevType,
    HostPathCache,
    HostRoot,
    VhostUserStore,
    get_host_path,
    resolve_all,
)
from vmplug.errors import HostError, NoSuchDevice

BLK_MAJOR = 241
_ALL_OF = {10: 1.2, 100: 1.4, 1000: 3.0}


def rows() -> Iterator[Ratio]:
    """The first rows of the table."""
    yield from _sysfs()
    yield from _vhost_user()


def _sysfs() -> Iterator[Ratio]:
    root = HostRoot("/")
    number = min(os.listdir("/sys/dev/block"))
    path = f"/sys/dev/block/{number}/uevent"
    info = DeviceInfo(
        container_path="/dev/xvda", dev_type=DevType.BLOCK, devnum=DevNum.parse(number)
    )

    def bare() -> bytes:
        descriptor = os.open(path, os.O_RDONLY)
        data = os.read(descriptor, 4096)
        os.close(descriptor)
        return data

    def live() -> str:
        return get_host_path(info, root)

    yield compare(
        "live host-path lookup / bare open+read+close",
        live,
        bare,
        lambda path, data: f"DEVNAME={path.removeprefix('/dev/')}".encode() in data.splitlines(),
        target=1.25,
    )
    yield _missing(root)
    with HostPathCache(root) as cache:

        def repeated() -> str:
            return cache.get_host_path(info)

        name = "validated repeat lookup / live lookup"
        yield compare(name, repeated, live, str.__eq__, target=0.35)


def _missing(root: HostRoot) -> Ratio:
    """Neither sysfs nor /dev has it."""
    info = DeviceInfo(
        container_path="/dev/none", dev_type=DevType.BLOCK, devnum=DevNum(4095, 1048575)
    )
    path = "/sys/dev/block/4095:1048575/uevent"

    def ours() -> str:
        try:
            return get_host_path(info, root)
        except NoSuchDevice:
            return "nothing"

    def bare() -> str:
        try:
            return str(os.open(path, os.O_RDONLY))
        except FileNotFoundError:
            return "nothing"

    name = "lookup of a missing entry / a bare open that fails"
    return compare(name, ours, bare, str.__eq__, target=2.5)


def _vhost_user() -> Iterator[Ratio]:
    with _store(10) as small, _store(scaled(10_000)) as large:
        wanted = DevNum(BLK_MAJOR, 5)

        def warm(store: VhostUserStore) -> str:
            return store.find_socket(wanted)

        yield compare(
            "warm vhost-user lookup, 10 000 nodes / 10 nodes",
            lambda: warm(large),
            lambda: warm(small),
            lambda of_many, of_few: all(
                os.path.basename(path) == "disk00005" for path in (of_many, of_few)
            ),
            target=1.1,
        )
    yield from map(_cold, (10, 100, 1000))
    with _store(scaled(1000)) as store:
        infos = [
            DeviceInfo(
                container_path=f"/dev/vd{minor}",
                dev_type=DevType.BLOCK,
                devnum=DevNum(BLK_MAJOR, minor),
            )
            for minor in range(scaled(1000))
        ]
        root = HostRoot("/")

        def every(count: int) -> list[str]:
            found = resolve_all(infos[:count], root, VhostUserStore(store.path))
            return [device.host_path for device in found if not isinstance(device, HostError)]

        def cold() -> str:
            return VhostUserStore(store.path).find_socket(wanted)

        for count, target in _ALL_OF.items():
            yield compare(
                f"resolving {count} of 1 000 vhost-user devices / one cold scan",
                partial(every, count),
                cold,
                lambda paths, path: path in paths and len({*paths}) == len(paths) >= 10,
                target=target,
                size=(15, 3),
            )


def _cold(count: int) -> Ratio:
    """The first lookup in a store of so many nodes."""
    with _store(count) as store:
        last = DevNum(BLK_MAJOR, count - 1)

        def bare() -> dict[int, str]:
            nodes = os.open(f"{store.path}/block/devices", os.O_DIRECTORY)
            try:
                return {
                    os.stat(name, dir_fd=nodes, follow_symlinks=False).st_rdev: name
                    for name in os.listdir(nodes)
                }
            finally:
                os.close(nodes)

        return compare(
            f"cold scan of {count} vhost-user nodes / bare listdir+stat of each",
            lambda: VhostUserStore(store.path).find_socket(last),
            bare,
            lambda path, names: (
                len(names) == count and os.path.basename(path) == names[os.makedev(*last)]
            ),
            target=1.6,
            size=(31, max(1, 200 // count)),
        )


@contextmanager
def _store(nodes: int) -> Iterator[VhostUserStore]:
    """A store of that many block nodes, each with the socket of one listener linked to it."""
    with TemporaryDirectory(prefix="vmplug-bench-") as directory:
        devices, sockets = (Path(directory, "block", name) for name in ("devices", "sockets"))
        devices.mkdir(parents=True)
        sockets.mkdir()
        for minor in range(nodes):
            name = f"disk{minor:05}"
            os.mknod(devices / name, 0o600 | stat.S_IFBLK, os.makedev(BLK_MAJOR, minor))
            if minor < 1000:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(sockets / name))
        yield VhostUserStore(directory)
