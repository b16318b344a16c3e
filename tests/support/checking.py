"""What `check` says of a request: the words that tests of safety share."""

from collections.abc import Iterable, Iterator, Sequence

from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Finding, Severity
from vmplug.host.kind import Identity
from vmplug.host.resolve import resolve
from vmplug.host.root import AttributeBatch, HostRoot
from vmplug.host.use.claim import Claim
from vmplug.oci.info import DeviceInfo, DevType

READING, WRITING = Access(read_only=True), Access(read_only=False)
SHARING = Access(read_only=False, share_rw=True)


def want(number: str) -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/wanted", dev_type=DevType.BLOCK, devnum=DevNum.parse(number)
    )


def want_file(path: str) -> DeviceInfo:
    return DeviceInfo(container_path="/dev/vda", dev_type=DevType.BLOCK, host_path=path)


def findings(
    tree: HostTree,
    wanted: str = "8:0",
    wish: Access = WRITING,
    claims: tuple[Claim, ...] = (),
) -> list[Finding]:
    """What `check` says of a number, or of a file when it is a path."""
    info = want_file(wanted) if wanted.startswith("/") else want(wanted)
    device = resolve(info, tree.root)
    return check_device(device, wish, usage=read_usage(tree.root), claims=claims, root=tree.root)


def codes(found: list[Finding]) -> list[str]:
    assert all(finding.hint and finding.severity is Severity.ERROR for finding in found)
    return [finding.code for finding in found]


def claim(*, read_only: bool = False, share_rw: bool = False) -> Claim:
    return Claim(
        vm="sb1", identity=Identity.parse("block:8:0"), read_only=read_only, share_rw=share_rw
    )


class Counting(HostRoot):
    """A tree that counts how often a table, or a file of a function, is read."""

    def __init__(self, root: HostRoot) -> None:
        super().__init__(root.path)
        self.reads: dict[str, int] = {}

    def read_each(
        self,
        directory: str,
        names: Iterable[str],
        *,
        files: Sequence[str],
        links: Sequence[str],
        sizes: Sequence[str],
    ) -> Iterator[AttributeBatch]:
        names = list(names)
        for path in (f"{directory}/{name}/{file}" for name in names for file in files):
            self.reads[path] = self.reads.get(path, 0) + 1
        return super().read_each(directory, names, files=files, links=links, sizes=sizes)

    def list_dir(self, path: str) -> list[str]:
        self.reads[path] = self.reads.get(path, 0) + 1
        return super().list_dir(path)

    def read_text(self, path: str) -> str | None:
        self.reads[path] = self.reads.get(path, 0) + 1
        return super().read_text(path)
