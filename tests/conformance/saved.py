"""Saved state: what another manager knows of a device that this one attached."""

import json
import sqlite3
from contextlib import closing
from typing import Any

from tests.conformance.host import add_device, request
from tests.conformance.machine import VM, Machine, katas_drive
from tests.conformance.vector import Adapter, Answer, Case, Deviation, Refusal, attempt, kind_of
from tests.support.tree import HostTree
from vmplug.host.device import DeviceType
from vmplug.manager.store import Attachment

_TTY = {"ContainerPath": "/dev/tty2", "DevType": "c", "Major": 4, "Minor": 2}
_SDA = {"ContainerPath": "/dev/sda", "DevType": "b", "Major": 8, "Minor": 0}
_SDB = {"ContainerPath": "/dev/sdb", "DevType": "b", "Major": 8, "Minor": 16}
_VIRTIO_BLK = {"block-driver": "virtio-blk"}


def _saved_twice(case: Case) -> Answer:
    tree = HostTree(case.path)
    machine = Machine(case, tree)
    device = {"attached block": _SDA, "block device": _SDB, "generic device": _TTY}[
        case.name.removeprefix("state: ").split(" never")[0].split(" (")[0].removesuffix(" device")
    ]
