"""What the command line of a QEMU says that another program starts."""

from pathlib import Path

import pytest

from vmplug.errors import HypervisorError, SpecError
from vmplug.hypervisor.qemu.abilities import of_program
from vmplug.hypervisor.qemu.start.foreign import ForeignMachine, QemuCommand

MEMFD = "memory-backend-memfd,id=mem,size=1G"
FILE = "memory-backend-file,id=mem,size=1G,mem-path=/dev/shm/a"
JSON = '{"qom-type":"memory-backend-file","id":"mem","share":true}'
RAM = "memory-backend-ram,id=mem,size=1G,share=on"
SHM = "memory-backend-shm,id=mem,size=1G"
BACKED = ("-machine", "q35,memory-backend=mem", "-object")


@pytest.mark.parametrize(
    ("said", "machine"),
    [
        ("q35", ForeignMachine.Q35),
        ("pc-q35-7.2,accel=kvm", ForeignMachine.Q35),
        ("type=q35", ForeignMachine.Q35),
        ("accel=kvm,type=q35", ForeignMachine.Q35),
        ("accel=kvm -M q35", ForeignMachine.Q35),
        ("q35 --enable-kvm", ForeignMachine.Q35),
        ("dumpdtb=/a,,b=c,accel=kvm,type=q35", ForeignMachine.Q35),
        ("pc", ForeignMachine.PC),
        ("pc-i440fx-10.0", ForeignMachine.PC),
        ("microvm,acpi=on", ForeignMachine.MICROVM),
    ],
)
def test_a_machine_is_known_by_every_name_of_it(said: str, machine: ForeignMachine) -> None:
    command = QemuCommand.read(["qemu-system-x86_64", "-M", *said.split()])
    assert command.kind is machine
    assert command.has_kvm is ("kvm" in said)


@pytest.mark.parametrize("said", ["virt", "none", "isapc", "q350", "", "s390-ccw-virtio"])
def test_another_machine_is_refused(said: str) -> None:
    with pytest.raises(SpecError, match="no words for this machine"):
        QemuCommand(machine=said)


def test_a_command_must_say_its_machine() -> None:
    with pytest.raises(SpecError, match="does not say -machine"):
        QemuCommand.read(["sh", "-c", "exec qemu-system-x86_64 -machine q35"])


@pytest.mark.parametrize(
    ("said", "size_bytes", "slots", "most_bytes"),
    [
        ("512", 512 << 20, 0, 0),
        ("2G", 2 << 30, 0, 0),
        ("size=64m", 64 << 20, 0, 0),
        ("256M,slots=2,maxmem=1G", 256 << 20, 2, 1 << 30),
        ("slots=2,maxmem=1G", 128 << 20, 2, 1 << 30),
        ("slots=2,maxmem=1G -m 256M", 256 << 20, 2, 1 << 30),
        ("256M -m slots=2,maxmem=1G", 256 << 20, 2, 1 << 30),
        ("128M,slots=2,maxmem=1G -m 256", 256 << 20, 2, 1 << 30),
        ("1.5G", 1536 << 20, 0, 0),
        ("100001k", 102408192, 0, 0),
        ("0.1G", 107380736, 0, 0),
    ],
)
def test_memory_is_what_m_says(said: str, size_bytes: int, slots: int, most_bytes: int) -> None:
    command = QemuCommand.read(["-machine", "q35", "-m", *said.split()])
    known = command.memory_bytes, command.memory_slots, command.most_bytes
    assert known == (size_bytes, slots, most_bytes)


@pytest.mark.parametrize("said", ["much", "-1", "1X", "1G,slots=few"])
def test_memory_that_is_not_a_size_is_refused(said: str) -> None:
    with pytest.raises(SpecError, match="not a size"):
        QemuCommand(machine="q35", memory=said)


@pytest.mark.parametrize(
    ("words", "shared", "can_share"),
    [
        (("-machine", "q35"), False, True),
        ((*BACKED, MEMFD), True, True),
        ((*BACKED, f"{MEMFD},share=off"), False, False),
        ((*BACKED, FILE), False, False),
        ((*BACKED, f"{FILE},share=on"), True, True),
        ((*BACKED, JSON), True, True),
        ((*BACKED, "{"), False, False),
        ((*BACKED, '{"qom-type":"memory-backend-memfd","id":"mem","share":[]}'), False, False),
        ((*BACKED, '{"qom-type":"memory-backend-memfd","id":["mem"]}'), False, False),
        ((*BACKED, "[]"), False, False),
        ((*BACKED, f"{FILE},,share=on"), False, False),
        ((*BACKED, RAM), False, False),
        ((*BACKED, SHM), True, True),
        (("-machine", "q35", "-mem-path", "/dev/hugepages"), False, False),
        (("-machine", "q35,memory-backend=mem"), False, False),
        (("-M", "q35", "-numa", "node,memdev=mem", "-object", MEMFD), True, True),
        (("-M", "q35", "-numa", "node,memdev=mem", "-object", FILE), False, False),
        (("-M", "q35", "-machine", "memory-backend=mem", "-object", MEMFD), True, True),
    ],
)
def test_memory_is_shared_where_all_of_it_is(
    words: tuple[str, ...], *, shared: bool, can_share: bool
) -> None:
    command = QemuCommand.read(["qemu-system-x86_64", *words])
    assert (command.shared_memory, command.can_share) == (shared, can_share)


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (("qemu-system-x86_64",), "qemu-system-x86_64"),
        (("numactl", "-N", "0", "/opt/bin/qemu-system-x86_64"), "/opt/bin/qemu-system-x86_64"),
        (("my-launcher",), "qemu-system-x86_64"),
    ],
)
def test_the_program_is_the_first_that_is_called_so(words: tuple[str, ...], program: str) -> None:
    assert QemuCommand.read([*words, "--machine", "q35"]).program == program


def test_a_program_that_reports_nothing_is_an_error_whatever_it_is_called(tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(HypervisorError, match="does not report its abilities"):
        _ = of_program(str(program)).iommufd
