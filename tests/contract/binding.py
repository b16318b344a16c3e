"""What binding to VFIO and giving back are held to, on the fake kernel and on the real one.

A `Kernel` is the host as the tests see it, with functions whose drivers are known. What the
drivers are is read beside the product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs
from msgspec.structs import replace

from vmplug.address import Bdf
from vmplug.errors import BindError, StateError
from vmplug.host.kind import DeviceType, Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.journal.bindings import BindingState
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord
from vmplug.journal.state import State
from vmplug.manager.binding.binder import Binder

VFIO = "vfio-pci"


class Stubborn(HostRoot):
    """The same host, but the kernel does nothing when it is told to probe one function."""

    def __init__(self, inner: HostRoot, bdf: str) -> None:
        super().__init__(inner.path)
        self._inner = inner
        self._bdf = bdf

    def write_attribute(self, path: str, text: str) -> int | None:
        """See HostRoot."""
        if path.endswith("/drivers_probe") and text == self._bdf:
            self._bdf = ""  # once
            return None
        return self._inner.write_attribute(path, text)


def held_by_vm(journal: Journal, identity: str, device_id: str = "d1") -> None:
    """Let a VM of vmplug have a device."""
    record = DeviceRecord(
        id=device_id,
        vm="sb1",
        identity=Identity.parse(identity),
        kind=DeviceType.VFIO,
        host_path="/dev/vfio/3",
        state=State.PLUGGING,
        read_only=False,
        share_rw=False,
        options={},
        place=None,
        guest_address=None,
    )
    journal.add_devices([record], [])


@dataclass(frozen=True, slots=True)
class Side:
    """A host: `single` is alone in its group, `multi` are all of one; both have drivers."""

    host: HostRoot
    single: str
    multi: Sequence[str]

    def group(self, bdf: str) -> VfioGroup:
        """The group of a function, as it is now."""
        return find_vfio_device(bdf, self.host)

    def driver_of(self, bdf: str) -> str | None:
        """Its driver, read beside the product."""
        link = self._directory(bdf) / "driver"
        return link.readlink().name if link.is_symlink() else None

    def override_of(self, bdf: str) -> str:
        """The text of its driver_override."""
        return (self._directory(bdf) / "driver_override").read_text().strip()

    def write(self, path: str, text: str) -> None:
        """What an operator writes by hand."""
        assert self.host.write_attribute(path, text) is None

    def override(self, bdf: str, driver: str) -> None:
        """Set a function's override by hand; "" for none."""
        self.write(f"/sys/bus/pci/devices/{bdf}/driver_override", f"{driver}\n")

    def unbind(self, bdf: str) -> None:
        """Take a function from its driver by hand."""
        self.write(f"/sys/bus/pci/drivers/{self.driver_of(bdf)}/unbind", bdf)

    def probe(self, bdf: str) -> None:
        """Offer a function to the drivers by hand."""
        self.write("/sys/bus/pci/drivers_probe", bdf)

    def picture(self) -> dict[str, tuple[str | None, str]]:
        """Driver and override of every function of the host."""
        devices = Path(self.host.path) / "sys/bus/pci/devices"
        return {
            path.name: (self.driver_of(path.name), self.override_of(path.name))
            for path in sorted(devices.iterdir())
        }

    def _directory(self, bdf: str) -> Path:
        return Path(self.host.path) / f"sys/bus/pci/devices/{bdf}"


