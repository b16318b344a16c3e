"""Processes: their identity, environment and limits.

Source: proc_pid_stat(5), field 22, starttime in clock ticks after boot.
"""

import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError, StateError
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.waiting import LONGEST_S

ENDED = frozenset("ZX")
"""The states of a thread that has ended."""
NLINK_OF_ONE_TASK = 3
"""Links of a directory task: `.`, `..`, and one for each thread. Source: fs/proc/base.c."""


def list_other_threads(pid: int | str, root: HostRoot) -> list[str]:
    """The threads of a process that run, without its first one.

    That one may end before them. Then it is a zombie without files and memory, and only the others
    show them. Source: pthread_exit(3), "Notes".
    """
    directory = f"/proc/{pid}/task"
    status = root.stat_or_none(directory)
    if status and status.st_nlink == NLINK_OF_ONE_TASK:  # a list takes five times as long
        return []
    others = (name for name in root.list_dir(directory) if name != str(pid))
    fields = ((name, read_fields(f"{directory}/{name}/stat", root)) for name in others)
    return [name for name, found in fields if found and found[0] not in ENDED]


def read_fields(path: str, root: HostRoot) -> list[str] | None:
    """The fields behind the name, which may contain blanks and brackets; None when absent."""
    text = root.read_text(path)
    return None if text is None else text.rpartition(")")[2].split()


def read_start_time(pid: int, root: HostRoot) -> int | None:
    """When the process began; None when it does not exist, or is a zombie."""
    fields = read_fields(f"/proc/{pid}/stat", root)
    if fields is None:
        return None
    if len(fields) < 20 or not is_decimal(fields[19]):
        raise AttributeReadError(f"/proc/{pid}/stat", why="it has no start time")
    has_ended = fields[0] in ENDED and not list_other_threads(pid, root)
    return None if has_ended else int(fields[19])


def is_running(pid: int, started_at: int | None, root: HostRoot) -> bool:
    """Whether the process exists and, if that is known, began at that time."""
    now = read_start_time(pid, root)
    return now is not None and started_at in {None, now}


def find_guest_process(threads: Collection[int], peer: int | None, root: HostRoot) -> int | None:
    """The process that runs a guest's CPUs in `threads`, numbered as QEMU itself sees them.

    It is the `peer` that answers on the socket, or a QEMU of our PID namespace that a proxy at the
    socket speaks for. None when neither has all of them. A QEMU speaks for no other: one that its
    guest has compromised could name the threads of another VM, and vmplug would end that.
    Source: proc_pid_status(5), NSpid.
    """
    if not threads:
        return None
    if peer and set(threads) <= _threads_of(peer, root).keys():
        return peer
    if peer and _is_qemu(peer, root):
        return None
    status = root.read_text(f"/proc/{next(iter(threads))}/status") or ""
    group = re.search(r"^Tgid:\s*([0-9]+)$", status, re.MULTILINE)
    pid = int(group[1]) if group else 0
    # A process of another namespace may have given its threads the same numbers.
    if not {number: number for number in threads}.items() <= _threads_of(pid, root).items():
        return None
    return pid if _is_qemu(pid, root) else None


def _is_qemu(pid: int, root: HostRoot) -> bool:
    try:
        program = root.read_link(f"/proc/{pid}/exe") or ""
    except AttributeReadError:  # another user's
        return False
    return os.path.basename(program).startswith("qemu")


def _threads_of(pid: int, root: HostRoot) -> dict[int, int]:
    """The threads of a process: their numbers here by those in its own PID namespace."""
    found = dict[int, int]()
    for name in root.list_dir(f"/proc/{pid}/task"):
        status = root.read_text(f"/proc/{pid}/task/{name}/status") or ""
        if numbers := re.search(r"^NSpid:.*?([0-9]+)$", status, re.MULTILINE):
            found[int(numbers[1])] = int(name)
    return found


def find_marked(variable: str) -> dict[int, str]:
    """The value of an environment variable in every process of this user that has it.

    Processes of other users are skipped, also by root: the environment is in a process's memory,
    and one that waits for its own FUSE server with that locked would keep us waiting forever.
    Source: proc_pid_environ(5); Linux mm/memory.c, access_remote_vm.
    """
    root, found = THIS_HOST, dict[int, str]()
    for pid in filter(is_decimal, root.list_dir("/proc")):
        with suppress(AttributeReadError):
            text = (root.read_text(f"/proc/{pid}/environ") or "") if _is_own(pid, root) else ""
            _, is_marked, value = ("\0" + text).partition(f"\0{variable}=")
            if is_marked:
                found[int(pid)] = value.partition("\0")[0]
    return found


