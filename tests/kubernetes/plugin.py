"""`vmplug device-plugin` as a process, which offers loop devices that udev gives stable names."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cli.command import VMPLUG
from tests.support.kubernetes.node import POLL_S, TIMEOUT_S

RESOURCE = "vmplug.test/disk"
_CONFIG = """
kubelet-directory = "{kubelet}"
cdi-directory = "{directory}/cdi"
reconcile-seconds = 1
[[resource]]
name = "{resource}"
paths = ["/dev/disk/by-id/vmplug-*"]
"""
_WITH_NAMES = 'mount -t tmpfs tmpfs /run; mkdir /run/udev; ln -s "$0" /run/udev/data; exec "$@"'


class DevicePlugin:
    """One of a kubelet's directory. `disks` are the nodes of what it offers, by their names."""

    def __init__(self, directory: Path, kubelet: Path, disks: Mapping[str, Path]) -> None:
        self.directory = directory
        self._names = directory / "udev"
        self._names.mkdir(parents=True)
        for name, node in disks.items():
            number = node.stat().st_rdev
            text = f"S:disk/by-id/{name}\n"
            (self._names / f"b{os.major(number)}:{os.minor(number)}").write_text(text)
        config = directory / "device-plugin.toml"
        words = {"directory": directory, "kubelet": kubelet, "resource": RESOURCE}
        config.write_text(_CONFIG.format(**words))
        self._options = ["--config", str(config), "--state-dir", f"{directory}/state"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; what it says is below `directory`."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._words(), stdout=log, stderr=log)

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, and wait for its end."""
        if self._process:
            self._process.send_signal(number)
            self._process.wait(TIMEOUT_S)
            self._process = None

    def status(self) -> dict[str, Any]:
        """What `vmplug device-plugin status` says of each device, by its ID."""
        done = subprocess.run(
            [*self._words("status"), "--json"], check=True, capture_output=True, timeout=TIMEOUT_S
        )
        return {device["id"]: device for device in json.loads(done.stdout)["devices"]}

    def log(self) -> str:
        """All that it has said."""
        return (self.directory / "log").read_text()

    def wait_for(self, device: str, **wanted: object) -> None:
        """Wait until a device has this status."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            found = self.status()[device]
            if wanted.items() <= found.items():
                return
            assert time.monotonic() < deadline, (found, self.log())
            time.sleep(POLL_S)

    def _words(self, *verb: str) -> list[str | Path]:
        alone: list[str | Path] = ["unshare", "--mount", "--propagation", "private"]
        alone += ["sh", "-c", _WITH_NAMES, self._names]
        return [*alone, VMPLUG, "device-plugin", *verb, *self._options]
