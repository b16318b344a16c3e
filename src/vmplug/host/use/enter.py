"""Enter other namespaces for a moment, in a thread that ends afterwards.

Source: setns(2): a thread enters a mount namespace only with a root and a directory of its own.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from vmplug.errors import AttributeReadError
from vmplug.host.use.silent import answer_within

if TYPE_CHECKING:
    import ctypes

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
_CLONE_FS, _NS_GET_USERNS = 0x200, 0xB701
_PROC = "/proc/"
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_TIMEOUT_S = 4.0
"""All of them answer within milliseconds."""

T = TypeVar("T")


def ask_inside(namespaces: Iterable[str], kind: int, ask: Callable[[int], T]) -> dict[str, T]:
    """The answer inside of each namespace, by the file that leads to it.

    `kind` is CLONE_NEWNS or CLONE_NEWNET. `ask` gets a descriptor of this process's /proc: a
    container may have another one, or none. A namespace that may not be entered has no answer.
    Nor have those with a mount that does not answer in time: it may be below a FUSE server that
    its owner has stopped. Then a thread is left there, until the server or this process ends.
    """
    import ctypes  # noqa: PLC0415  2 ms, and inside of a namespace it may not be there

    answers, mounted, own = dict[str, T](), list[str](), list[str]()
    for path in namespaces:
        (mounted if is_mounted(path) else own).append(path)

    def run(paths: Iterable[str]) -> None:
        proc = os.open(_PROC, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if kind == CLONE_NEWNS and libc.unshare(_CLONE_FS):
                return
            for path in paths:
                with suppress(OSError, AttributeReadError):
                    _enter(os.open(path.removeprefix(_PROC), _READ, dir_fd=proc), kind, libc)
                    answers[path] = ask(proc)
        finally:
            os.close(proc)

    for paths, timeout_s in ((own, None), (mounted, _TIMEOUT_S)):
        if paths:
            answer_within(timeout_s, partial(run, paths))
    return dict(answers)


def is_mounted(namespace: str) -> bool:
    """Whether its file is where a process has mounted it, not one of the kernel's own."""
    return "/root/" in namespace


def belongs_to_us(namespace: str) -> bool:
    """Whether a namespace belongs to the user namespace of this process, and is a process's own.

    In any other, users without rights mount what they want. Source: ioctl_ns(2).
    """
    if is_mounted(namespace):
        return False
    import fcntl  # noqa: PLC0415  few hosts ask

    try:
        with open(namespace, "rb") as file:
            owner = fcntl.ioctl(file, _NS_GET_USERNS)
        try:
            return os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user"))
        finally:
            os.close(owner)
    except OSError:
        return False


def read_mount_table(proc: int) -> str:
    """The mount table of this thread; `proc` is a descriptor of /proc."""
    descriptor = os.open("thread-self/mountinfo", _READ, dir_fd=proc)
    with open(descriptor, encoding="utf-8", errors="surrogateescape", newline="\n") as table:
        return table.read()


def _enter(namespace: int, kind: int, libc: "ctypes.CDLL") -> None:
    import ctypes  # noqa: PLC0415  imported already

    try:
        if libc.setns(namespace, kind):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)
