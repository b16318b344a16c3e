"""Host paths: live, repeated, and through a vhost-user store."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, compare
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

BLK_MAJOR = 241


def rows() -> Iterator[Ratio]:
    """The first four rows of the table."""
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

    yield compare("live host-path lookup / bare open+read+close", live, bare, target=1.25)
    with HostPathCache(root) as cache:

        def repeated() -> str:
            return cache.get_host_path(info)

        yield compare("validated repeat lookup / live lookup", repeated, live, target=0.35)


def _vhost_user() -> Iterator[Ratio]:
    with _store(10) as small, _store(10_000) as large:
        wanted = DevNum(BLK_MAJOR, 5)

        def warm(store: VhostUserStore) -> str:
            return store.find_socket(wanted)

        yield compare(
            "warm vhost-user lookup, 10 000 nodes / 10 nodes",
            lambda: warm(large),
            lambda: warm(small),
            target=1.1,
        )
    with _store(1000) as store:
        infos = [
            DeviceInfo(
                container_path=f"/dev/vd{minor}",
                dev_type=DevType.BLOCK,
                devnum=DevNum(BLK_MAJOR, minor),
            )
            for minor in range(1000)
        ]
        root = HostRoot("/")

        def every() -> None:
            assert len(resolve_all(infos, root, VhostUserStore(store.path))) == len(infos)

        def cold() -> None:
            VhostUserStore(store.path).find_socket(wanted)

        name = "resolving all of 1 000 vhost-user devices / one cold scan"
        yield compare(name, every, cold, target=3.0, rounds=15, repeat=3)


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
