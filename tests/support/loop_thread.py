"""What the thread of an event loop does itself, and must leave to others."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MAY_RUN = ("vmplug.aio", "vmplug.waiting")
"""Modules of vmplug whose code the loop's thread may run."""
MAY_CALL = {
    *("ProcessLock.__init__", "ProcessLock.check", "ProcessLock.is_ours"),
    *("Lease.process", "Lease.descriptors", "Lease.descriptors.<locals>.<genexpr>"),
    *("Opened.all", "Opened.all.<locals>.<listcomp>"),
    *("ColdDevices.descriptors", "ColdDevices.descriptors.<locals>.<listcomp>"),
    *("ForeignQemu.descriptors", "ForeignQemu.descriptors.<locals>.<genexpr>"),
}
"""Of others: they compare or list numbers."""
LOOPS_OWN = ("asyncio", "selectors", "concurrent.futures", "threading", "weakref")
"""The loop waits for events itself, and hands calls over: that takes locks for microseconds."""
BLOCKING = {
    "posix",
    "io",
    "_io",
    "fcntl",
    "_sqlite3",
    "sqlite3",
    "_socket",
    "select",
    "_posixsubprocess",
    "_ctypes",
}
"""Modules in C whose functions enter the kernel and may stay there."""
NAMES = {"sleep", "acquire", "__enter__", "acquire_lock"}
"""Functions of C without a module, or of one that has others: time.sleep, and locks."""
HARMLESS = {"getpid", "fspath", "pidfd_open", "close"}


@contextmanager
def watched() -> Iterator[list[str]]:
    """What this thread does inside of the `with` that may block, by function and caller.

    Garbage of other tests is not collected meanwhile, as it may have generators to end.
    """
    found: list[str] = []

    def see(frame: FrameType, event: str, argument: object) -> None:
        module = str(frame.f_globals.get("__name__"))
        name = frame.f_code.co_qualname
        is_other = module.startswith("vmplug.") and not module.startswith(MAY_RUN)
        if event == "call" and is_other and name not in MAY_CALL:
            found.append(f"{module}.{name}")
        if event == "c_call" and not module.startswith(LOOPS_OWN) and may_block(argument):
            found.append(f"{argument} in {module}")

    former = sys.getprofile()
    gc.disable()
    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(former)
        gc.enable()


def may_block(function: object) -> bool:
    """Whether a function in C may keep its thread."""
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    name = str(getattr(function, "__name__", ""))
    is_lock = "lock" in type(owner).__name__.lower() and name in NAMES
    return name not in HARMLESS and (module in BLOCKING or is_lock or name == "sleep")
