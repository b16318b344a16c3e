"""KVM where it runs a guest, else TCG.

That /dev/kvm opens, and that QEMU starts with it, proves nothing: a KVM that emulates, as some
clouds have it, runs a guest a hundred times slower than TCG, so that it seems to hang. Only a
guest proves it: one that counts, and ends QEMU by itself within a deadline.
"""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from vmplug.errors import AttributeReadError
from vmplug.host.program import program_environment, run_program
from vmplug.host.root import HostRoot
from vmplug.waiting import waiting

ACCELS = AUTO, KVM, TCG = "auto", "kvm", "tcg"
PROBE_TIMEOUT_S = 10.0
"""QEMU and the guest take 0.3 s with TCG, 0.6 on a busy machine; more than 60 with a bad KVM."""
_END_TIMEOUT_S = 5.0
_KILLED = {None, -signal.SIGKILL, 128 + signal.SIGKILL}
"""timeout(1) kills itself, too, where it can."""
_REFUSAL_KEPT_S = 3600.0
"""A machine may have been too busy for a moment; it should not do without KVM until it boots."""
_FILE = "kvm.json"
_KVM = "/dev/kvm"
_ROM_BYTES = 64 << 10


class Accel(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator, and why it is not KVM; None where that is not known or not so."""

    name: str
    why_not_kvm: str | None = None


class _Guest(msgspec.Struct, frozen=True):
    """A guest that counts to ten million and ends QEMU with this status."""

    words: tuple[str, ...]
    image: bytes
    status: int


def _x86() -> _Guest:
    """Firmware that counts in 32-bit protected mode, where every KVM runs natively.

    It runs below 1 MiB, where the last 64 KiB of the firmware are, too.
    """
    counts = bytes.fromhex(
        "2e 66 0f 01 16 d8 ff"  # ffa0: lgdtl %cs:0xffd8
        "0f 20 c0 0c 01 0f 22 c0"  # mov %cr0,%eax; or $1,%al; mov %eax,%cr0
        "66 ea b7 ff 0f 00 08 00"  # ljmpl $8,$0xfffb7
        "b9 80 96 98 00"  # fffb7: mov $10000000,%ecx
        "49 75 fd"  # 1: dec %ecx; jnz 1b
        "b0 2a e6 f4"  # mov $42,%al; out %al,$0xf4
        "f4 eb fd 66 90"  # 2: hlt; jmp 2b
        "00 00 00 00 00 00 00 00 ff ff 00 00 00 9b cf 00"  # ffc8: no segment; flat 32-bit code
        "0f 00 c8 ff 0f 00"  # ffd8: the limit and the address of these
    )
    starts = bytes.fromhex("eb ae")  # fff0: jmp 0xffa0
    image = counts.rjust(0xFFA0 + len(counts), b"\0").ljust(0xFFF0, b"\0") + starts
    words = ("-machine", "q35", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios")
    return _Guest(words, image.ljust(_ROM_BYTES, b"\0"), status=42 << 1 | 1)


def _s390x() -> _Guest:
    """A kernel that counts and waits with interrupts disabled, which is the end of a guest.

    Source: QEMU target/s390x/helper.c, s390_handle_wait.
    """
    image = bytes.fromhex(
        "c0 2f 00 98 96 80"  # 10000: llilf %r2,10000000
        "a7 26 00 00"  # brct %r2,.
        "c0 10 00 00 00 0b"  # larl %r1,0x10020
        "b2 b2 10 00"  # lpswe 0(%r1)
        "00 00 00 00 00 00 00 00 00 00 00 00"
        "00 02 00 01 80 00 00 00 00 00 00 00 00 00 0f ff"  # 10020: wait
    )
    return _Guest(("-machine", "s390-ccw-virtio", "-kernel"), image, status=0)


_GUESTS = {"qemu-system-x86_64": _x86, "qemu-system-s390x": _s390x}


def choose_accel(program: str, state_dir: Path, host: HostRoot) -> Accel:
    """KVM if this QEMU runs a guest with it here.

    The answer of a guest is kept in `state_dir` for this boot, QEMU and /dev/kvm; a refusal for an
    hour of them. A `state_dir` that cannot be written only forgets it.
    """
    node = host.stat_or_none(_KVM)
    if node is None:
        return Accel(name=TCG, why_not_kvm=f"this host has no {_KVM}")
    try:
        os.close(host.open_node(_KVM))
    except AttributeReadError as error:
        refused = os.strerror(error.errno or 0)
        return Accel(name=TCG, why_not_kvm=f"{_KVM} cannot be opened: {refused}")
    binary = shutil.which(program, path=program_environment()["PATH"])
    status = host.stat_or_none(os.path.realpath(binary)) if binary else None
    boot = (host.read_text("/proc/sys/kernel/random/boot_id") or "-").strip()
    key = f"{boot} {program} {_identity(status)} {_KVM} {_identity(node)}"
    verdicts, now = _read(state_dir / _FILE), time.clock_gettime(time.CLOCK_BOOTTIME)
    verdict = verdicts.get(program)
    if verdict is None or verdict.key != key or not verdict.holds(now):
        with waiting("KVM to run a small guest", PROBE_TIMEOUT_S):
            why = why_not(program, KVM, timeout_s=PROBE_TIMEOUT_S)
        verdict = _Verdict(key=key, at=now, why_not_kvm=why)
        _write(state_dir / _FILE, {**verdicts, program: verdict})
    why = verdict.why_not_kvm
    return Accel(name=TCG if why else KVM, why_not_kvm=why)


def why_not(program: str, accel: str, *, timeout_s: float) -> str | None:
    """Why this QEMU runs no guest with that accelerator; None if it does."""
    from tempfile import NamedTemporaryFile  # noqa: PLC0415  4 ms

    guest = _GUESTS[program]()
    with NamedTemporaryFile(prefix="vmplug-") as image:
        image.write(guest.image)
        image.flush()
        words = ["-accel", accel, "-cpu", "host" if accel == KVM else "max", "-m", "32M"]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        # timeout(1) ends QEMU also after this process was killed.
        limit = ["timeout", "--signal=KILL", f"{timeout_s:g}", program]
        ended = run_program(
            [*limit, *words, *guest.words, image.name], timeout_s=timeout_s + _END_TIMEOUT_S
        )
    if ended.status == guest.status:
        return None
    if ended.status in _KILLED:
        return f"a guest that counts to ten million did not end within {timeout_s:g} s"
    return ended.complaint


class _Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a guest; `at` is in seconds after boot."""

    key: str
    at: float
    why_not_kvm: str | None

    def holds(self, now: float) -> bool:
        """Whether it needs no other guest."""
        return self.why_not_kvm is None or now - self.at < _REFUSAL_KEPT_S


def _identity(status: os.stat_result | None) -> str:
    """Another file, other rights to it, or a module that was loaded again have another one."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_ctime_ns}" if status else "-"


def _read(file: Path) -> dict[str, _Verdict]:
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(file.read_bytes(), type=dict[str, _Verdict])
    return {}


def _write(file: Path, verdicts: dict[str, _Verdict]) -> None:
    """Half a file, as on a full disk, is as none."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with suppress(OSError), open(os.open(file, flags, 0o600), "wb") as new:
        new.write(msgspec.json.encode(verdicts))
