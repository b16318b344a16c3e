"""Run a program for which the host has no AIO context left: `no_aio.py PROGRAM ARGUMENTS`.

A seccomp filter answers io_setup as the kernel does when fs.aio-max-nr is used up, so that the
tests of others keep their contexts. Source: Documentation/userspace-api/seccomp_filter.rst.
"""

import ctypes
import errno
import os
import struct
import sys
from pathlib import Path

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_IO_SETUP = {"x86_64": 206, "aarch64": 0, "s390x": 243}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def forbid_aio() -> None:
    """From now on this process and its children get EAGAIN from io_setup."""
    number = _IO_SETUP[os.uname().machine]
    steps = (
        (_LOAD, 0, 0, 0),
        (_EQUALS, 0, 1, number),
        (_RETURN, 0, 0, _ERRNO | errno.EAGAIN),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def without_aio(program: str, directory: Path) -> str:
    """A command that is `program` without AIO contexts."""
    wrapper = directory / "without-aio"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {program} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


if __name__ == "__main__":
    forbid_aio()
    os.execvp(sys.argv[1], sys.argv[1:])
