"""Ask a QEMU for its abilities: its version number proves nothing.

vmplug asks only when a step depends on the answer.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from vmplug.cached import cached_property
from vmplug.drivers.ports import VF_UUID, Command
from vmplug.errors import CommandError, HypervisorError
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.host.program import run_program
from vmplug.hypervisor.qemu.start.machine import PACKAGE
from vmplug.hypervisor.qmp.schema import validate_reply

IOMMUFD = "iommufd"
RECONNECT, RECONNECT_MS = "reconnect", "reconnect-ms"
"""How often a chardev tries to connect again, in seconds and in milliseconds."""
_TIMEOUT_S = 30.0
_NO_MACHINE = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none")


class Abilities(Protocol):
    """The abilities that the steps of a plug depend on. Asking raises HypervisorError."""

    @property
    def reconnect_ms(self) -> bool:
        """Whether a chardev takes `reconnect-ms`; one that does not takes `reconnect`."""

    @property
    def iommufd(self) -> bool:
        """Whether there are iommufd objects."""

    @property
    def vf_token(self) -> bool:
        """Whether a vfio-pci device takes a VF token."""


class QueriedAbilities(Abilities):
    """Abilities of a QEMU that `execute` sends commands to; each is asked once at most."""

    def __init__(self, execute: Callable[[Command], Any]) -> None:
        self._execute = execute

    @cached_property
    def reconnect_ms(self) -> bool:
        """See Abilities.

        chardev-add and -chardev got it together; QEMU describes -chardev within 2 ms, the schema
        of chardev-add takes 40. A test makes sure that chardev-add takes it.
        """
        described = self._execute(Command("query-command-line-options", {"option": "chardev"}))
        return any(
            parameter["name"] == RECONNECT_MS
            for option in described
            for parameter in option["parameters"]
        )

    @cached_property
    def iommufd(self) -> bool:
        """See Abilities. QEMU 8.2 and later have the type."""
        return bool(self._execute(Command("qom-list-types", {"implements": IOMMUFD})))

    @cached_property
    def vf_token(self) -> bool:
        """See Abilities. QEMU 8.1 and later have the property."""
        asked = Command("device-list-properties", {"typename": VFIODeviceType.NORMAL.value})
        try:
            return any(entry["name"] == VF_UUID for entry in self._execute(asked))
        except CommandError:  # a QEMU without VFIO
            return False


def of_program(program: str) -> Abilities:
    """The abilities of a QEMU that is not running yet; asking takes 70 ms."""
    return QueriedAbilities(partial(_ask_program, program))


def has_firmware(program: str, name: str) -> bool:
    """Whether the program finds a firmware file of that name."""
    found = run_program([program, "-L", "help"], timeout_s=_TIMEOUT_S)
    return any(os.path.isfile(os.path.join(path, name)) for path in found.stdout.splitlines())


def _ask_program(program: str, command: Command) -> Any:
    """Start the program without a machine, let it answer one command, and end it."""
    asked = [Command("qmp_capabilities", {}), command, Command("quit", {})]
    lines = [json.dumps({"execute": c.execute, "arguments": dict(c.arguments)}) for c in asked]
    finished = run_program(
        [program, *_NO_MACHINE, "-qmp", "stdio"], timeout_s=_TIMEOUT_S, stdin="\n".join(lines)
    )
    try:
        said = [json.loads(line) for line in finished.stdout.splitlines()]
        _, answer, _ = [words["return"] for words in said if "return" in words]
    except ValueError:  # not these three answers, or no JSON
        raise HypervisorError(
            f"{program} does not report its abilities: {finished.complaint}",
            hint=f"on Debian: apt install {PACKAGE.get(program, 'qemu-system')}",
        ) from None
    return validate_reply(command, answer)
