"""Virtual functions: their number, and their settings through the physical network interface.

The kernel creates them in one write, without waiting until their drivers have started. It changes
a number other than 0 only through 0.
Source: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci; ip-link(8).
"""

import errno
import json
import re
import time

import msgspec
from msgspec import structs

from vmplug.address import Bdf
from vmplug.arguments import check_fields
from vmplug.errors import AttributeReadError, BindError, SpecError
from vmplug.host.pci.bind import Writer
from vmplug.host.pci.function import read_virtfns
from vmplug.host.program import Finished, run_program
from vmplug.host.root import HostRoot

COUNT_TIMEOUT_S = 180.0
"""Each virtual function is started in turn, and some drivers take a second."""
_LINKS_TIMEOUT_S = 2.0

_NUMVFS_HINTS = {
    errno.ENOENT: "it has no driver, or its driver does not support virtual functions; vfio-pci "
    "does with: echo Y > /sys/module/vfio_pci/parameters/enable_sriov",
    errno.ENOMEM: "no bus numbers or memory windows are left for them: enable SR-IOV in the "
    "firmware, or try pci=realloc on the kernel's command line",
    errno.EBUSY: "the driver reports that they are in use: detach them from their VMs",
}
"""Source: sriov_numvfs_store and sriov_enable, Linux drivers/pci/iov.c."""

_IP_TIMEOUT_S = 30.0
_STEP_S = 0.01
_VLAN_MAX = 4094
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z", re.ASCII)
_REPRESENTOR = re.compile(r"(c[0-9]+)?pf[0-9]+(vf|sf)[0-9]+", re.ASCII)
"""The host's port for a virtual function, among the physical function's interfaces.
Source: Documentation/networking/devlink/devlink-port.rst; net/core/devlink.c."""


class Sriov(msgspec.Struct, frozen=True, kw_only=True):
    """The virtual functions of a physical one: `virtfns` of at most `total`.

    `autoprobe`: the host's drivers take new ones.
    """

    total: int
    virtfns: tuple[Bdf, ...]
    autoprobe: bool


class VirtualFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a network's virtual function; None for those that its driver does not have.

    `vlan` 0 means no VLAN.
    """

    number: int
    mac: str | None = None
    vlan: int | None = None
    trust: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)


class VfSettings(msgspec.Struct, frozen=True, kw_only=True):
    """New settings of a virtual function; None leaves one as it is. SpecError from `checked`."""

    mac: str | None = None
    vlan: int | None = None
    trust: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def checked(self) -> "VfSettings":
        """The same in the kernel's spelling."""
        mac = self.mac.lower().replace("-", ":") if self.mac else None
        if mac and (not _MAC.match(mac) or int(mac[:2], 16) & 1):
            raise SpecError(
                "--mac",
                f"{self.mac!r} is not the address of one interface",
                hint="write it as 02:00:00:00:00:01; the first byte is even",
            )
        if self.vlan is not None and not 0 <= self.vlan <= _VLAN_MAX:
            raise SpecError("--vlan", f"{self.vlan} is not in 0..{_VLAN_MAX}; 0 means no VLAN")
        return structs.replace(self, mac=mac)


def read_sriov(bdf: Bdf, root: HostRoot) -> Sriov | None:
    """The virtual functions of a function; None when it cannot have any."""
    base = f"{root.pci_devices}/{bdf}"
    total = root.read_int(f"{base}/sriov_totalvfs")
    if total is None:
        return None
    autoprobe = root.read_int(f"{base}/sriov_drivers_autoprobe")
    return Sriov(total=total, virtfns=read_virtfns(bdf, root), autoprobe=autoprobe != 0)


def set_count(
    bdf: Bdf, count: int, root: HostRoot, *, autoprobe: bool | None = None
) -> tuple[Bdf, ...]:
    """Set the number of a physical function's virtual ones, and return them.

    Unless the number is already right, all are removed first; the caller must make sure that they
    are not in use. `autoprobe` None keeps the current setting. Raises BindError; then it has its
    former number again.
    """
    found = read_sriov(bdf, root)
    if found is None or count > found.total:
        raise _too_many(bdf, count, found)
    writer = Writer(device=str(bdf), root=root, timeout_s=COUNT_TIMEOUT_S)
    is_other_probe = autoprobe is not None and autoprobe != found.autoprobe
    if is_other_probe:
        _set_autoprobe(bdf, writer, on=bool(autoprobe))
    if count == len(found.virtfns):
        return found.virtfns
    try:
        return _change(bdf, len(found.virtfns), count, writer)
    except BindError as error:
        try:
            _put_back(bdf, found, writer, with_probe=is_other_probe)
        except BindError as failure:
            error.hint = f"{error.hint}; vmplug could not restore the former number: {failure}"
        raise


def _change(bdf: Bdf, before: int, count: int, writer: Writer) -> tuple[Bdf, ...]:
    path = f"{writer.root.pci_devices}/{bdf}/sriov_numvfs"
    found: tuple[Bdf, ...] = ()
    for number in [0, count] if before and count else [count]:
        writer.write("sriov_numvfs", path, str(number), hints=_NUMVFS_HINTS)
        found = _wait_virtfns(bdf, number, writer.root)
        if len(found) != number:
            raise BindError(
                str(bdf),
                "sriov_numvfs",
                f"the kernel accepted {number} virtual functions for {bdf}, but it has "
                f"{len(found)}",
                hint="the kernel log (dmesg) may have the reason",
            )
    return found


