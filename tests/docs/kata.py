"""The sandbox of Kata Containers in docs/restart.md: its QEMU with a disk, and what Kata saved."""

import subprocess
from pathlib import Path

from tests.support.disks import disk_image
from tests.support.kata import block, device, plug_commands, write_sandbox
from tests.support.raw_qmp import RawQmp

DISK, COUNTED, DETACHED = "0123456789abcdef", "fedcba9876543210", "00000000000000b2"

QEMU = """
qemu-system-x86_64 -accel tcg -m 64 -nodefaults -display none -S -daemonize -machine q35
-device virtio-scsi-pci,id=scsi0 -qmp unix:/run/sb1/qmp.sock,server=on,wait=off
"""


def main() -> None:
    """Start and write it."""
    for directory in ("/images", "/run/sb1"):
        Path(directory).mkdir(exist_ok=True)
    image = str(disk_image(Path("/images/k.img"), 8, "katas"))
    subprocess.run(QEMU.split(), check=True)
    front = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": 1, "lun": 2}
    with RawQmp.connect(Path("/run/sb1/qmp.sock")) as qmp:
        for command, arguments in plug_commands(image, front, device_id=DISK):
            qmp.execute(command, arguments)
    write_sandbox(
        Path("/run/vc/sbs/5a1f"),
        block(image, name=DISK, SCSIAddr="1:2"),
        {**device("generic"), "ID": COUNTED},
        {**block("/dev/sdz", name=DETACHED), "AttachCount": 0},
        holds={"ctr9": [(DISK, "/dev/xvda")]},
    )


if __name__ == "__main__":
    main()
