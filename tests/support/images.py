"""Images of containers that tests run: one layer, of the files that a test names."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_image(path: Path, name: str, files: Mapping[str, bytes], command: list[str]) -> Path:
    """Write an image with these programs, as `docker save` writes it."""
    layer = _archive(files, mode=0o755)
    digest = hashlib.sha256(layer).hexdigest()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    made = {"architecture": "amd64", "os": "linux", "config": {"Cmd": command}, "rootfs": rootfs}
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    parts = {
        "config.json": json.dumps(made).encode(),
        "layer.tar": layer,
        "manifest.json": json.dumps(manifest).encode(),
    }
    path.write_bytes(_archive(parts, mode=0o644))
    return path


def _archive(files: Mapping[str, bytes], mode: int) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
    return written.getvalue()
