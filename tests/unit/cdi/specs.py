"""Specs of one device, and directories of them."""

import json
from pathlib import Path

import yaml


def spec_text(
    edits: str, *, version: str = "0.5.0", name: str = "dev", as_json: bool = False
) -> str:
    """A spec of `vendor.com/class` that has one device with these edits."""
    text = (
        f"{{cdiVersion: {version}, kind: vendor.com/class,"
        f" devices: [{{name: {name}, containerEdits: {edits}}}]}}"
    )
    return json.dumps(yaml.safe_load(text)) if as_json else text


def write_specs(directory: Path, **texts: str) -> Path:
    """A directory with a file NAME.yaml for each."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory
