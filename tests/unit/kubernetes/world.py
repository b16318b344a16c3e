"""A node: a host of some cards and disks, a kubelet that stands in, and the plugin."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from tests.support.fake_kernel import FakeKernel
from tests.support.journal import lay_journal
from tests.support.kubelet import SETTLE_S, StandInKubelet
from tests.support.pci_tree import PciTree
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.journal.pod_devices import PodDevice
from vmplug.kubernetes.config import Config, read_config
from vmplug.kubernetes.keeper import Keeper
from vmplug.kubernetes.plugin import Plugin
from vmplug.manager.setup import Setup

GPU, SOUND, NET, OTHER_NET = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0", "0000:3d:00.0"
BOOT_ID = "11111111-2222-3333-4444-555555555555"
NICS, GPUS, DISKS = "example.com/nic", "example.com/gpu", "example.com/disk"

NIC_LINES = f"""
[[resource]]
name = "{NICS}"
classes = ["0x02"]
"""
MANAGED_LINES = f"""
[[resource]]
name = "{GPUS}"
pci = ["10de:*"]
managed = "pre-start"
"""
DISK_LINES = f"""
[[resource]]
name = "{DISKS}"
paths = ["/dev/disk/by-id/nvme-*"]
"""


def config_space(serial: str | None) -> bytes:
    """4 KiB, with a serial number of 16 digits."""
    space = bytearray(4096)
    space[0x06], space[0x34] = 0x10, 0x40
    space[0x40:0x42] = b"\x10\x00"
    if serial:
        space[0x100:0x104] = (0x0003 | 1 << 16).to_bytes(4, "little")
        space[0x104:0x10C] = bytes.fromhex(serial)[::-1]
    return bytes(space)


class Node:
    """The host below `path`, and its state; what a test needs of both sides.

    Group 26 has a graphics card and its sound, with their drivers; 27 and 28 a network card each,
    with vfio-pci. There are two disks, nvme0n1 with a partition and nvme1n1.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tree = self.tree = PciTree(path / "host")
        tree.file("/proc/sys/kernel/random/boot_id", f"{BOOT_ID}\n")
        self.function(GPU, 26, class_code=0x030200, vendor=0x10DE, driver="nouveau", numa_node=0)
        self.function(
            SOUND, 26, class_code=0x040300, vendor=0x10DE, driver="snd_hda_intel", numa_node=0
        )
        self.function(NET, 27, class_code=0x020000, driver="vfio-pci", numa_node=0)
        self.function(OTHER_NET, 28, class_code=0x020000, driver="vfio-pci", numa_node=1)
        tree.pci_driver("vfio-pci")
        tree.block_device("259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
        tree.block_device("259:2", "nvme1n1")
        for number, serial in (("259:0", "S1"), ("259:2", "S2")):
            tree.file(f"/run/udev/data/b{number}", f"S:disk/by-id/nvme-disk_{serial}\nI:1\n")
        takes = {"nouveau": [GPU], "snd_hda_intel": [SOUND], "e1000e": [NET, OTHER_NET]}
        self.kernel = FakeKernel(tree, takes=takes)
        self.state = path / "state"
        lay_journal(self.state)
        self._sockets = tempfile.TemporaryDirectory(prefix="k")  # their names are short
        self.kubelet_directory = Path(self._sockets.name)
        (path / "cdi").mkdir()

    def function(
        self,
        bdf: str,
        group: int,
        *,
        class_code: int = 0x020000,
        vendor: int = 0x8086,
        driver: str | None = "vfio-pci",
        numa_node: int = -1,
        serial: str | None = None,
    ) -> None:
        if not (self.tree.path / f"sys/class/vfio/{group}").exists():
            self.tree.vfio_group(group)  # that of 26 is there before the fake kernel binds it
        self.tree.pci_function(
            bdf,
            class_code=class_code,
            vendor=vendor,
            driver=driver,
            group=group,
            numa_node=numa_node,
            config=config_space(serial),
            reset="",
        )

    def close(self) -> None:
        self._sockets.cleanup()

    def config(self, lines: str = NIC_LINES, *, reconcile_s: float = 0.2) -> Config:
        file = self.path / "device-plugin.toml"
        file.write_text(
            f'kubelet-directory = "{self.kubelet_directory}"\n'
            f'cdi-directory = "{self.path}/cdi"\n'
            f"reconcile-seconds = {max(1, reconcile_s)}\n{lines}"
        )
        return replace(read_config(file), reconcile_s=reconcile_s)

    def open(self, bdf_or_path: str, *, pid: int = 4711, name: str = "qemu") -> None:
        """A process opens a node."""
        self.tree.process(pid, name, bdf_or_path)

    def end(self, pid: int = 4711) -> None:
        """A process ends."""
        shutil.rmtree(self.tree.path / f"proc/{pid}")

    def boot(self, drivers: Mapping[str, str] | None = None) -> None:
        """The host boots: another boot id, and these drivers have taken their functions again."""
        self.tree.file("/proc/sys/kernel/random/boot_id", f"{BOOT_ID[::-1]}\n")
        for bdf, driver in (drivers or {}).items():
            shutil.rmtree(f"{self.tree.path}{self.tree.real(bdf)}/vfio-dev", ignore_errors=True)
            self.tree.take(bdf, driver)

    def journal(self) -> Journal:
        return Journal.open(self.state, host=self.kernel)

    def rows(self) -> list[PodDevice]:
        with self.journal() as journal:
            return journal.pod_devices.all()

    def states(self) -> dict[str, str]:
        return {row.id: str(row.state) for row in self.rows()}

    def drivers(self) -> dict[str, str | None]:
        return {bdf: self.kernel.driver_of(bdf) for bdf in (GPU, SOUND, NET, OTHER_NET)}

    def run(self, scenario: "Scenario", lines: str = NIC_LINES, **more: float) -> None:
        """The scenario with a kubelet and a plugin that is registered with it."""

        async def play() -> None:
            async with (
                StandInKubelet(self.kubelet_directory) as kubelet,
                self.plugin(self.config(lines, **more)) as plugin,
            ):
                await scenario(kubelet, plugin)

        asyncio.run(play())

    def plugin(self, config: Config) -> AbstractAsyncContextManager[Plugin]:
        """A plugin that runs until the end of the `with`, and then ends as SIGTERM ends it."""
        return running(config, self.kernel, self.state)

    def keeper(self, lines: str = NIC_LINES, *, journal: Journal) -> Keeper:
        """The keeper of a plugin, which has looked at everything."""
        keeper = Keeper(self.config(lines), journal, self.kernel)
        keeper.look()
        return keeper


@asynccontextmanager
async def running(config: Config, host: HostRoot, state_dir: Path) -> AsyncIterator[Plugin]:
    """A plugin on a host, until the end of the `with`."""
    with Journal.open(state_dir, host=host) as journal:
        plugin = Plugin(config, journal, Setup(host=host, state_dir=state_dir))
        await plugin.start()
        task = asyncio.create_task(plugin.run())
        try:
            yield plugin
        finally:
            plugin.stop()
            await asyncio.sleep(0.05)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await asyncio.sleep(SETTLE_S)


Scenario = Callable[[StandInKubelet, Plugin], Coroutine[None, None, None]]


async def until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110  files and lists, which no event is for
            await asyncio.sleep(0.02)


async def lists(kubelet: StandInKubelet, number: int) -> None:
    """Wait until the plugin has asked for the pods so many times more."""
    count = kubelet.calls.count("List") + number
    await until(lambda: kubelet.calls.count("List") >= count)
