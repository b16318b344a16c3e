"""A SCSI host adapter with one disk, at target 0, LUN 0, whose content is an image file.

Source: Virtual I/O Device (VIRTIO) 1.2, section 5.6; SPC-4 and SBC-3 for what the disk says.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.vhost_user.messages import ProtocolError
from tests.support.vhost_user.virtqueue import Chain, Virtqueue

BLOCK_BYTES = 512

CONTROL_QUEUE = 0
EVENT_QUEUE = 1
REQUEST_QUEUES = 1

VIRTIO_SCSI_S_OK = 0
VIRTIO_SCSI_S_BAD_TARGET = 3
VIRTIO_SCSI_T_TMF = 0

COMMAND_REQUEST = struct.Struct("<8sQBBB32s")
"""virtio_scsi_cmd_req: lun, id, task_attr, prio, crn, cdb."""

COMMAND_RESPONSE = struct.Struct("<IIHBB96s")
"""virtio_scsi_cmd_resp: sense_len, residual, status_qualifier, status, response, sense."""

TASK_MANAGEMENT_RESPONSE = struct.pack("<B", VIRTIO_SCSI_S_OK)
NOTIFICATION_RESPONSE = struct.pack("<IB", 0, VIRTIO_SCSI_S_OK)

GOOD = 0x00
CHECK_CONDITION = 0x02

NO_SENSE = 0x0
ILLEGAL_REQUEST = 0x5
DATA_PROTECT = 0x7

NO_ADDITIONAL_SENSE = 0x0000
INVALID_COMMAND_OPERATION_CODE = 0x2000
LBA_OUT_OF_RANGE = 0x2100
INVALID_FIELD_IN_CDB = 0x2400
LOGICAL_UNIT_NOT_SUPPORTED = 0x2500
WRITE_PROTECTED = 0x2700
SAVING_PARAMETERS_NOT_SUPPORTED = 0x3900

VPD_SUPPORTED_PAGES = 0x00
VPD_UNIT_SERIAL_NUMBER = 0x80
MODE_PAGE_CACHING = 0x08
MODE_PAGE_ALL = 0x3F
MODE_PAGE_CONTROL_SAVED = 3
MODE_WRITE_PROTECT = 0x80
SERVICE_ACTION_READ_CAPACITY_16 = 0x10

VENDOR = b"VMPLUG  "
PRODUCT = b"TEST DISK       "
REVISION = b"1   "
ANSI_VERSION_SPC_3 = 0x05
RESPONSE_DATA_FORMAT = 0x02
COMMAND_QUEUING = 0x02
NO_SUCH_UNIT = 0x7F
"""Peripheral qualifier 3 and type 1Fh: nothing is there, nor can be."""

# Write back, so that SYNCHRONIZE CACHE means something: WCE, the third byte's bit 2.
CACHING_PAGE = bytes([MODE_PAGE_CACHING, 18, 0x04]).ljust(20, b"\0")


class SenseError(Exception):
    """A command ends with CHECK CONDITION and this sense."""

    def __init__(self, key: int, code: int) -> None:
        super().__init__(f"sense key {key:#x}, additional sense code and qualifier {code:#06x}")
        self.sense = sense_data(key, code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a command has ended."""

    status: int = GOOD
    data: bytes = b""
    sense: bytes = b""


