"""A file that says it is a record of a host."""

import gzip
import os
from contextlib import suppress
from functools import cache

from tests.fuzz.guard import changes_only, temporary_files_in
from tests.support.memory import directory_of_this_process
from vmplug.errors import DeviceError
from vmplug.host.inventory import read_inventory
from vmplug.host.record.read import Limits, read_record

LIMITS = Limits(members=200, file_bytes=1 << 16, whole_bytes=1 << 20)


@cache
def _directory() -> str:
    return directory_of_this_process("vmplug-fuzz-")


def check(data: bytes) -> None:
    """Any bytes are refused, or read; no file is left."""
    directory = _directory()
    path = os.path.join(directory, "record")
    for content in (data, gzip.compress(data, 1, mtime=0)):
        with open(path, "wb") as file:
            file.write(content)
        with temporary_files_in(directory), changes_only(directory):
            _read(path)
        assert os.listdir(directory) == ["record"]


def _read(path: str) -> None:
    with suppress(DeviceError):
        read_inventory(read_record(path, LIMITS))
