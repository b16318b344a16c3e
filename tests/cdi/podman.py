"""podman, as far as the config.json that it makes: the OCI runtime that it gets keeps that.

In a mount namespace of its own, in which /run is empty but for the specs. podman runs no
container, needs no network, image or cgroup, and leaves nothing.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

_RUNTIME = """#!/bin/sh
for argument; do
    [ "$previous" != --bundle ] || cp "$argument/config.json" '{kept}'
    previous=$argument
done
exit 1
"""
_ALONE = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/lock /run/cdi
cp "$1"/* /run/cdi
shift
exec "$@"
"""
_NAMESPACE = ("unshare", "--mount", "--propagation", "private")
_ID = re.compile(rb"[0-9a-f]{64}")
_TIMEOUT_S = 120


def make_config(folder: Path, specs: Mapping[str, str], devices: Sequence[str]) -> dict[str, Any]:
    """The config that podman makes for a container with these devices; the error is its own."""
    kept, rootfs, given = folder / "config.json", folder / "rootfs", folder / "specs"
    for each in (rootfs, given):
        each.mkdir(parents=True)
    for name, text in specs.items():
        (given / name).write_text(text)
    runtime = folder / "crun"  # podman asks one of another name for cgroups
    runtime.write_text(_RUNTIME.format(kept=kept))
    runtime.chmod(0o755)
    stores = {"--root": folder / "store", "--runroot": "/run/pod", "--tmpdir": "/run/pod-tmp"}
    options = [str(word) for option in stores.items() for word in option]
    options += ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]
    options += ["--events-backend", "none", "--runtime", str(runtime)]
    container = ["--network", "none", "--cgroups", "disabled", "--hostname", "host", "--name", "c"]
    container += [word for device in devices for word in ("--device", device)]
    podman = ["podman", *options, "run", *container, "--rootfs", str(rootfs), "true"]
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _ALONE,
            "sh",
            given,
            *podman,
        ],
        check=False,
        capture_output=True,
        env=os.environ | {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1"},
        text=True,
        timeout=_TIMEOUT_S,
    )
    if not kept.exists():
        raise AssertionError(done.stderr)
    made = _ID.sub(b"ID", kept.read_bytes()).replace(bytes(folder), b"FOLDER")
    config: dict[str, Any] = msgspec.json.decode(made)
    config["annotations"].pop("io.kubernetes.cri-o.Created", None)
    return config