class Disk:
    """A disk of blocks in an open file or block device; it closes the descriptor with `close`.

    The size is read anew for each command: a file that grows is a disk that grows.
    """

    def __init__(self, descriptor: int, *, serial: str, writable: bool) -> None:
        self._descriptor = descriptor
        self._serial = serial.encode()
        self._writable = writable
        self._commands: dict[int, Callable[[bytes, bytes], bytes]] = {
            0x00: _nothing,  # TEST UNIT READY
            0x03: _request_sense,
            0x08: self._read,
            0x0A: self._write,
            0x12: self._inquiry,
            0x1A: self._mode_sense_6,
            0x1B: _nothing,  # START STOP UNIT
            0x25: self._read_capacity_10,
            0x28: self._read,
            0x2A: self._write,
            0x35: self._synchronize_cache,
            0x5A: self._mode_sense_10,
            0x88: self._read,
            0x8A: self._write,
            0x91: self._synchronize_cache,
            0x9E: self._service_action_in,
            0xA0: _report_luns,
        }

    @classmethod
    def open(cls, image: Path, *, serial: str, writable: bool = True) -> "Disk":
        """A disk on an image."""
        flags = os.O_RDWR if writable else os.O_RDONLY
        return cls(os.open(image, flags | os.O_CLOEXEC), serial=serial, writable=writable)

    def close(self) -> None:
        """Closes the image."""
        os.close(self._descriptor)

    @property
    def blocks(self) -> int:
        """How many blocks there are; what is less than a block at the end is none."""
        return os.lseek(self._descriptor, 0, os.SEEK_END) // BLOCK_BYTES

    def execute(self, lun: int, cdb: bytes, data_out: bytes = b"") -> Answer:
        """Does what a command descriptor block asks of a LUN."""
        command = self._commands.get(cdb[0]) if lun == 0 else _COMMANDS_OF_NO_UNIT.get(cdb[0])
        try:
            if command is None:
                raise SenseError(
                    ILLEGAL_REQUEST,
                    LOGICAL_UNIT_NOT_SUPPORTED if lun else INVALID_COMMAND_OPERATION_CODE,
                )
            return Answer(data=command(cdb, data_out))
        except SenseError as error:
            return Answer(status=CHECK_CONDITION, sense=error.sense)

    def _inquiry(self, cdb: bytes, _: bytes) -> bytes:
        (allocation,) = struct.unpack_from(">H", cdb, 3)
        if not cdb[1] & 1:  # EVPD
            if cdb[2]:
                raise SenseError(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
            return _standard_inquiry(0)[:allocation]
        pages = {
            VPD_SUPPORTED_PAGES: bytes([VPD_SUPPORTED_PAGES, VPD_UNIT_SERIAL_NUMBER]),
            VPD_UNIT_SERIAL_NUMBER: self._serial,
        }
        page = pages.get(cdb[2])
        if page is None:
            raise SenseError(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
        return (struct.pack(">BBH", 0, cdb[2], len(page)) + page)[:allocation]

    def _read_capacity_10(self, _: bytes, __: bytes) -> bytes:
        last = min(self.blocks - 1, 0xFFFFFFFF)  # all ones: ask READ CAPACITY (16)
        return struct.pack(">II", last, BLOCK_BYTES)

    def _service_action_in(self, cdb: bytes, _: bytes) -> bytes:
        if cdb[1] & 0x1F != SERVICE_ACTION_READ_CAPACITY_16:
            raise SenseError(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
        (allocation,) = struct.unpack_from(">I", cdb, 10)
        return struct.pack(">QI20x", self.blocks - 1, BLOCK_BYTES)[:allocation]

    def _mode_sense_6(self, cdb: bytes, _: bytes) -> bytes:
        pages = _mode_pages(cdb)
        header = struct.pack(">BBBB", 3 + len(pages), 0, self._device_specific, 0)
        return (header + pages)[: cdb[4]]

    def _mode_sense_10(self, cdb: bytes, _: bytes) -> bytes:
        pages = _mode_pages(cdb)
        header = struct.pack(">HBBBBH", 6 + len(pages), 0, self._device_specific, 0, 0, 0)
        (allocation,) = struct.unpack_from(">H", cdb, 7)
        return (header + pages)[:allocation]

    @property
    def _device_specific(self) -> int:
        return 0 if self._writable else MODE_WRITE_PROTECT

    def _read(self, cdb: bytes, _: bytes) -> bytes:
        lba, count = self._extent(cdb)
        return os.pread(self._descriptor, count * BLOCK_BYTES, lba * BLOCK_BYTES)

    def _write(self, cdb: bytes, data_out: bytes) -> bytes:
        if not self._writable:
            raise SenseError(DATA_PROTECT, WRITE_PROTECTED)
        lba, count = self._extent(cdb)
        if len(data_out) < count * BLOCK_BYTES:
            raise SenseError(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
        os.pwrite(self._descriptor, data_out[: count * BLOCK_BYTES], lba * BLOCK_BYTES)
        return b""

    def _synchronize_cache(self, _: bytes, __: bytes) -> bytes:
        os.fdatasync(self._descriptor)
        return b""

    def _extent(self, cdb: bytes) -> tuple[int, int]:
        """The first block of a READ or WRITE and how many there are, checked."""
        lba, count = read_write_extent(cdb)
        if lba + count > self.blocks:
            raise SenseError(ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
        return lba, count


class ScsiDevice:
    """The host adapter in front of a disk. Nothing is ever pending when a request comes."""

    features = 0
    queue_num = virtqueues = 2 + REQUEST_QUEUES

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def serve(self, index: int, queues: list[Virtqueue]) -> None:
        """Answers requests; buffers for events are kept, as there are no events."""
        if index == EVENT_QUEUE:
            return
        answer = _answer_control if index == CONTROL_QUEUE else self._answer_command
        while chain := queues[index].pop():
            queues[index].push(chain, answer(chain))

    def _answer_command(self, chain: Chain) -> bytes:
        if len(chain.request) < COMMAND_REQUEST.size:
            raise ProtocolError(f"a command of {len(chain.request)} bytes")
        lun, _id, _attribute, _priority, _crn, cdb = COMMAND_REQUEST.unpack_from(chain.request)
        if lun[:2] != b"\x01\x00":  # always 1, then the target
            return COMMAND_RESPONSE.pack(0, 0, 0, GOOD, VIRTIO_SCSI_S_BAD_TARGET, b"")
        # A single-level LUN: flat addressing has 01b in the upper two bits.
        data_out = chain.request[COMMAND_REQUEST.size :]
        done = self._disk.execute(int.from_bytes(lun[2:4], "big") & 0x3FFF, cdb, data_out)
        room = chain.room_bytes - COMMAND_RESPONSE.size
        data = done.data[: max(room, 0)]
        response = COMMAND_RESPONSE.pack(
            len(done.sense), room - len(data), 0, done.status, VIRTIO_SCSI_S_OK, done.sense
        )
        return response + data


def read_write_extent(cdb: bytes) -> tuple[int, int]:
    """The first block of a READ or WRITE of 6, 10 or 16 bytes, and how many there are."""
    match cdb[0] >> 5:
        case 0:
            lba = int.from_bytes(cdb[1:4], "big") & 0x1FFFFF
            count = cdb[4] or 256
        case 1:
            lba, count = struct.unpack_from(">IxH", cdb, 2)
        case _:
            lba, count = struct.unpack_from(">QI", cdb, 2)
    return lba, count


def sense_data(key: int, code: int) -> bytes:
    """Sense in the fixed format: a current error with its additional code and qualifier."""
    return struct.pack(">BxB4xB4xH4x", 0x70, key, 10, code)


def _nothing(_: bytes, __: bytes) -> bytes:
    return b""


def _request_sense(cdb: bytes, _: bytes) -> bytes:
    return sense_data(NO_SENSE, NO_ADDITIONAL_SENSE)[: cdb[4]]


def _report_luns(cdb: bytes, _: bytes) -> bytes:
    (allocation,) = struct.unpack_from(">I", cdb, 6)
    return struct.pack(">I4x8x", 8)[:allocation]


def _inquiry_of_no_unit(cdb: bytes, _: bytes) -> bytes:
    (allocation,) = struct.unpack_from(">H", cdb, 3)
    return _standard_inquiry(NO_SUCH_UNIT)[:allocation]


_COMMANDS_OF_NO_UNIT: dict[int, Callable[[bytes, bytes], bytes]] = {
    0x12: _inquiry_of_no_unit,
    0xA0: _report_luns,
}


def _standard_inquiry(peripheral: int) -> bytes:
    rest = bytes([0, 0, COMMAND_QUEUING]) + VENDOR + PRODUCT + REVISION
    return bytes([peripheral, 0, ANSI_VERSION_SPC_3, RESPONSE_DATA_FORMAT, len(rest)]) + rest


def _mode_pages(cdb: bytes) -> bytes:
    if cdb[2] >> 6 == MODE_PAGE_CONTROL_SAVED:
        raise SenseError(ILLEGAL_REQUEST, SAVING_PARAMETERS_NOT_SUPPORTED)
    if cdb[2] & 0x3F not in {MODE_PAGE_CACHING, MODE_PAGE_ALL}:
        raise SenseError(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
    if cdb[2] >> 6 == 1:  # which values could be changed: none
        return CACHING_PAGE[:2].ljust(len(CACHING_PAGE), b"\0")
    return CACHING_PAGE


def _answer_control(chain: Chain) -> bytes:
    """A task to be managed has ended already; there is no notification to subscribe to."""
    kind = int.from_bytes(chain.request[:4], "little")
    return TASK_MANAGEMENT_RESPONSE if kind == VIRTIO_SCSI_T_TMF else NOTIFICATION_RESPONSE
