"""Keeper: which devices there are, and which pod has them, through any crash.

| row of the journal | device | after a crash |
| --- | --- | --- |
| offered | bound, or about to be | bound again, or given back by `give-back` |
| allocated | as it was, or bound for its pod | PreStartContainer goes on; or the pod has gone |
| started | bound, reset | the pod's, until it has gone |
| returning | anything | given back |

Everything here may wait for the kernel: no event loop calls it.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace

from vmplug.errors import DeviceError, InUse, NoSuchDevice, PolicyError, StateError
from vmplug.host.block.usage import read_usage
from vmplug.host.finding import Code
from vmplug.host.kind import Identity
from vmplug.host.pci.bind import reset_function
from vmplug.host.pci.function import read_reset_methods
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim
from vmplug.journal.journal import Journal
from vmplug.journal.pod_devices import PodDevice, PodDeviceState
from vmplug.kubernetes.config import Config, Managed
from vmplug.kubernetes.health import Health, Look, UnitState, judge
from vmplug.kubernetes.meant import is_meant, row_of, unknown_row, why_other
from vmplug.kubernetes.picture import Key, Offer, Picture, PodNames
from vmplug.kubernetes.specs import find_foreign, write_specs
from vmplug.kubernetes.tally import Tally
from vmplug.kubernetes.units import FormerDrivers, Unit, find_clashes, find_units, renew
from vmplug.log import Log
from vmplug.manager.binding.binder import Binder
from vmplug.text import one_line

log = Log(__name__)

_RESET_TIMEOUT_S = 20.0
"""Kubelet waits for 30 seconds."""
LISTS_TO_FREE = 2
"""So many answers of kubelet in a row that do not name a device."""

_OF_PODS = frozenset({PodDeviceState.ALLOCATED, PodDeviceState.STARTED})


class Keeper:
    """The devices of one node. Thread-safe; one change is made at a time."""

    def __init__(self, config: Config, journal: Journal, host: HostRoot) -> None:
        self.config = config
        self._journal = journal
        self._host = host
        self._binder = Binder(journal, host)
        self.tally = Tally()
        self._changing = threading.RLock()
        self._known = dict[Key, Unit]()
        self._named = dict[Key, Unit]()
        self._clashes = dict[Key, str]()
        self._pods: PodNames = {}
        self._missing = dict[Key, int]()
        self._had_pods = self._is_asked = False
        self._failures = dict[Key, str]()
        self._claimed = set[Key]()
        self._resources = {resource.name: resource for resource in config.resources}

    # what there is

    def check(self, *, may_claim: bool = False) -> Picture:
        """Look, and raise PolicyError for a device that is selected twice."""
        picture = self.look(may_claim=may_claim)
        if picture.clash:
            raise PolicyError(
                f"the configuration {self.config.name} selects a device twice: {picture.clash}",
                hint="a device, with its whole IOMMU group, belongs to one resource",
            )
        return picture

    def look(self, *, may_claim: bool = False) -> Picture:
        """All devices as they are now. Nothing is changed.

        Disks are opened exclusively if it `may_claim` them, and those that were found to be held
        when a pod should have got them. Raises AttributeReadError, and StoreError.
        """
        units = self._find_units()
        clashes = find_clashes(units)
        rows = self._rows()
        look = self._start_look(may_claim=may_claim)
        claiming = self._start_look(may_claim=True) if self._claimed else look
        offers = list[Offer]()
        for unit in units:
            if why := clashes.get(unit.key) or self._failures.get(unit.key):
                health = Health(state=UnitState.BROKEN, reason=why)
            else:
                is_claimed = unit.key in self._claimed
                health = self._judge(unit, rows.get(unit.key), claiming if is_claimed else look)
                if health.code is not Code.OPEN_EXCLUSIVELY:
                    self._claimed.discard(unit.key)
            offers.append(self._offer(unit.key, health, unit))
        known = {unit.key: unit for unit in units}
        gone = [key for key in rows if key not in known and key[0] in self._resources]
        for key in sorted(gone):
            why = "it has gone, or is not selected any more"
            health = Health(state=UnitState.BROKEN, reason=why)
            offers.append(self._offer(key, health))
        self._known, self._clashes = known, clashes
        return Picture(offers=tuple(offers), clash=next(iter(clashes.values()), None))

    def _offer(self, key: Key, health: Health, unit: Unit | None = None) -> Offer:
        resource, id_ = key
        pods = tuple(sorted(self._pods.get(key, ())))
        return Offer(resource=resource, id=id_, health=health, unit=unit, pods=pods)

    def _judge(self, unit: Unit, row: PodDevice | None, look: Look) -> Health:
        health = judge(unit, look, is_assigned=self._is_assigned(unit.key, row))
        if row is None or not self._is_asked or unit.key in self._pods:
            return health
        if health.is_open and health.state is UnitState.USED:
            return replace(health, reason=f"{health.reason}; the pod that had it has gone")
        if health.state is UnitState.ASSIGNED and self._missing.get(unit.key):
            return replace(health, reason="kubelet names no pod that has it")
        return health

    def _is_assigned(self, key: Key, row: PodDevice | None) -> bool:
        """Whether it is a pod's: kubelet says so, or has had no time to say the contrary."""
        is_given = row is not None and row.state in _OF_PODS
        return key in self._pods or (is_given and self._missing.get(key, 0) < LISTS_TO_FREE)

    def _find_units(self) -> list[Unit]:
        return find_units(self.config, self._host, self._former())

    def _former(self) -> FormerDrivers:
        return {row.bdf: row.former.driver for row in self._binder.bindings()}

    def _rows(self) -> dict[Key, PodDevice]:
        return {(row.resource, row.id): row for row in self._journal.pod_devices.all()}

    def _judge_before(self, unit: Unit, look: Look, *, is_assigned: bool) -> Health:
        """How it is before it is given or bound: if somebody has claimed it, until it is free."""
        health = judge(unit, look, is_assigned=is_assigned)
        if health.code is Code.OPEN_EXCLUSIVELY:
            self._claimed.add(unit.key)
        return health

    def _start_look(self, *, may_claim: bool = False) -> Look:
        by_identity = dict[Identity, list[Claim]]()
        for claim in self._journal.claims():
            by_identity.setdefault(claim.identity, []).append(claim)
        has_cdi = any(resource.given.is_cdi for resource in self.config.resources)
        return Look(
            host=self._host,
            usage=read_usage(
                self._host, vms=self._journal.vm_processes(self._host), may_claim=may_claim
            ),
            find_claims=lambda device: [
                claim
                for identity in dict.fromkeys((device.identity, *device.related_identities))
                for claim in by_identity.get(identity, ())
            ],
            foreign=find_foreign(self.config) if has_cdi else {},
        )

    def write_specs(self) -> None:
        """Make the CDI files name every device that there is, or that a pod has.

        Raises HostError and StateError.
        """
        if any(resource.given.is_cdi for resource in self.config.resources):
            rows = self._rows()
            kept = {key: unit for key, unit in self._named.items() if key in rows}
            self._named = kept | self._known
            write_specs(self.config, self._named.values())

    # a pod comes

    def allocate(self, resource: str, ids: Sequence[str]) -> list[Unit]:
        """Give devices to a pod, all or none, and return them.

        Nothing is written but their rows, and it may be repeated until somebody has one open.
        Raises NoSuchDevice for an ID that there is not, InUse for one that is not healthy.
        """
        with self._changing:
            units = [self._find(resource, id_) for id_ in ids]
            rows, look = self._rows(), self._start_look(may_claim=True)
            for unit in units:
                row = rows.get(unit.key)
                if row and row.state is PodDeviceState.RETURNING:
                    raise _refused(unit, "vmplug is giving it back")
                if why := self._clashes.get(unit.key):
                    raise _refused(unit, why)
                health = self._judge_before(unit, look, is_assigned=False)
                if not health.state.is_healthy:
                    raise _refused(unit, health.reason, health.code)
            if any(unit.resource.given.is_cdi for unit in units):
                self.write_specs()
            self._journal.pod_devices.put(
                self._row(unit, PodDeviceState.ALLOCATED) for unit in units
            )
            for unit in units:
                self._missing.pop(unit.key, None)
            self.tally.allocated(resource, len(units))
            facts = {"resource": resource, "ids": [*ids]}
            log.info("allocated %s of %s", ", ".join(ids), resource, extra=facts)
            return units

    def _find(self, resource: str, id_: str) -> Unit:
        """The unit as it is now, read again. Raises NoSuchDevice."""
        known = self._known.get((resource, id_))
        now = renew(known, self._host) if known else None
        if now is None:
            self._known = {unit.key: unit for unit in self._find_units()}
            now = self._known.get((resource, id_))
        if now is None:
            raise NoSuchDevice(id_, f"{resource} has no device {id_} on this node")
        return now

    def _row(self, unit: Unit, state: PodDeviceState) -> PodDevice:
        return row_of(unit, state, self._host)

    def prepare(self, resource: str, ids: Sequence[str]) -> None:
        """Make devices ready for the container that is about to start; it may be repeated.

        Raises StateError for a device that is not the one that was allocated, InUse for one that
        somebody else uses, and BindError; then those that were bound here are given back.
        """
        with self._changing:
            rows = self._rows()
            pairs = [self._check_same(resource, id_, rows) for id_ in ids]
            look = self._start_look(may_claim=True)
            for unit, row in pairs:
                is_started = row.state is PodDeviceState.STARTED
                health = self._judge_before(unit, look, is_assigned=is_started)
                if not health.state.is_healthy:
                    raise _refused(unit, health.reason, health.code)
            bound = list[PodDevice]()
            try:
                for unit, row in pairs:
                    if self._bind(unit, row):
                        bound.append(row)
                    self._reset(unit, look)
            except BaseException:
                for row in bound:
                    self._undo_binding(row)
                raise
            self._journal.pod_devices.put(
                self._row(unit, PodDeviceState.STARTED) for unit, _ in pairs
            )

    def _check_same(
        self, resource: str, id_: str, rows: Mapping[Key, PodDevice]
    ) -> tuple[Unit, PodDevice]:
        """The unit of an ID, and its row, which must mean that unit."""
        row = rows.get((resource, id_))
        if row is None or row.state not in _OF_PODS:
            raise _not_same(resource, id_, "it was not allocated, or was given back since")
        try:
            unit = self._find(resource, id_)
        except NoSuchDevice as error:
            raise _not_same(resource, id_, "it has gone") from error
        if why := why_other(unit, row, self._host):
            raise _not_same(resource, id_, why)
        return unit, row

    def _bind(self, unit: Unit, row: PodDevice) -> bool:
        """Bind a managed device; False where nothing had to be done."""
        if not unit.resource.managed or unit.is_bound(self._host):
            return False
        assert isinstance(unit.device, VfioGroup)
        begun_s = time.monotonic()
        self._binder.bind(unit.device, device_id=row.device_id)
        self.tally.bound(unit.resource.name, time.monotonic() - begun_s)
        return True

    def _undo_binding(self, row: PodDevice) -> None:
        """Give a device back after a failure; where that fails, the row is left for `recover`."""
        try:
            self._give_back_binding(row)
        except DeviceError as error:
            _warn_of_return(row, error)

    def _reset(self, unit: Unit, look: Look) -> None:
        """Reset every function, unless somebody has the device open. Raises BindError."""
        if not isinstance(unit.device, VfioGroup) or judge(unit, look, is_assigned=True).is_open:
            return
        for function in unit.device.functions:
            if read_reset_methods(function.bdf, self._host):  # else `check` warns of it
                reset_function(function.bdf, self._host, timeout_s=_RESET_TIMEOUT_S)

    # devices that are bound before a pod wants them

    def bind_offered(self) -> bool:
        """Bind what resources with `managed = "start"` select; True if anything was bound.

        What fails is broken until it succeeds.
        """
        changed = False
        with self._changing:
            rows, look = self._rows(), self._start_look(may_claim=True)
            for unit in self._known.values():
                if unit.resource.managed is not Managed.START or unit.is_bound(self._host):
                    continue
                row = rows.get(unit.key)
                if (row is None or row.state is PodDeviceState.OFFERED) and (
                    self._judge_before(unit, look, is_assigned=False).state is UnitState.BINDABLE
                ):
                    changed |= self._bind_offered(unit)
        return changed

    def _bind_offered(self, unit: Unit) -> bool:
        row = self._row(unit, PodDeviceState.OFFERED)
        self._journal.pod_devices.put([row])
        try:
            done = self._bind(unit, row)
        except DeviceError as error:
            self._journal.pod_devices.forget([row])
            self._failures[unit.key] = error.message
            return False
        self._failures.pop(unit.key, None)
        return done

    # a pod goes

    def recover(self) -> None:
        """Finish what a crash has interrupted."""
        with self._changing:
            self._binder.recover()
            for row in self._rows().values():
                if row.state is PodDeviceState.RETURNING:
                    self._return(row)

    def note_pods(self, pods: PodNames, *, has_any: bool, is_settled: bool) -> None:
        """Take one answer of kubelet: the pods of each device; `has_any`: it names a pod at all.

        Nothing is written. It counts towards freeing a device if kubelet `is_settled`, and it is
        not suddenly empty.
        """
        is_sudden = self._had_pods and not has_any
        self._had_pods = has_any
        if is_sudden:
            return
        with self._changing:
            self._pods = pods
            self._is_asked = True
            for key, row in self._rows().items():
                if key in pods:
                    self._missing.pop(key, None)
                elif row.state in _OF_PODS and is_settled:
                    self._missing[key] = self._missing.get(key, 0) + 1

    def adopt(self) -> bool:
        """Make rows for what pods have and the journal does not know: it was lost.

        True if there was any.
        """
        with self._changing:
            unknown = self._pods.keys() & self._known.keys() - self._rows().keys()
            adopted = [unknown_row(*key, self._host) for key in sorted(unknown)]
            if adopted:
                self._journal.pod_devices.put(adopted)
                names = ", ".join(f"{row.resource}={row.id}" for row in adopted)
                log.warning("pods have %s, which the journal did not know", names)
            return bool(adopted)

    def give_back_unused(self) -> bool:
        """Give back what no pod has any more and nobody has open; True if anything was."""
        with self._changing:
            unused = [
                row
                for key, row in self._rows().items()
                if row.state is PodDeviceState.RETURNING
                or (
                    row.state in _OF_PODS
                    and key not in self._pods
                    and self._missing.get(key, 0) >= LISTS_TO_FREE
                )
            ]
            return bool([row for row in self._closed(unused) if self._return(row)])

    def give_back_all(self) -> tuple[list[PodDevice], list[PodDevice]]:
        """Give back all that no pod has; return those that were, and those that stay."""
        with self._changing:
            self._binder.recover()
            rows = self._rows()
            held = [
                row
                for key, row in rows.items()
                if row.state in _OF_PODS and self._is_assigned(key, row)
            ]
            free = [row for row in rows.values() if row not in held]
            done = [row for row in self._closed(free) if self._return(row, forget=True)]
            return done, [row for row in rows.values() if row not in done]

    def _closed(self, rows: Sequence[PodDevice]) -> Iterator[PodDevice]:
        """Those that nobody has open, or that have gone."""
        look = self._start_look() if rows else None
        for row in rows:
            unit = self._known.get((row.resource, row.id))
            if look and unit and is_meant(unit, row, self._host):
                health = judge(unit, look, is_assigned=False)
                if health.is_open or health.state is UnitState.USED:
                    continue
            yield row

    def _return(self, row: PodDevice, *, forget: bool = False) -> bool:
        """Give one device back: 1. journal, 2. reset, 3. its former driver, 4. journal."""
        key = row.resource, row.id
        unit = self._known.get(key)
        row = replace(row, state=PodDeviceState.RETURNING)
        self._journal.pod_devices.put([row])
        try:
            if unit and not is_meant(unit, row, self._host):
                unit = None
            if unit and unit.is_bound(self._host):
                self._reset(unit, self._start_look())
            is_kept = not forget and unit is not None and unit.resource.managed is Managed.START
            if not is_kept:
                self._give_back_binding(row)
        except DeviceError as error:
            self._failures[key] = f"vmplug cannot give it back: {error.message}"
            _warn_of_return(row, error)
            return False
        self._failures.pop(key, None)
        self._missing.pop(key, None)
        if is_kept:
            self._journal.pod_devices.put([replace(row, state=PodDeviceState.OFFERED)])
        else:
            self._journal.pod_devices.forget([row])
        facts = {"resource": row.resource, "ids": [row.id]}
        log.info("gave %s=%s back", row.resource, row.id, extra=facts)
        return True

    def _give_back_binding(self, row: PodDevice) -> None:
        """Return functions to the drivers that they had. Raises BindError."""
        for returned in self._binder.give_back(row.device_id):
            if returned.error:
                raise returned.error


def _warn_of_return(row: PodDevice, error: DeviceError) -> None:
    why = one_line(error.message)
    facts = {"resource": row.resource, "ids": [row.id], "code": error.code}
    log.warning("cannot give %s=%s back: %s", row.resource, row.id, why, extra=facts)


def _refused(unit: Unit, why: str, code: Code | None = None) -> InUse:
    message = f"{unit.resource.name}={unit.id} cannot be given to a pod: {why}"
    codes = (code,) if code else ()
    return InUse(
        unit.title, message, codes=codes, hint="vmplug device-plugin status shows all devices"
    )


def _not_same(resource: str, id_: str, why: str) -> StateError:
    return StateError(
        f"{resource}={id_} is not the device that this pod was given: {why}",
        state="another device",
        required="the device that was allocated",
        hint="delete the pod, so that it gets another one",
    )
