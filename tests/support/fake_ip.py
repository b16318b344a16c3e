"""fake_ip: an ip(8) that knows one interface with virtual functions, for hosts that are trees.

It says what iproute2 6.1 says of an interface of netdevsim on Linux 6.1.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = """\
#!{python} -IS
import json, sys
state = json.load(open({state!r}))
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(words) + "\\n")
def refuse(message, status=2):
    print(message, file=sys.stderr)
    sys.exit(status)
if words[:4] == ["-json", "link", "show", "dev"]:
    if words[4] != state["ifname"]:
        refuse(f'Device "{{words[4]}}" does not exist.', 1)
    print(json.dumps([state]) if not state.get("broken") else "nonsense")
elif words[:3] == ["link", "set", "dev"] and words[4] == "vf":
    (number, what, value), functions = words[5:8], state["vfinfo_list"]
    if what in state["unsupported"]:
        refuse("RTNETLINK answers: Operation not supported")
    if what not in state["ignored"]:
        entry = functions[int(number)]
        if what == "mac":
            entry["address"] = value
        elif what == "vlan":
            entry["vlan_list"] = [{{"vlan": int(value)}} if int(value) else {{}}]
        else:
            entry["trust"] = value == "on"
        json.dump(state, open({state!r}, "w"))
else:
    refuse(f"Command line is not understood: {{words}}")
"""


@dataclass(frozen=True, slots=True)
class FakeIp:
    """The program's directory, and what it keeps there."""

    directory: Path

    @property
    def _state(self) -> Path:
        return self.directory / "state.json"

    def commands(self) -> list[str]:
        """What it was told to change, in order."""
        log = self.directory / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith("link set")]

    def functions(self) -> list[dict[str, Any]]:
        """What the virtual functions were told."""
        found: list[dict[str, Any]] = json.loads(self._state.read_text())["vfinfo_list"]
        return found

    def set(self, **values: object) -> None:
        """Change what it knows: `unsupported` and `ignored` settings, `broken`."""
        state = json.loads(self._state.read_text())
        self._state.write_text(json.dumps({**state, **values}))


def fake_ip(directory: Path, interface: str, count: int) -> FakeIp:
    """An ip for an interface with `count` virtual functions."""
    directory.mkdir(parents=True)
    ip = FakeIp(directory)
    entries = [
        {
            "vf": number,
            "link_type": "ether",
            "address": "00:00:00:00:00:00",
            "broadcast": "ff:ff:ff:ff:ff:ff",
            "vlan_list": [{}],
            "rate": {"max_tx": 0, "min_tx": 0},
            "spoofchk": False,
            "link_state": "auto",
            "trust": False,
            "query_rss_en": False,
        }
        for number in range(count)
    ]
    state = {"ifname": interface, "vfinfo_list": entries, "unsupported": [], "ignored": []}
    (directory / "state.json").write_text(json.dumps(state))
    program = directory / "ip"
    program.write_text(
        PROGRAM.format(
            python=sys.executable,
            state=str(directory / "state.json"),
            log=str(directory / "log"),
        )
    )
    program.chmod(0o755)
    return ip