def _is_own(pid: str, root: HostRoot) -> bool:
    """Whether a process is this user's. The owner of /proc/PID is root for any that is hidden.

    Source: proc_pid(5), PR_SET_DUMPABLE; proc_pid_status(5), Uid.
    """
    status = root.read_text(f"/proc/{pid}/status") or ""
    return f"\nUid:\t{os.getuid()}\t{os.geteuid()}\t" in status


_CAP_IPC_LOCK = 14
"""Source: capabilities(7), include/uapi/linux/capability.h."""


def has_capability(pid: str, number: int, root: HostRoot) -> bool:
    """Whether a process, by its pid or `self`, has a capability now."""
    status = root.read_text(f"/proc/{pid}/status") or ""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> number & 1)


def read_memlock_limit(pid: int, root: HostRoot) -> int | None:
    """How many bytes of memory a process may lock; None for no limit, or where it is unknown.

    Source: proc_pid_limits(5).
    """
    if has_capability(str(pid), _CAP_IPC_LOCK, root):
        return None
    limits = root.read_text(f"/proc/{pid}/limits") or ""
    soft = re.search(r"^Max locked memory\s+([0-9]+)\s", limits, re.MULTILINE)
    return int(soft[1]) if soft else None


def wait_for_end(pid: int, timeout_s: float, *, started_at: int | None = None) -> bool:
    """Whether the process (that began then) ends in time. Source: pidfd_open(2)."""
    with _opened(pid) as descriptor:
        is_there = descriptor is not None and is_running(pid, started_at, THIS_HOST)
        return descriptor is None or not is_there or _has_ended(descriptor, timeout_s)


def end_process(pid: int, started_at: int | None, grace_s: float) -> bool:
    """Whether the process that began then has ended: killed `grace_s` after SIGTERM.

    A process that is stopped takes SIGKILL, and no other signal.
    """
    with _opened(pid) as descriptor:
        if descriptor is None or not is_running(pid, started_at, THIS_HOST):
            return True
        return not _end([descriptor], grace_s)


_KILL_TIMEOUT_S = 2.0
"""It ends at once, unless a device or a file system holds it up."""


def end_processes(pids: Iterable[int], grace_s: float) -> None:
    """End them all; kill those that still run `grace_s` after SIGTERM.

    Each is signalled alone: others may be in its group, which it may just be leaving.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(pid)) for pid in pids]
        _end([descriptor for descriptor in opened if descriptor is not None], grace_s)


def _end(running: list[int], grace_s: float) -> list[int]:
    """End the processes of these descriptors; returns those that do not end."""
    import signal  # noqa: PLC0415  0.6 ms, and few verbs end a process

    for ending, timeout_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_TIMEOUT_S)):
        for descriptor in running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, ending)
        deadline = time.monotonic() + timeout_s
        running = [
            descriptor
            for descriptor in running
            if not _has_ended(descriptor, max(0, deadline - time.monotonic()))
        ]
    return running


@contextmanager
def _opened(pid: int) -> Iterator[int | None]:
    """A descriptor of the process; None when it does not exist."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_ended(descriptor: int, timeout_s: float) -> bool:
    """Whether it ends in time. Not by select(2), which knows no descriptor above 1023."""
    import select  # noqa: PLC0415  the same

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(min(timeout_s, LONGEST_S) * 1000))


class ProcessLock:
    """A lock of the process that made it; a thread that has it may take it again.

    A child of fork(2) must use neither the connections nor the database of its parent, and a lock
    that another thread had would never be free there. It gets StateError instead.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @property
    def is_ours(self) -> bool:
        """Whether this process made it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise StateError in another process."""
        if not self.is_ours:
            raise StateError(
                f"process {self._pid} opened this, and its child {os.getpid()} cannot use it",
                state="opened before fork",
                required="opened by this process",
                hint="open it again after the fork",
            )

    def acquire(self) -> None:
        """Take it."""
        if os.getpid() != self._pid:  # as in `check`, which would take as long as the rest
            self.check()
        self._lock.acquire()

    def take_if_free(self) -> bool:
        """Take it, unless another thread has it: returns whether it is this one's now."""
        self.check()
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Release it once."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()
