"""A program that does not run yet says the same as when it runs."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.support.vm import start_vm
from vmplug.hypervisor.qemu.abilities import of_program
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.machine import BINARY, Machine

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("machine", Machine)
def test_a_program_can_what_it_can_once_it_runs(machine: Machine, tmp_path: Path) -> None:
    program = BINARY[machine]
    told = of_program(program)
    with (
        start_vm(tmp_path, machine=machine, guest=False, paused=True, qemu=program) as vm,
        closing(Qemu.connect(str(vm.qmp_path))) as running,
    ):
        assert told.reconnect_ms == running.abilities.reconnect_ms
        assert told.iommufd == running.abilities.iommufd
        assert told.vf_token == running.abilities.vf_token
