"""The virtual functions of a physical one: read, counted, configured."""

from collections.abc import Collection
from contextlib import suppress

import msgspec

from vmplug.address import Bdf
from vmplug.errors import BindError
from vmplug.host.finding import Code
from vmplug.host.pci.function import read_function
from vmplug.host.pci.sriov import (
    VfSettings,
    VirtualFunction,
    find_interface,
    read_virtual,
    set_virtual,
)
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.manager.binding.subdevices import divide, find_sriov, read_interface
from vmplug.manager.setup import DEFAULT_SETUP, Setup


class VfStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One virtual function. `mac`, `vlan` and `trust` are None where they cannot be read."""

    number: int
    bdf: Bdf
    driver: str | None
    iommu_group: int | None
    mac: str | None
    vlan: int | None
    trust: bool | None


class PhysicalFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function that can have `total` virtual ones, and those that it has.

    `autoprobe` is whether the host's drivers take new ones; `interface` its network interface.
    """

    bdf: Bdf
    total: int
    autoprobe: bool
    interface: str | None
    functions: tuple[VfStatus, ...]


def read_virtual_functions(bdf: Bdf, *, setup: Setup = DEFAULT_SETUP) -> PhysicalFunction:
    """Return a physical function with its virtual ones.

    Raises NoSuchDevice, and BindError for a function that cannot have any.
    """
    found = find_sriov(bdf, setup.host)
    interface = find_interface(bdf, setup.host)
    settings = dict[int, VirtualFunction]()
    if interface and found.virtfns and setup.host.is_live:  # ip asks the running kernel
        with suppress(BindError):  # a host without ip, or an interface in another namespace
            settings = {virtual.number: virtual for virtual in read_virtual(interface)}
    return PhysicalFunction(
        bdf=bdf,
        total=found.total,
        autoprobe=found.autoprobe,
        interface=interface,
        functions=tuple(
            _read_one(
                number, virtfn, settings.get(number, VirtualFunction(number=number)), setup.host
            )
            for number, virtfn in enumerate(found.virtfns)
        ),
    )


def _read_one(number: int, bdf: Bdf, settings: VirtualFunction, host: HostRoot) -> VfStatus:
    facts = read_function(bdf, host)
    return VfStatus(
        number=number,
        bdf=bdf,
        driver=facts.driver,
        iommu_group=facts.iommu_group,
        mac=settings.mac,
        vlan=settings.vlan,
        trust=settings.trust,
    )


def set_virtual_function_count(
    bdf: Bdf,
    count: int,
    *,
    autoprobe: bool | None = None,
    allow: Collection[Code] = (),
    setup: Setup = DEFAULT_SETUP,
) -> PhysicalFunction:
    """Give a physical function `count` virtual ones, and return it.

    Changing the number removes those that there are, so none of them may be in use. `autoprobe`
    None leaves that setting as it is. Raises InUse, StateError, NoSuchDevice, BindError; then
    nothing is changed.
    """
    with Journal.open(setup.state_dir) as journal:
        divide(bdf, count, journal=journal, host=setup.host, autoprobe=autoprobe, allow=allow)
    return read_virtual_functions(bdf, setup=setup)


def configure_virtual_function(
    bdf: Bdf, number: int, settings: VfSettings, *, setup: Setup = DEFAULT_SETUP
) -> PhysicalFunction:
    """Configure the virtual function of that number, from 0, through its physical one at `bdf`.

    Returns the physical function. Raises SpecError, NoSuchDevice, and BindError when the driver
    refuses or there is no network interface.
    """
    interface = read_interface(bdf, setup.host)
    setup.host.require_live("configure virtual functions")
    set_virtual(interface, number, settings)
    return read_virtual_functions(bdf, setup=setup)
