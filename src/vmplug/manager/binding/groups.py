"""Give a PCI device with its IOMMU group to VFIO, and back to the drivers that it had."""

from collections.abc import Collection

import msgspec

from vmplug.address import Bdf
from vmplug.host.finding import Code
from vmplug.host.pci.bind import read_driver
from vmplug.host.pci.vfio import find_named_group
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder, BindOutcome
from vmplug.manager.setup import DEFAULT_SETUP, Setup


class BoundFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function of a group that VFIO has now.

    `former_driver` is the one that it goes back to if vmplug has bound it, else the one it had.
    """

    bdf: Bdf
    former_driver: str | None
    driver: str | None
    is_bound_by_vmplug: bool


class BoundGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group that VFIO has now.

    `number` is None for a device in no IOMMU group. A mediated device, known by its UUID, needs no
    binding.
    """

    number: int | None
    functions: tuple[BoundFunction, ...]
    mediated_uuid: str | None

    @property
    def node(self) -> str | None:
        """What a VM opens, /dev/vfio/N."""
        return None if self.number is None else f"/dev/vfio/{self.number}"


class ReturnedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function after unbinding; `outcome` is None for one that vmplug has not bound."""

    bdf: Bdf
    former_driver: str | None
    driver: str | None
    outcome: BindOutcome | None


class ReturnedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group that was given back."""

    number: int | None
    functions: tuple[ReturnedFunction, ...]


def bind_device(
    name: str,
    *,
    driver: str | None = None,
    allow: Collection[Code] = (),
    setup: Setup = DEFAULT_SETUP,
) -> BoundGroup:
    """Give every function of a device's IOMMU group to VFIO, all or none.

    `name` is a PCI address, the UUID of a mediated device, or a node such as /dev/vfio/26.
    `driver` is one of VFIO's; None takes the variant that the kernel has for each function, or
    vfio-pci. Raises SpecError, NoSuchDevice, BindError, and InUse for what the host uses unless
    the finding is in `allow`; then nothing is changed.
    """
    group = find_named_group(name, setup.host)
    with Journal.open(setup.state_dir) as journal:
        bound = {
            row.bdf: row.former
            for row in Binder(journal, setup.host).bind(group, driver=driver, allow=allow)
        }
    return BoundGroup(
        number=group.number,
        functions=tuple(
            BoundFunction(
                bdf=member.bdf,
                former_driver=bound[member.bdf].driver if member.bdf in bound else member.driver,
                driver=read_driver(member.bdf, setup.host),
                is_bound_by_vmplug=member.bdf in bound,
            )
            for member in group.functions
        ),
        mediated_uuid=group.mediated.uuid if group.mediated else None,
    )


def unbind_device(name: str, *, setup: Setup = DEFAULT_SETUP) -> ReturnedGroup:
    """Give the functions of a device's IOMMU group back to the drivers that they had.

    `name` is what `bind_device` takes. Functions that vmplug has not bound stay as they are.
    Raises StateError when it has bound none of them, InUse while a VM or a process has the group,
    and BindError for the first that is not given back, after the others were.
    """
    group = find_named_group(name, setup.host)
    with Journal.open(setup.state_dir) as journal:
        done = Binder(journal, setup.host).unbind(group)
    returned = {function.former.bdf: function.outcome for function in done}
    return ReturnedGroup(
        number=group.number,
        functions=tuple(
            ReturnedFunction(
                bdf=member.bdf,
                former_driver=member.driver,
                driver=read_driver(member.bdf, setup.host),
                outcome=returned.get(member.bdf),
            )
            for member in group.functions
        ),
    )
