"""What a wrong request is told: one sentence, a remedy, an exit status, and nothing changed."""

import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.command import Result, Vmplug, device, number_of, write_bundle
from tests.cli.world import Picture, World
from tests.contract.world import journal_rows
from tests.support.disks import disk_image, loop_device
from tests.support.raw_qmp import RawQmp
from tests.support.vm import root_ports, start_vm

OURS = r"\b[A-Z]\w*(Error|Exception)\b|Errno|Traceback|: Success\b|object at 0x|<class|\bNone\b"
UNCLEAR = re.compile(OURS)
"""Words that belong to Python and say nothing to a user."""

USAGE, REQUEST, HOST, HYPERVISOR, STATE = 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A command line that is refused; `{name}` in its words is a place of the world.

    `says` and `hint` are patterns that the sentence and the remedy match; without `hint` there is
    no remedy. `facts` are some of the error's.
    """

    command: str
    status: int
    code: str
    says: str
    hint: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    stdin: str = ""


def usage(command: str, says: str, hint: str | None = None) -> Bad:
    """The words do not make a command; the remedy is the help of the verb."""
    verb = command.split(" -")[0] if hint is None else hint
    return Bad(command=command, status=USAGE, code="usage", says=says, hint=f"^vmplug {verb}--help$")
