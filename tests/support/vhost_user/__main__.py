"""The command line of the backend."""

import argparse
import logging
import socket
import sys
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path

from tests.support.vhost_user.net import NetDevice, Subnet
from tests.support.vhost_user.scsi import Disk, ScsiDevice
from tests.support.vhost_user.session import Device, Talk, converse, fall_silent, hang_up, serve


def main() -> None:
    """Serves until it is killed; says one line `listening on SOCKET` when it does."""
    arguments = _parser().parse_args()
    level = logging.DEBUG if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    with ExitStack() as stack:
        device = _device(arguments, stack)
        listener = stack.enter_context(_listen(arguments.socket))
        sys.stdout.write(f"listening on {arguments.socket}\n")
        sys.stdout.flush()
        serve(listener, _talk(arguments, device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.vhost_user",
        description="Serve a vhost-user device to one QEMU after another.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    net = kinds.add_parser("net", help="a network that answers ARP and ping")
    _add_common(net)
    net.add_argument("--subnet", type=IPv4Network, default=IPv4Network("192.0.2.0/24"))
    net.add_argument(
        "--mac", type=_mac, default=_mac("02:00:00:00:be:ef"), help="of all its hosts"
    )
    scsi = kinds.add_parser("scsi", help="a SCSI adapter with one disk")
    _add_common(scsi)
    scsi.add_argument("image", type=Path, metavar="IMAGE", help="a file, or a block device")
    scsi.add_argument("--serial", help="of the disk; without it, the name of the image")
    scsi.add_argument("--read-only", action="store_true")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("socket", type=Path, metavar="SOCKET", help="replaced if it is there")
    parser.add_argument("--verbose", action="store_true", help="log every message")
    bad = parser.add_mutually_exclusive_group()
    bad.add_argument(
        "--answers", type=int, metavar="N", help="fall silent after N messages of each client"
    )
    bad.add_argument("--hang-up", action="store_true", help="close each connection at once")


def _mac(text: str) -> bytes:
    mac = bytes.fromhex(text.replace(":", " "))
    if len(mac) != 6:
        raise ValueError(f"not a MAC address: {text}")
    return mac


def _device(arguments: argparse.Namespace, stack: ExitStack) -> Device:
    if arguments.kind == "net":
        return NetDevice(Subnet(arguments.subnet, arguments.mac))
    image: Path = arguments.image
    serial = image.name if arguments.serial is None else arguments.serial
    disk = Disk.open(image, serial=serial, writable=not arguments.read_only)
    stack.callback(disk.close)
    return ScsiDevice(disk)


def _talk(arguments: argparse.Namespace, device: Device) -> Talk:
    if arguments.hang_up:
        return hang_up
    if arguments.answers is not None:
        return partial(fall_silent, device=device, after=arguments.answers)
    return partial(converse, device=device)


def _listen(path: Path) -> socket.socket:
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
