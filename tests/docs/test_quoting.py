"""How docker and podman read the annotations that docs/devices.md shows."""

import csv
import json
import re
import shlex

import pytest

from tests.docs.blocks import PROJECT

PAGE = (PROJECT / "docs/devices.md").read_text()


def annotation_of(engine: str) -> str:
    """The word after `--annotation`, as a shell passes it on."""
    line = re.search(rf"(?m)^{engine} run .*$", PAGE)
    assert line
    _, _, option, value, _ = shlex.split(line[0])
    assert option == "--annotation"
    return value


def read_by(engine: str) -> list[str]:
    """What the engine makes of it.

    Source: podman cmd/podman/common/create.go, StringSliceVar: one line of CSV. Docker
    cli/command/container/opts.go, NewMapOpts: the text as it is.
    """
    value = annotation_of(engine)
    return next(csv.reader([value])) if engine == "podman" else [value]


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_an_engine_reads_one_annotation_of_json(engine: str) -> None:
    (annotation,) = read_by(engine)
    key, _, value = annotation.partition("=")
    assert key == "org.vmplug.share.work"
    assert json.loads(value) == {"source": "/srv/work", "read-only": True}
