"""CDI: a host with 1 000 devices in 20 files, read and validated."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.timing import Ratio, compare, scaled
from vmplug import cdi

_FILES = 20


def rows() -> Iterator[Ratio]:
    """Every file of a directory, against `json.loads` of the same text."""
    with TemporaryDirectory(prefix="vmplug-bench-", dir="/dev/shm") as name:
        directory = Path(name)
        count = scaled(1000)
        texts = [_text(number, count // _FILES or 1) for number in range(_FILES)]
        for number, text in enumerate(texts):
            (directory / f"{number}.json").write_text(text)
        yield compare(
            f"{count} CDI devices, read and validated / json.loads of their text",
            lambda: cdi.read_directories([directory]),
            lambda: [json.loads(text) for text in texts],
            lambda registry, documents: (
                len(registry.devices) == sum(len(each["devices"]) for each in documents)
            ),
            target=3.0,
            size=(31, 3),
        )


def _text(number: int, count: int) -> str:
    devices = [_device(number, index) for index in range(count)]
    spec = {"cdiVersion": "0.5.0", "kind": f"vendor.com/class{number}", "devices": devices}
    return json.dumps({**spec, "containerEdits": {"env": ["VENDOR=1"]}}, indent=2)


def _device(number: int, index: int) -> dict[str, object]:
    node = {"path": f"/dev/vfio/{index}", "type": "c", "major": 240, "minor": index}
    mount = {"hostPath": f"/run/v/{index}", "containerPath": f"/run/v/{index}", "options": ["ro"]}
    edits = {
        "env": [f"DEVICE_{index}=/dev/vfio/{index}"],
        "deviceNodes": [node],
        "mounts": [mount],
    }
    return {"name": f"0000:{index:02x}:{number:02x}.0", "containerEdits": edits}
