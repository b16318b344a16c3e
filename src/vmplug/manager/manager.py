"""DeviceManager: attach and detach, counted by owner and remembered."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Self

from msgspec.structs import replace

from vmplug.drivers.free_places import Taken
from vmplug.drivers.place import Place, Places
from vmplug.drivers.ports import Endpoint, Hypervisor, PlugDriver, Step
from vmplug.errors import (
    CommandError,
    ConnectError,
    DeviceError,
    HypervisorError,
    NoFreePort,
    NotAttached,
    ProtocolError,
    StateError,
    StoreError,
    UnplugTimeout,
    is_closed,
)
from vmplug.host.device import HostDevice
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.group import VfioGroup
from vmplug.host.process import ProcessLock
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.journal import DEFAULT_STATE_DIR, StateDir
from vmplug.journal.journal import Journal
from vmplug.journal.names import check_owner, check_vm_name
from vmplug.journal.naming import choose_device, choose_holds
from vmplug.journal.records import Attachment, DeviceRecord, foreign_names
from vmplug.journal.state import State, holds_nothing, not_attached
from vmplug.log import Log
from vmplug.manager import UNPLUG_TIMEOUT_S
from vmplug.manager.binding.binder import Binder
from vmplug.manager.binding.vf_tokens import HiddenTokens, check_tokens, with_tokens
from vmplug.manager.commit import mark_attached, plan_and_journal
from vmplug.manager.examine import CheckContext, CheckedRequest, check_vfio, examine, require_same
from vmplug.manager.known import find_known
from vmplug.manager.left_files import close_left_files
from vmplug.manager.logged import log_holds
from vmplug.manager.plan import NewDevice, Plan, bind_steps, choose_place, find_places, make_plan
from vmplug.manager.reconcile import Repair, reconcile
from vmplug.manager.resize import new_size
from vmplug.manager.unplug import Unplugger
from vmplug.manager.vm_identity import release_if_restarted
from vmplug.oci.requests import Request
from vmplug.policy.budget import Budget
from vmplug.policy.gate import PolicyCheck
from vmplug.policy.rules import Policy

log = Log(__name__)

Batch = Sequence[Request]
Codes = Iterable[Code]

_UNKNOWN = (ProtocolError, ConnectError, UnplugTimeout)
"""After these it is unknown what QEMU did, or half of a group is still in it. After every other
error QEMU is unchanged."""


class DeviceManager:
    """The devices of one VM.

        with vmplug.connect_vm("sb1") as devices:
            disk = vmplug.DeviceInfo(
                container_path="/dev/xvda", dev_type=vmplug.DevType.BLOCK, host_path="/srv/a.img"
            )
            print(devices.attach(disk, owner="ctr1").guest_address)
            devices.detach_owner("ctr1")

    Thread-safe: no thread waits for another's guest. Several managers may serve one VM, also in
    several processes: they share the journal below `state_dir`, and take turns on the QMP socket.
    """

    def __init__(
        self,
        *,
        vm: str,
        host: HostRoot,
        hypervisor: Hypervisor,
        journal: Journal,
        vhost_user_store: VhostUserStore | None = None,
        policy: Policy | None = None,
    ) -> None:
        if journal.find_vm(vm) is None:
            check_vm_name(vm)
        self._vm = vm
        self._host = host
        self._hypervisor = hypervisor
        self._journal = journal
        self._vhost_user_store = vhost_user_store
        self._policy = policy
        self._binder = Binder(journal, host)
        self._unplugger = Unplugger(
            vm=vm, journal=journal, hypervisor=hypervisor, binder=self._binder
        )
        self._lock = ProcessLock()
        self._offer: Places | None = None
        self._met: Endpoint | None = None
        self._former: list[Repair] = []  # devices released from a former VM of the name

    @classmethod
    def open(
        cls,
        *,
        vm: str,
        host: HostRoot,
        hypervisor: Hypervisor,
        state_dir: StateDir = DEFAULT_STATE_DIR,
        vhost_user_store: VhostUserStore | None = None,
        policy: Policy | None = None,
    ) -> Self:
        """Open the manager of VM `vm`, with its journal below `state_dir`.

        `vhost_user_store` is the vhost-user store of the host, None when it has none. Without a
        `policy` every device that passes `check` may be handed over. A VM that is not in the
        journal is added, and the devices of a former one with its name are released. Closing the
        manager, and a failure to open it, closes the hypervisor's connection. Raises StoreError,
        and SpecError for a name that `vm start` refuses.
        """
        with ExitStack() as undo:
            undo.callback(hypervisor.close)
            journal = undo.enter_context(Journal.open(state_dir))
            manager = cls(
                vm=vm,
                host=host,
                hypervisor=hypervisor,
                journal=journal,
                vhost_user_store=vhost_user_store,
                policy=policy,
            )
            manager._meet()
            undo.pop_all()
        return manager

    def close(self) -> None:
        """Close the connection to the VM and the journal; devices stay attached.

        A call that waits in another thread ends with StateError.
        """
        self._hypervisor.close()
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def attachments(self) -> list[Attachment]:
        """Every hold on a device of this VM, oldest first."""
        return self._journal.attachments(self._vm)

    def check(
        self,
        requests: Batch,
        *,
        owner: str | None = None,
        allow: Codes = (),
        managed: bool = False,
    ) -> list[CheckedRequest]:
        """The device of each request on the host, and all reasons to refuse its `attach`.

        Places in the VM are not checked: see `check_places`. Without an `owner` the policy does
        not check owners.
        """
        return self._examine(requests, owner, Budget(self._policy), allow, managed=managed)

    def check_places(
        self,
        requests: Batch,
        *,
        owner: str | None = None,
        allow: Codes = (),
        managed: bool = False,
    ) -> list[CheckedRequest]:
        """`check`, and whether the VM has places for the devices that pass; nothing is changed."""
        examined = self.check(requests, owner=owner, allow=allow, managed=managed)
        with self._lock:
            known = find_known(self._vm, examined, self._journal)
            return find_places(examined, vm=self._vm, known=known, choose=self._choose)

    def plan(
        self,
        requests: Batch,
        *,
        owner: str | None = None,
        allow: Codes = (),
        managed: bool = False,
    ) -> list[Step]:
        """The exact steps of `attach_all` now, each with its undo; nothing is changed.

        Ids are new each time. Raises as `attach_all` does.
        """
        with self._lock:
            owner = self._vm if owner is None else owner
            plan = self._plan(
                self.check(requests, owner=owner, allow=allow, managed=managed), owner
            )
            steps = (
                replace(step, host_path=new.record.host_path, guest=new.record.guest_address)
                for new in plan.new
                if new.plug and new.place
                for step in (
                    *bind_steps(new, self._host, managed=managed),
                    *self._hypervisor.steps(
                        with_tokens(new.plug, HiddenTokens(), self._hypervisor, self._host),
                        new.place,
                    ),
                )
            )
            # Steps that devices of the VM share are done once.
            return list({str(step.do): step for step in steps}.values())

    def attach(
        self, info: Request, *, owner: str | None = None, allow: Codes = (), managed: bool = False
    ) -> Attachment:
        """Plug one device, or only count it when the VM has it already; see `attach_all`."""
        return self.attach_all([info], owner=owner, allow=allow, managed=managed)[0]

    def attach_all(
        self,
        requests: Batch,
        *,
        owner: str | None = None,
        allow: Codes = (),
        managed: bool = False,
    ) -> list[Attachment]:
        """Plug all of the devices or none, and hold them for `owner` (default: the VM's name).

        A device that the VM has already is only counted. The call does not wait for the guest, and
        findings in `allow` do not stop it. `managed` binds PCI functions to VFIO where they are
        not, and `detach` gives them back to their former drivers. Raises SpecError, PolicyError,
        HostError (InUse for what `check` finds), HypervisorError, and StateError when a device is
        still plugging or detaching.
        """
        self._require_live("attach devices")
        holder = self._vm if owner is None else owner
        budget = Budget(self._policy)
        self._meet()

        def plan_now() -> Plan:
            examined = self._examine(requests, holder, budget, allow, managed=managed)
            return self._plan(examined, holder)

        # The steps have the numbers of "One attach" in docs/architecture.md.
        # 1. Examine, 2. plan, and 3. journal the new devices as plugging.
        plan, holds = plan_and_journal(plan_now, self._journal, self._lock, vm=self._vm)
        with self._journal.in_progress([new.record.id for new in plan.new]):
            # 4. Plug each of them.
            done, failure = self._plug(plan.new, budget, managed=managed)
            # 5. Mark all of them as attached.
            if failure is None:
                marked, failure = self._mark_attached(plan)
                holds += marked
            if failure and (isinstance(failure, _UNKNOWN) or is_closed(failure)):
                raise failure  # the journal keeps it for reconcile
            if failure:
                self._give_up(plan.new, done)
        if failure:
            self._unplug_again(done)
            raise failure
        return self._attached(plan, holds)

    def detach(
        self, attachment_id: str, *, timeout_s: float = UNPLUG_TIMEOUT_S, whole: bool = False
    ) -> None:
        """Release one count of an attachment, or the `whole` of it; the last one unplugs.

        Raises NotAttached; UnplugTimeout or UnplugRefused when the guest does not release it
        within `timeout_s`: the device stays "detaching" and the call may be repeated.
        """
        self.detach_all([attachment_id], timeout_s=timeout_s, whole=whole)

    def detach_all(
        self,
        attachment_ids: Sequence[str],
        *,
        timeout_s: float = UNPLUG_TIMEOUT_S,
        whole: bool = False,
    ) -> None:
        """`detach` for many: ask the guest for all of them first and wait once."""
        self._meet()
        held = self.attachments()
        absent = partial(not_attached, vm=self._vm, has_ended=bool(self._former))
        chosen = choose_holds(attachment_ids, held, absent)
        self._release([hold.id for hold in chosen], timeout_s, whole=whole)
        log_holds("released", chosen)

    def detach_owner(self, owner: str, *, timeout_s: float = UNPLUG_TIMEOUT_S) -> list[Attachment]:
        """Release everything that `owner` holds, with all counts; see `detach`.

        Returns the released holds. Raises NotAttached when there are none, also when all of them
        were released before.
        """
        known = [hold for hold in self.attachments() if hold.owner == owner]
        if not known:
            raise holds_nothing(owner, self._vm)
        held = [hold for hold in known if hold.state is not State.RETAINED] or known
        self.detach_all([hold.id for hold in held], timeout_s=timeout_s, whole=True)
        return held

    def resize(self, attachment_id: str, size_bytes: int | None = None) -> int:
        """Report a disk's new size to the guest, and return it in bytes.

        None means the current size of the host's device; for a regular file a number makes it
        grow. Raises PolicyError if data would be lost, StateError when another disk has its name,
        NotAttached, HypervisorError.
        """
        self._require_live("resize a disk")
        absent = NotAttached(f"no disk is attached as {attachment_id} in VM {self._vm}")
        hold = choose_device(attachment_id, self.attachments(), absent)
        devices = {record.id: record for record in self._journal.devices(self._vm)}
        if (record := devices.get(hold.device_id)) is None:
            raise absent
        wanted = new_size(record, hold, self._host, size_bytes)
        self._hypervisor.claim_foreign_names(foreign_names([record]))
        self._hypervisor.resize(hold.device_id, wanted)
        return wanted

    def reconcile(
        self, *, timeout_s: float = UNPLUG_TIMEOUT_S, take_over: bool = False
    ) -> list[Repair]:
        """Make the journal and the VM agree, and return the repairs.

        Devices of other journals are reported and left alone, unless `take_over` unplugs them.
        """
        self._offer = None
        self._meet()
        vm, journal, hypervisor = self._vm, self._journal, self._hypervisor
        repairs = reconcile(vm, journal, hypervisor, timeout_s=timeout_s, take_over=take_over)
        self._unplugger.give_back(repair.device_id for repair in repairs if repair.is_gone)
        former, self._former = self._former, []
        return former + repairs

    def _meet(self) -> None:
        """Release the devices of a VM of this name that has ended since the last check."""
        with self._lock:
            endpoint = self._hypervisor.endpoint
            if endpoint == self._met:
                return
            released = release_if_restarted(self._vm, self._journal, self._hypervisor)
            self._met = endpoint
            if released:
                self._unplugger.give_back(repair.device_id for repair in released)
                self._former += released
                self._offer = None

    def _require_live(self, what: str) -> None:
        """PolicyError for the picture of a host, unless the VM is one in memory.

        A QEMU opens what has the same name on this machine.
        """
        if self._hypervisor.endpoint:
            self._host.require_live(what)

    def _examine(
        self, requests: Batch, owner: str | None, budget: Budget, allow: Codes, *, managed: bool
    ) -> list[CheckedRequest]:
        known = CheckContext(
            find_claims=self._find_claims,
            is_held=self._is_held,
            find_more=self._check_vfio,
            vms=self._journal.vm_processes(self._host),
            gate=self._gate(owner),
            budget=budget,
        )
        store = self._vhost_user_store
        return examine(requests, self._host, store, known=known, allowed=allow, managed=managed)

    def _gate(self, owner: str | None) -> PolicyCheck | None:
        """The policy for requests of `owner`."""
        if self._policy is None:
            return None
        mode = self._last_offer().mode
        return PolicyCheck(policy=self._policy, vm=self._vm, owner=owner, mode=mode)

    def _last_offer(self) -> Places:
        """The last known offer of the VM."""
        with self._lock:
            if (offer := self._offer) is None:  # another thread may take it away
                offer = self._offer = self._hypervisor.places(self._journal.places(self._vm))
            return offer

    def _find_claims(self, device: HostDevice) -> list[Claim]:
        return self._journal.find_claims(self._vm, device.identity, device.related_identities)

    def _is_held(self, device: HostDevice) -> bool:
        return self._journal.has_device(self._vm, device.identity)

    def _check_vfio(self, device: HostDevice) -> Iterable[Finding]:
        if not isinstance(device, VfioGroup):
            return ()
        return (
            *check_vfio(device, self._hypervisor, self._last_offer(), self._host),
            *check_tokens(device, self._journal.vf_tokens, self._hypervisor, self._host),
        )

    def _plan(self, examined: Sequence[CheckedRequest], owner: str) -> Plan:
        check_owner(owner)
        return make_plan(
            examined,
            vm=self._vm,
            owner=owner,
            known=find_known(self._vm, examined, self._journal),
            choose=self._choose,
            journal_id=self._journal.id,
        )

    def _choose(
        self, driver: PlugDriver, device: HostDevice, taken: Taken
    ) -> tuple[Place, Places]:
        """A place in the last known offer; in a new one if that is full, or has lost a part."""
        with suppress(NoFreePort, CommandError):
            return choose_place(driver, device, offer := self._last_offer(), taken), offer
        self._offer = None
        return choose_place(driver, device, offer := self._last_offer(), taken), offer

    def _plug(
        self, devices: Sequence[NewDevice], budget: Budget, *, managed: bool
    ) -> tuple[list[DeviceRecord], DeviceError | None]:
        """Plug in turn, up to the first that fails: returns what was done, and the failure."""
        done, tokens = list[DeviceRecord](), self._journal.vf_tokens
        try:
            if any(device.plug for device in devices):
                close_left_files(self._vm, self._journal, self._hypervisor)
            for device in devices:
                budget.check()
                require_same([device.record], self._host)
                if managed and isinstance(device.device, VfioGroup):
                    self._binder.bind(device.device, device_id=device.record.id)
                if device.plug and device.place:
                    plug = with_tokens(device.plug, tokens, self._hypervisor, self._host)
                    self._hypervisor.plug(plug, device.place)
                done.append(device.record)
            require_same(done, self._host)
        except DeviceError as error:
            self._offer = None
            return done, error
        return done, None

    def _mark_attached(self, plan: Plan) -> tuple[list[Attachment], StateError | None]:
        """Mark the new devices as attached: returns their holds, and what prevents it."""
        try:
            return mark_attached(plan, self._journal) if plan.new else [], None
        except StateError as error:
            return [], error

    def _attached(self, plan: Plan, holds: Sequence[Attachment]) -> list[Attachment]:
        """The holds of a plan in the order of its requests, now that the VM has the devices."""
        held = {(hold.device_id, hold.name): hold for hold in holds}
        attachments = [
            replace(held[hold.device_id, hold.name], state=State.ATTACHED) for hold in plan.holds
        ]
        log_holds("attached", attachments)
        return attachments

    def _unplug_again(self, done: Sequence[DeviceRecord]) -> None:
        """Unplug what was plugged before the attach failed; what stays is left to reconcile."""
        try:
            self._unplug([r for r in done if r.can_be_unplugged], UNPLUG_TIMEOUT_S)
        except HypervisorError as error:
            facts = {"vm": self._vm}
            log.warning("ignored: %s; vmplug reconcile tries again", error.code, extra=facts)

    def _give_up(self, devices: Sequence[NewDevice], done: Sequence[DeviceRecord]) -> None:
        """Forget devices that were never plugged; the others are detaching."""
        done_ids = [record.id for record in done]
        undone = [new.record.id for new in devices if new.record.id not in done_ids]
        self._let_go(done)
        self._unplugger.give_back(undone)
        self._journal.forget_devices(undone)

    def _let_go(self, records: Sequence[DeviceRecord]) -> None:
        """Record that new devices have no holds; some stay until their VM ends."""
        leaving = [record.id for record in records if record.can_be_unplugged]
        staying = [record.id for record in records if not record.can_be_unplugged]
        self._journal.set_state(leaving, State.DETACHING)
        self._journal.set_state(staying, State.RETAINED)

    def _release(self, ids: Sequence[str], timeout_s: float, *, whole: bool) -> None:
        last = set(self._journal.release(ids, whole=whole))
        leaving = [record for record in self._journal.devices(self._vm) if record.id in last]
        self._unplug(leaving, timeout_s)

    def _unplug(self, records: Sequence[DeviceRecord], timeout_s: float) -> None:
        try:
            self._unplugger.unplug(records, timeout_s)
        except (HypervisorError, StoreError) as error:
            error.hint = error.hint or f"vmplug reconcile --vm {self._vm} finishes what was begun"
            raise
        finally:
            self._offer = None
