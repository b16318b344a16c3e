"""`vmplug device-plugin` as a program of a node, which offers loop devices of stable names."""

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cli.command import VMPLUG
from tests.support.kubernetes.node import POLL_S, TIMEOUT_S, Node, Program

RESOURCE = "vmplug.test/disk"
_CONFIG = """
cdi-directory = "{directory}/cdi"
reconcile-seconds = 1
[[resource]]
name = "{resource}"
paths = ["/dev/disk/by-id/vmplug-*"]
"""
_LOG = "device-plugin"


class DevicePlugin:
    """That of a node; what it writes is below `directory`.

    `disks` are the device nodes of what it offers, by the names that udev would give them.
    """

    def __init__(self, node: Node, directory: Path, disks: Mapping[str, Path]) -> None:
        self.disks = disks
        self.directory = directory
        self._node = node
        names = directory / "udev"
        names.mkdir(parents=True)
        for name, disk in disks.items():
            number = disk.stat().st_rdev
            text = f"S:disk/by-id/{name}\n"
            (names / f"b{os.major(number)}:{os.minor(number)}").write_text(text)
        node.run("mkdir", "-p", "/run/udev")
        node.run("ln", "-sfn", names, "/run/udev/data")
        config = directory / "device-plugin.toml"
        config.write_text(_CONFIG.format(directory=directory, resource=RESOURCE))
        self._options = ["--config", str(config), "--state-dir", f"{directory}/state"]
        self._program: Program | None = None

    def start(self) -> None:
        """Start it."""
        self._program = self._node.start(_LOG, VMPLUG, "device-plugin", *self._options)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._program
        self._program.send(number)

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, and wait for its end."""
        if self._program:
            self._program.end(number)
            self._program = None

    def status(self) -> dict[str, Any]:
        """What `vmplug device-plugin status` says of each device, by its ID."""
        said = self._node.run(VMPLUG, "device-plugin", "status", *self._options, "--json")
        return {device["id"]: device for device in json.loads(said)["devices"]}

    def log(self) -> str:
        """All that the plugins of the node have said."""
        return self._node.log(_LOG)

    def wait_for(self, device: str, **wanted: object) -> None:
        """Wait until a device has this status."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            found = self.status()[device]
            if wanted.items() <= found.items():
                return
            assert time.monotonic() < deadline, (found, self.log())
            time.sleep(POLL_S)
