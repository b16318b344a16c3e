"""Cold plug: a QEMU before its start, which vmplug starts with its devices."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from vmplug.drivers.place import Offer
from vmplug.drivers.plug import Aio, BlockDrive, DiskFrontend, VhostUserDevice
from vmplug.drivers.ports import Choose, UnplugFailure
from vmplug.errors import StateError
from vmplug.host.file_id import CheckedFile, check_path, file_replaced, find_missing
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.hypervisor.qemu.abilities import Abilities, of_program
from vmplug.hypervisor.qemu.connection import check_connected
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.cold_devices import ColdDevices
from vmplug.hypervisor.qemu.start.machine import BINARY, VmSpec, cold_offer
from vmplug.hypervisor.qemu.steps.plug import opened_files
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdRunner


class ColdQemu(ColdDevices):
    """A QEMU before its start: each plug goes on its command line.

    It will run in `directory`. See `vmplug.drivers.ports.Hypervisor`. A context manager: daemons
    of shares run from `plug` on, and end with it unless QEMU was started meanwhile (`started`).
    """

    endpoint = None

    def __init__(
        self,
        spec: VmSpec,
        directory: Path,
        daemons: VirtiofsdRunner | None = None,
        abilities: Abilities | None = None,
        host: HostRoot = THIS_HOST,
    ) -> None:
        self.spec = spec
        self.directory = directory
        super().__init__(
            abilities or of_program(BINARY[spec.machine]),
            daemons or HostVirtiofsdRunner(str(self.qmp_socket)),
            host,
        )

    @property
    def qmp_socket(self) -> Path:
        """The socket on which it will answer QMP."""
        return self.directory / "qmp.sock"

    @property
    def takes_vf_token(self) -> bool:
        """Never: every user of the host can read QEMU's command line."""
        return False

    def offer(self) -> Offer:
        """The places that the VM will offer. iommufd needs both the host and QEMU."""
        offer = cold_offer(self.spec)
        has_node = self._host.stat_or_none(IOMMU_NODE) is not None
        return replace(offer, iommufd=has_node and self.abilities.iommufd)

    def places(self, known: Mapping[str, str]) -> Offer:  # noqa: ARG002
        """The same: no device of a VM that is not started has an address of its own choice."""
        return self.offer()

    def claim_foreign_names(self, names: Mapping[str, str]) -> None:
        """Do nothing: no other program plugs into a VM before its start."""

    def use_threads(self) -> list[str]:
        """Replace aio=native by threads wherever vmplug chose it; returns these files."""
        files = list[str]()
        for plug, place in list(self._plugs.values()):
            if isinstance(plug, BlockDrive) and plug.aio is Aio.NATIVE and plug.aio_is_choice:
                self._set(replace(plug, aio=Aio.THREADS), place)
                files.append(plug.file)
        return files

    @property
    def opens_files(self) -> bool:
        """Whether files must be verified before the guest runs: see `check_opened`."""
        return bool(self._files() or self._sockets())

    def _files(self) -> list[CheckedFile]:
        """A memory's file is open twice: QEMU inherits the one with the lock."""
        plugs = [plug for plug, _ in self._plugs.values()]
        locks = [
            CheckedFile(plug.file, plug.file_id, read_only=True)
            for plug in plugs
            if isinstance(plug, BlockDrive) and plug.lock is not None and plug.file_id
        ]
        return [*locks, *(file for plug in plugs for file in opened_files(plug))]

    def _sockets(self) -> list[tuple[str, str]]:
        """Those that QEMU connects to by their names, and their ids."""
        return [
            (plug.socket_path, plug.file_id)
            for plug, _ in self._plugs.values()
            if isinstance(plug, VhostUserDevice) and plug.descriptor is None
            if plug.socket_path and plug.file_id
        ]

    def check_opened(self, pid: int, qemu: Qemu) -> None:
        """NoSuchDevice unless QEMU, which has started, opened exactly the files that were checked.

        Each as often as it was asked for: one disk's file does not stand for that of another.
        """
        files = self._files()
        for file in files:
            check_path(file.path, file.file_id)
        if missing := find_missing(pid, files):
            raise file_replaced(missing.path, THIS_HOST)
        check_connected(pid, self._sockets())
        for plug, _ in self._plugs.values():
            if isinstance(plug, BlockDrive) and plug.driver is not DiskFrontend.NVDIMM:
                qemu.check_graph(plug)

    def wait_unplugged(
        self,
        device_ids: Sequence[str],  # noqa: ARG002
        timeout_s: float,  # noqa: ARG002
    ) -> dict[str, UnplugFailure]:
        """Return nothing: a removed device leaves no remains."""
        return {}

    def close_files(self, device_ids: Collection[str]) -> None:
        """Do nothing: no file of a removed device is open."""

    def close_left_files(self, choose: Choose) -> None:
        """Do nothing, as `close_files`."""

    def resize(self, device_id: str, size_bytes: int) -> None:  # noqa: ARG002
        """StateError: there is no guest yet."""
        raise StateError(
            f"VM {self.spec.name} is not started yet", state="cold", required="running"
        )

    def find_devices(self) -> dict[str, bool]:
        """The plugged devices."""
        return dict.fromkeys(self._steps, True)

    def find_drivers(self) -> dict[str, str]:
        """None yet."""
        return {}

    def find_lost(self) -> set[str]:
        """None yet."""
        return set()

    def status(self) -> str:
        """The state of a VM before its start."""
        return "cold"

    def close(self) -> None:
        """Do nothing: there is no connection."""
