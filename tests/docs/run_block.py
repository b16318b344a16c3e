"""Run blocks in their scene, in a root of their own: `run_block.py SCENE`, with them on stdin.

The exit status is 0 when each command ended as the page says, and printed that.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.docs.blocks import PROJECT, Block, commands
from tests.docs.printed import is_as_printed

SCENES = PROJECT / "tests/docs/scenes.sh"
DEADLINE_S = 400.0
FAILURES = ("vmplug: ", " error ", "refused")
"""What a page shows of a command that fails."""

STATE = Path("/run/block")


def main(name: str) -> int:
    """The exit status for the blocks that stdin has."""
    blocks = [Block(**values) for values in json.load(sys.stdin)]
    STATE.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{PROJECT}/src:{PROJECT}",
        "PROJECT": str(PROJECT),
        "HOME": "/root",
        "EDITS": str(STATE / "edits"),
        "LOOPS": str(STATE / "loops"),
    }
    for key in ("EDITS", "LOOPS"):
        Path(environment[key]).touch()
    try:
        bash(f". {SCENES}; {name}", environment, check=True)
        edits = [line.split("\t") for line in (STATE / "edits").read_text().splitlines()]
        return max(run(block, dict(edits), environment) for block in blocks)
    finally:
        bash(f". {SCENES}; clean_up", environment, check=True)


def run(block: Block, edits: Mapping[str, str], environment: Mapping[str, str]) -> int:
    """The exit status of the block."""
    match block.language:
        case "python":
            Path("block.py").write_text(edited(block.text, edits))
            return show(f"{sys.executable} block.py", "", environment)
        case "json":
            Path("bundle").mkdir(exist_ok=True)
            Path("bundle/config.json").write_text(block.text)
            return show("vmplug info bundle/", "...\n", environment)
        case "toml":
            Path("policy.toml").write_text(block.text)
            return show(
                "vmplug check --device c:1:3:/dev/null --policy policy.toml", "...", environment
            )
        case _:
            return max(
                show(edited(command, edits), edited(output, edits), environment)
                for command, output in commands(block)
            )


def edited(text: str, edits: Mapping[str, str]) -> str:
    """With what the scene has for the names of the page."""
    for old, new in edits.items():
        text = text.replace(old, new)
    return text


def show(command: str, said: str, environment: Mapping[str, str]) -> int:
    """Run one command; 0 if it ended and printed as the page says."""
    done = bash(command, environment)
    fails = any(word in said for word in FAILURES)
    is_right = bool(done.returncode) == fails and (not said or is_as_printed(said, done.stdout))
    print(f"# {command}\n{done.stdout}", end="")
    if not is_right:
        print(f"--> status {done.returncode}; the page says:\n{said}")
    return 0 if is_right else 1


def bash(
    command: str, environment: Mapping[str, str], *, check: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run a line of shell; its errors are a part of what it prints."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=DEADLINE_S,
        check=False,
    )
    if check and done.returncode:
        print(f"{command} failed:\n{done.stdout}")
        sys.exit(1)
    return done


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