def _put_back(bdf: Bdf, former: Sriov, writer: Writer, *, with_probe: bool) -> None:
    """The former number, and whether drivers take them."""
    if with_probe:
        _set_autoprobe(bdf, writer, on=former.autoprobe)
    now = len(read_virtfns(bdf, writer.root))
    if now != len(former.virtfns):
        _change(bdf, now, len(former.virtfns), writer)


def _set_autoprobe(bdf: Bdf, writer: Writer, *, on: bool) -> None:
    path = f"{writer.root.pci_devices}/{bdf}/sriov_drivers_autoprobe"
    writer.write("sriov_drivers_autoprobe", path, str(int(on)))


def _too_many(bdf: Bdf, count: int, found: Sriov | None) -> BindError:
    if found is None:
        return BindError(
            str(bdf),
            "sriov_totalvfs",
            f"{bdf} cannot have virtual functions, or its driver is not loaded",
            hint="vmplug host shows which functions can",
        )
    return BindError(
        str(bdf), "sriov_totalvfs", f"{bdf} can have {found.total} virtual functions, not {count}"
    )


def _wait_virtfns(bdf: Bdf, number: int, root: HostRoot) -> tuple[Bdf, ...]:
    """The virtual functions, once there are that many or the deadline has passed."""
    deadline = time.monotonic() + _LINKS_TIMEOUT_S
    while len(found := read_virtfns(bdf, root)) != number and time.monotonic() < deadline:
        time.sleep(_STEP_S)  # the kernel gives no event for the links
    return found


def find_interface(bdf: Bdf, root: HostRoot) -> str | None:
    """The network interface of a physical function itself; None when it has none."""
    base = f"{root.pci_devices}/{bdf}/net"
    for name in root.list_dir(base):
        try:
            port = (root.read_attribute(f"{base}/{name}/phys_port_name") or b"").decode()
        except AttributeReadError:  # EOPNOTSUPP: a driver without port names
            port = ""
        if not _REPRESENTOR.match(port):
            return name
    return None


def read_virtual(interface: str) -> list[VirtualFunction]:
    """The settings of the virtual functions behind an interface. Raises BindError."""
    done = _ip(interface, ["-json", "link", "show", "dev", interface])
    try:
        (link,) = json.loads(done.stdout)
        return [_parse(entry) for entry in link.get("vfinfo_list", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"the output of ip for {interface} makes no sense: {done.stdout[:80]!r}"
        raise BindError(interface, "ip link show", message) from error


def _parse(entry: dict[str, object]) -> VirtualFunction:
    """One entry of `vfinfo_list`. Source: iproute2 ip/ipaddress.c, print_vfinfo."""
    mac, vlans, trust = entry.get("address") or entry.get("mac"), entry.get("vlan_list"), None
    if "trust" in entry:
        trust = bool(entry["trust"])
    vlan = 0
    if isinstance(vlans, list) and vlans:
        vlan = int(vlans[0].get("vlan", 0))
    return VirtualFunction(
        number=int(str(entry["vf"])), mac=str(mac) if mac else None, vlan=vlan, trust=trust
    )


def set_virtual(interface: str, number: int, wanted: VfSettings) -> VirtualFunction:
    """Set a virtual function's address, VLAN and trust, and read them back.

    Raises SpecError for a malformed setting, and BindError for one that the driver does not have;
    then the former settings are restored.
    """
    wanted = wanted.checked()
    before = _find_virtual(interface, number)
    done: list[list[str]] = []
    try:
        for words in _words(wanted):
            _ip(interface, ["link", "set", "dev", interface, "vf", str(number), *words])
            done.append(words)
        now = _find_virtual(interface, number)
        _check_told(interface, now, wanted)
    except BindError:
        told = {words[0] for words in done}
        former = VfSettings(mac=before.mac, vlan=before.vlan, trust=before.trust)
        for words in _words(former):
            if words[0] in told:
                _ip(interface, ["link", "set", "dev", interface, "vf", str(number), *words])
        raise
    return now


def _words(wanted: VfSettings) -> list[list[str]]:
    """The arguments of ip for each setting."""
    return [
        *([["mac", wanted.mac]] if wanted.mac is not None else []),
        *([["vlan", str(wanted.vlan)]] if wanted.vlan is not None else []),
        *([["trust", "on" if wanted.trust else "off"]] if wanted.trust is not None else []),
    ]


def _find_virtual(interface: str, number: int) -> VirtualFunction:
    found = read_virtual(interface)
    for function in found:
        if function.number == number:
            return function
    raise BindError(
        interface,
        "ip link show",
        f"{interface} has no virtual function {number}"
        + (f", but {len(found)}, numbered from 0" if found else ""),
        hint="vmplug sriov BDF --count N makes them" if not found else None,
    )


def _check_told(interface: str, now: VirtualFunction, wanted: VfSettings) -> None:
    """The kernel reports success even if a driver ignores a setting."""
    asked = structs.asdict(wanted)
    for name, value in asked.items():
        if value is not None and getattr(now, name) != value:
            raise BindError(
                interface,
                f"vf {now.number} {name}",
                f"the driver of {interface} took {name} {value} for virtual function "
                f"{now.number} and has {getattr(now, name)}",
            )


def _ip(interface: str, arguments: list[str]) -> Finished:
    done = run_program(["ip", *arguments], timeout_s=_IP_TIMEOUT_S)
    if done.status == 0:
        return done
    step = " ".join(["ip", *arguments])
    hint = "install iproute2" if done.status is None else None
    if "not supported" in done.complaint.lower():
        hint = f"the driver of {interface} does not support this setting for its virtual functions"
    elif "not permitted" in done.complaint.lower():
        hint = "become root"
    raise BindError(interface, step, f"{step}: {done.complaint}", hint=hint)