class BindingContract:
    """Tests; a subclass has the fixture `side`, which gives every function back."""

    @pytest.fixture
    def journal(self, tmp_path: Path) -> Iterator[Journal]:
        with Journal.open(tmp_path / "state") as store:
            yield store

    @pytest.fixture
    def binder(self, journal: Journal, side: Side) -> Binder:
        return Binder(journal, side.host)

    def test_one_function_goes_to_vfio_and_back(self, side: Side, binder: Binder) -> None:
        before = side.picture()
        (bound,) = binder.bind(side.group(side.single))
        assert side.driver_of(side.single) == VFIO
        assert (str(bound.bdf), bound.state) == (side.single, BindingState.BOUND)
        assert bound.former.driver == before[side.single][0]
        (returned,) = binder.unbind(side.group(side.single))
        assert returned.former == bound.former
        assert side.picture() == before
        assert binder.bindings() == []

    def test_a_group_goes_whole_and_comes_back_whole(self, side: Side, binder: Binder) -> None:
        before = side.picture()
        bound = binder.bind(side.group(side.multi[1]))
        assert [str(binding.bdf) for binding in bound] == sorted(side.multi)
        assert {side.driver_of(bdf) for bdf in side.multi} == {VFIO}
        untouched = before.keys() - set(side.multi)
        assert {bdf: side.picture()[bdf] for bdf in untouched} == {
            bdf: before[bdf] for bdf in untouched
        }
        binder.unbind(side.group(side.multi[0]))
        assert side.picture() == before

    def test_a_function_without_a_driver_has_none_again(self, side: Side, binder: Binder) -> None:
        side.unbind(side.single)
        before = side.picture()
        binder.bind(side.group(side.single))
        assert side.driver_of(side.single) == VFIO
        binder.unbind(side.group(side.single))
        assert side.picture() == before
        assert side.driver_of(side.single) is None

    def test_an_override_that_was_there_is_there_again(self, side: Side, binder: Binder) -> None:
        driver = side.driver_of(side.single)
        assert driver
        side.override(side.single, driver)
        before = side.picture()
        binder.bind(side.group(side.single))
        binder.unbind(side.group(side.single))
        assert side.picture() == before
        assert side.override_of(side.single) == driver

    def test_a_failure_half_way_puts_all_of_them_back(self, side: Side, journal: Journal) -> None:
        before = side.picture()
        last = max(side.multi)
        binder = Binder(journal, Stubborn(side.host, last))
        with pytest.raises(BindError) as caught:
            binder.bind(side.group(last))
        assert (caught.value.device, caught.value.step) == (last, "drivers_probe")
        assert side.picture() == before
        assert journal.bindings.all() == []

    def test_what_was_bound_before_stays_so(self, side: Side, binder: Binder) -> None:
        first, *others = sorted(side.multi)
        side.override(first, VFIO)
        side.unbind(first)
        side.probe(first)
        assert side.driver_of(first) == VFIO
        before = side.picture()
        bound = binder.bind(side.group(first))
        assert [str(binding.bdf) for binding in bound] == others
        assert {side.driver_of(bdf) for bdf in side.multi} == {VFIO}
        assert [str(r.former.bdf) for r in binder.unbind(side.group(first))] == others
        assert side.picture() == before
        with pytest.raises(StateError):
            binder.unbind(side.group(first))
        assert side.picture() == before

    def test_binding_twice_is_binding_once(self, side: Side, binder: Binder) -> None:
        before = side.picture()
        bound = binder.bind(side.group(side.single))
        between = side.picture()
        assert binder.bind(side.group(side.single)) == bound
        assert side.picture() == between
        binder.unbind(side.group(side.single))
        assert side.picture() == before

    def test_what_was_bound_for_a_device_is_given_back_for_it(
        self, side: Side, binder: Binder
    ) -> None:
        before = side.picture()
        bound = binder.bind(side.group(side.single), device_id="d1")
        assert [binding.device_id for binding in bound] == ["d1"]
        assert binder.give_back("another") == []
        assert side.driver_of(side.single) == VFIO
        assert len(binder.give_back("d1")) == 1
        assert binder.give_back("d1") == []
        assert side.picture() == before

    def test_what_was_bound_by_hand_stays_when_a_device_is_given_back(
        self, side: Side, binder: Binder
    ) -> None:
        by_hand = binder.bind(side.group(side.single))
        assert binder.bind(side.group(side.single), device_id="d1") == by_hand
        assert binder.give_back("d1") == []
        assert side.driver_of(side.single) == VFIO
        assert binder.recover() == []
        assert side.driver_of(side.single) == VFIO

    def test_what_was_bound_for_a_device_that_is_no_more_is_given_back(
        self, side: Side, binder: Binder
    ) -> None:
        before = side.picture()
        binder.bind(side.group(side.multi[0]), device_id="gone")
        recovered = binder.recover()
        assert [str(returned.former.bdf) for returned in recovered] == sorted(side.multi)
        assert side.picture() == before
        assert binder.recover() == []

    def test_an_interrupted_bind_is_undone(
        self, side: Side, binder: Binder, journal: Journal
    ) -> None:
        """As far as the last step: all is bound, and nobody was told."""
        before = side.picture()
        bound = binder.bind(side.group(side.multi[0]))
        journal.bindings.put(replace(row, state=BindingState.BINDING) for row in bound)
        assert len(binder.recover()) == len(side.multi)
        assert side.picture() == before

    def test_a_row_of_an_earlier_boot_is_forgotten(
        self, side: Side, binder: Binder, journal: Journal
    ) -> None:
        (bound,) = binder.bind(side.group(side.single))
        journal.bindings.put([replace(bound, boot_id="an earlier one")])
        between = side.picture()
        (told,) = binder.recover()
        assert (told.former, str(told.outcome)) == (bound.former, "forgotten")
        assert side.picture() == between
        assert journal.bindings.all() == []

    def test_a_row_of_a_function_that_is_gone_is_forgotten(
        self, side: Side, binder: Binder, journal: Journal
    ) -> None:
        before = side.picture()
        (bound,) = binder.bind(side.group(side.single))
        binder.unbind(side.group(side.single))
        gone = structs.replace(bound.former, bdf=Bdf(0xFFFF, 0xFF, 0x1F, 7))
        journal.bindings.put([replace(bound, former=gone)])
        (told,) = binder.recover()
        assert (told.former, str(told.outcome)) == (gone, "forgotten")
        assert journal.bindings.all() == []
        assert side.picture() == before
