"""The matrix: for each kind and operation every step, for each step every fault, and a verdict."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

from tests.system.faults import ops
from tests.system.faults.conductor import Plan
from tests.system.faults.kinds import (
    BOUND,
    FIRST,
    SECOND,
    Kind,
    Loop,
    Served,
    character_device,
    functions,
    images,
    loop,
    mediated,
    network,
    random_source,
    share_by_socket,
    share_of_ours,
    stored,
)
from tests.system.faults.ops import OPERATIONS
from tests.system.faults.process import GO, Answer, Process
from tests.system.faults.steps import FAULTS, GUEST, KILLED, OWN, Fault, Op, Step, StepKind
from tests.system.faults.world import (
    PATIENT_S,
    SILENCE_S,
    UNPLUG_S,
    VM,
    Picture,
    World,
    world,
)
from vmplug.host.vhost_user.store import VHOST_USER_BLK_MAJOR, VHOST_USER_SCSI_MAJOR

THROTTLED = {"iothread": "on", "iops-total": "900"}
_SHARED = (Op.RECONCILE, Op.LEASE, Op.END, Op.TAKE_OVER)
KINDS = (
    Kind(
        name="virtio-blk image",
        make=images,
        more=(Op.RECONCILE, Op.RESIZE, Op.LEASE, Op.END),
    ),
    Kind(name="virtio-blk loop device", make=loop),
    Kind(name="virtio-blk iothread, limits", make=partial(images, options=[THROTTLED])),
    Kind(name="virtio-scsi disk", make=partial(images, options=[{"block-driver": "virtio-scsi"}])),
    Kind(
        name="two disks at once",
        make=partial(images, options=[{}, {"block-driver": "virtio-scsi"}]),
        more=(Op.TAKE_OVER,),
    ),
    Kind(name="nvdimm", make=partial(images, pmem=True), is_retained=True),
    Kind(
        name="vhost-user-blk", make=partial(stored, major=VHOST_USER_BLK_MAJOR), has_backend=True
    ),
    Kind(
        name="vhost-user-scsi", make=partial(stored, major=VHOST_USER_SCSI_MAJOR), has_backend=True
    ),
    Kind(name="vhost-user-net", make=network, has_backend=True, more=(Op.RECONCILE,)),
    Kind(name="share, own virtiofsd", make=share_of_ours, has_backend=True, more=_SHARED),
    Kind(name="share by socket", make=share_by_socket, has_backend=True),
    Kind(
        name="cold disks",
        make=partial(images, options=[{}, {"block-driver": "virtio-scsi"}]),
        own=(Op.START, Op.STOP),
    ),
    Kind(name="rng", make=random_source, has_device=False, more=(Op.ADOPT, Op.FORGET)),
    Kind(name="vfio, bound before", make=partial(functions, names=[BOUND]), is_vfio=True),
    Kind(
        name="vfio by its own node",
        make=partial(functions, names=[BOUND], has_node=True),
        is_vfio=True,
        shares=True,
    ),
    Kind(name="vfio, mediated", make=mediated, is_vfio=True, more=(Op.CREATE, Op.REMOVE)),
    Kind(
        name="vfio group, managed",
        make=partial(functions, names=[FIRST, SECOND]),
        is_vfio=True,
        managed=True,
        more=(Op.RECONCILE, Op.LEASE, Op.END),
    ),
    Kind(
        name="counted only",
        make=character_device,
        has_device=False,
        more=(Op.LEASE, Op.END),
    ),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault at one step: what came of it, and what was wrong, None if nothing."""

    kind: str
    op: Op
    step: Step
    fault: Fault
    outcome: str
    problem: str | None


def step_lines(kind: str, op: Op, steps: Iterable[Step]) -> list[str]:
    """The steps that change something, a line for each: the tests compare them with their list.

    On a busy machine vmplug may miss an event, and asks again.
    """
    changing = (s for s in steps if s.kind not in {StepKind.QUERIES, StepKind.EVENT})
    return [f"{kind} | {op} | {step}" for step in dict.fromkeys(changing)]


def wrong_cells(cells: Sequence[Cell]) -> list[str]:
    """What was wrong, in words. A column without a cell has tried nothing."""
    assert cells
    return [f"{cell.step}, {cell.fault}: {cell.problem}" for cell in cells if cell.problem]


class Pictures(NamedTuple):
    """What is right: before an attach, after it, and when all is detached again.

    `begun` and `done` are from before and after the operation, where it is another one.
    """

    before: Picture
    attached: Picture
    end: Picture
    begun: Picture | None = None
    done: Picture | None = None


class Grown(AssertionError):
    """QEMU has more files open than before: a leak if it grows each time."""


class NeverCame(AssertionError):
    """The step at which the fault was to be: vmplug had left the socket when the event came."""


_TRIES = 6
_LEAKS = 3
"""So often a leak is seen: what QEMU opens once, of two kinds at most, does not grow as often."""


class Column:
    """One kind and operation in one world: the pictures that are right, and the cells."""

    def __init__(
        self,
        world: World,
        op: Op,
        right: Pictures | None = None,
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.world = world
        self.op = op
        self._silence_s = silence_s
        if right and world.kind.shares:
            self._run("attach", "detach")
            world.behind.renew()
        self.right = right or self._learn()
        self.files = world.machine.count_files(0, timeout_s=0.5)

    def _learn(self) -> Pictures:
        kind = self.world.kind
        if not kind.is_retained:
            self._run("attach", "detach")  # what QEMU opens once stays open
            self.world.behind.renew()
        before = self.world.picture()
        self._run("attach")
        attached = self.world.picture()
        begun, done = None, None
        if self.op is Op.RESIZE:
            begun, done = attached, self._pictured("resize")
        self._run("detach")
        end = self.world.picture()
        if self.op is Op.FORGET:
            begun, done = end, self._pictured("forget")
            self._run("adopt")
        elif self.op is Op.ADOPT:
            begun, done = self._pictured("forget"), self._pictured("adopt")
        elif self.op is Op.START:
            begun, done = end, self._pictured("start")
            self._run("stop")
        elif self.op is Op.STOP:
            begun, done = self._pictured("start"), self._pictured("stop")
        elif self.op in _LEASING:
            begun, done = self._learn_lease(attached, end)
        elif self.op in {Op.CREATE, Op.REMOVE}:
            gone = self._pictured("remove")
            begun, done = (gone, end) if self.op is Op.CREATE else (end, gone)
            self._run("create")
        assert attached != before
        assert (end == before) is not kind.is_retained
        return Pictures(before, attached, end, begun, done)

    def _learn_lease(self, attached: Picture, end: Picture) -> tuple[Picture, Picture]:
        if self.op is Op.TAKE_OVER:
            self._run("attach")
            begun, done = self._pictured("lend"), self._pictured("take over")
            assert done == attached
            self._run("detach")
            return begun, done
        leased, ended = self._pictured("lease"), self._pictured("end")
        return (end, leased) if self.op is Op.LEASE else (leased, ended)

    def _pictured(self, word: str) -> Picture:
        self._run(word)
        return self.world.picture()

    def _run(self, *words: str) -> None:
        answer = self._follow(lambda: iter(words))
        assert answer == {}, (answer, self.world.words.read_text())

    def _follow(self, lead: Callable[[], Iterator[str]]) -> Answer | None:
        words = lead()

        def say(_: Answer) -> str:
            return next(words, GO)

        process = Process(partial(ops.follow, self.world), self.world.words)
        return self.world.conductor.serve(process, lead=say)

    def steps(self) -> list[Step]:
        """The steps of the operation, from a run without a fault."""
        answer = self._operate(None)
        assert answer == {}, answer
        steps = [step for step in self.world.conductor.steps if not _is_again(step)]
        self._run(*OPERATIONS[self.op].back)
        return steps

    def _operate(self, plan: Plan | None) -> Answer | None:
        fault = plan.fault if plan else None
        waits = ops.Waits(
            answer_s=self._silence_s if fault is Fault.SILENT else 10.0,
            guest_s=SILENCE_S if fault in GUEST else UNPLUG_S,
        )
        self.world.behind.renew()
        if self.op is Op.RECONCILE:
            self._interrupt()
        work = partial(ops.operate, self.world, self.op, waits=waits)
        return self.world.conductor.serve(Process(work, self.world.words), plan)

    def _interrupt(self) -> None:
        """Leave an attach that was killed when the guest had just seen the device."""
        plan = Plan(_last_command(self.world.kind), Fault.KILLED_AFTER)
        work = partial(ops.operate, self.world, Op.ATTACH, waits=ops.Waits())
        told = self.world.conductor.serve(Process(work, self.world.words), plan)
        assert told is None, told

    def cell(self, step: Step, fault: Fault) -> Cell:
        """Let one fault happen, recover, and judge."""
        problem, growths = None, 0
        for _ in range(_TRIES):
            trial = Trial(self, Plan(step, fault))
            try:
                problem = None
                trial.run()
            except NeverCame as error:
                problem = str(error)
                if self.op is Op.DETACH:
                    continue  # all went well, and it is detached
            except Grown as error:
                problem = str(error)  # of what QEMU opens only once it does not open more
                growths += 1
                if growths < _LEAKS:
                    continue
            except AssertionError as error:
                problem = str(error) or repr(error)
            break
        return Cell(self.world.kind.name, self.op, step, fault, trial.outcome, problem)


def _is_again(step: Step) -> bool:
    """What a busy machine makes vmplug do once more, or not.

    It connects where a connection has lasted too long, and removes what QEMU held for a moment.
    """
    return step.number > 1 and step.name.split()[0] in {"qmp_capabilities", "chardev-remove"}


@cache
def _last_command(kind: Kind) -> Step:
    """The one of an attach that shows the guest the device."""
    commands = [step for step in learn(kind, Op.ATTACH)[1] if step.name.startswith("device_add")]
    return commands[-1]


class Trial:
    """One fault, and what came of it."""

    def __init__(self, column: Column, plan: Plan) -> None:
        self.column = column
        self.world = column.world
        self.plan = plan
        self.outcome = "?"
        self.told: Answer | None = None

    def run(self) -> None:
        """AssertionError says what is wrong."""
        self.told = self.column._operate(self.plan)
        if not self.world.conductor.has_fired:
            raise NeverCame(f"the step never came: {self.told}")
        assert (self.told is None) is (self.plan.fault in KILLED), self.told
        self._check_answer()
        if self.plan.fault is Fault.DEVICE_GONE:
            assert self.told or self.world.behind.is_gone(), "something is in its place"
        has_died = self.plan.fault is Fault.QEMU_DIES
        self.world.mend()
        at_once = None if has_died else self.world.picture()
        answer = self.column._follow(partial(self._recover, at_once))
        assert answer == {}, f"recovering failed: {answer} {self.world.words.read_text()[-2000:]}"
        if not self.world.kind.is_retained:
            self._count_files()

    def _count_files(self) -> None:
        """Once nobody is connected, as a connection is a file of QEMU's too."""
        column = self.column
        files = self.world.machine.count_files(column.files)
        if files > column.files:
            column.files, before = files, column.files
            raise Grown(f"{files} files are open, and {before} were before")

    def _check_answer(self) -> None:
        """An error says what to do, unless QEMU has said why and all is as it was."""
        told = self.told or {}
        assert "bug" not in told, told["bug"]
        is_plain = self.column.op is not Op.DETACH and told.get("code") == "command-failed"
        assert "error" not in told or told["hint"] or is_plain, f"no hint: {told}"

    def _recover(self, at_once: Picture | None) -> Iterator[str]:
        column, world = self.column, self.world
        is_there = self.plan.fault is not Fault.DEVICE_GONE  # else the host is another one now
        if column.op is Op.RECONCILE and self.told == {} and is_there:
            assert at_once == column.right.before or at_once is None, "it says done and is not"
        yield "reconcile"
        if self.plan.fault is Fault.NOTED_WRONG:
            world.know_vm()  # it may have nothing any more that shows that it runs
        if at_once is None:
            self._judge_dead()
            world.start_again()
            world.behind.renew()
            self.outcome = "released"
        elif column.right.done:
            yield from self._judge_change()
        else:
            is_attached = self._judge(at_once)
            if is_attached:
                if column.op is Op.ATTACH and not (world.kind.is_retained or self._is_another()):
                    yield "attach"
                yield "detach"
                self._expect(world.picture(), column.right.end, "after detaching again")
        world.behind.renew()
        yield "attach"
        yield "detach"
        self._expect(world.picture(), column.right.end, "at the end")

    def _judge_change(self) -> Iterator[str]:
        """Of an operation that neither attaches nor detaches: done, or not done and can be."""
        column = self.column
        if column.op in _LEASING and self.plan.fault is Fault.DEVICE_GONE:
            self.world.behind.renew()
        now = self.world.picture()
        op = OPERATIONS[column.op]
        self.outcome = "done" if now == column.right.done else "not done"
        if now != column.right.done:
            assert column.right.begun
            self._expect(now, column.right.begun, "after reconcile")
            has_died = self.plan.fault is Fault.OWN_DIES
            assert self.told != {} or has_died, "it says done and is not"
            yield column.op
            assert column.right.done
            self._expect(self.world.picture(), column.right.done, "done again")
        yield from op.back
        self._expect(self.world.picture(), column.right.end, "taken back")

    def _is_another(self) -> bool:
        """Whether the device that came back is another one, which is not counted.

        The kernel gives each loop device that is set up a number in a sequence of its own, and a
        daemon that serves once makes a new socket.
        """
        behind = self.world.behind
        is_new = isinstance(behind, Loop) or (isinstance(behind, Served) and behind.serves_once)
        return self.plan.fault is Fault.DEVICE_GONE and is_new

    def _judge_dead(self) -> None:
        gone = [line for line in self.column.right.before if VM not in line]
        found = self.world.picture(of_vm=False)
        missing = [line for line in found if line not in gone]
        assert not missing, f"left after QEMU died: {missing}"

    def _judge(self, at_once: Picture) -> bool:
        """Whether it is attached, as it may be; AssertionError for what must not be."""
        column, world, told = self.column, self.world, self.told
        is_back = self.plan.fault is Fault.DEVICE_GONE
        if is_back:
            world.behind.renew()
        now = world.picture()
        has_ended = told == {}
        if now == column.right.attached:
            assert not (column.op is Op.DETACH and has_ended), "it says detached and is attached"
            assert not (column.op is Op.ATTACH and told), f"failed and yet attached: {told}"
            self.outcome = "attached" if column.op is Op.ATTACH else "still attached"
            return True
        if (
            column.op is Op.DETACH
            and told
            and len(world.behind.requests()) > 1
            and now != column.right.end
        ):
            self.outcome = "partly detached"
            return True
        right = column.right.before if now == column.right.before else column.right.end
        self._expect(now, right, "after reconcile")
        assert not (column.op is Op.ATTACH and has_ended), "it says attached and is not"
        self.outcome = self._undone(at_once, right)
        if told and self.plan.fault is Fault.REFUSED and column.op is Op.ATTACH:
            self._expect(at_once, column.right.before, "at once")
        return False

    def _undone(self, at_once: Picture, right: Picture) -> str:
        if self.column.op is Op.DETACH:
            return "detached" if at_once == right else "detached by reconcile"
        if right != self.column.right.before:
            return "retained"
        return "undone" if at_once == right else "undone by reconcile"

    @staticmethod
    def _expect(found: Picture, right: Picture, when: str) -> None:
        more, less = list(found), list(right)
        for line in found:
            if line in less:
                less.remove(line)
                more.remove(line)
        assert (more, less) == ([], []), f"{when}: more {more}, less {less}"


_LEASING = {Op.LEASE, Op.END, Op.TAKE_OVER}

Table = Mapping[StepKind, tuple[Fault, ...]]


def faults_at(kind: Kind, op: Op, step: Step, table: Table) -> list[Fault]:
    """The faults that there are at a step of that kind of device.

    VFIO lets no function go that a VM has.
    """
    lacking = set(() if _asks_guest(op, step) else GUEST)
    if op in {Op.ADOPT, Op.TAKE_OVER, Op.FORGET, Op.START, Op.STOP}:
        lacking.add(Fault.SILENT)  # they wait for longer than the matrix does
    if op in {Op.START, Op.STOP}:
        of_other = {Fault.QEMU_DIES, Fault.DEVICE_GONE, Fault.REFUSED}
        lacking |= of_other | {Fault.LOST_BEFORE, Fault.LOST_AFTER}
    if op in _LEASING:
        lacking |= {Fault.QEMU_DIES, Fault.BACKEND_DIES}  # the journal knows no VM that has it
    if op is Op.CREATE:
        lacking.add(Fault.DEVICE_GONE)  # there is none
    is_held = kind.is_vfio and op is Op.DETACH and step.kind is not StepKind.KERNEL
    if is_held or not kind.has_device:
        lacking.add(Fault.DEVICE_GONE)
    if not kind.has_backend:
        lacking.add(Fault.BACKEND_DIES)
    own = OWN if _has_own_qemu(op, step) else ()
    return [*(fault for fault in table[step.kind] if fault not in lacking), *own]


def _has_own_qemu(op: Op, step: Step) -> bool:
    """Whether a QEMU that vmplug started is there at the step: its pid is just being noted."""
    is_noted = op is Op.START and step.name == "update vm"
    return is_noted or (op is Op.STOP and step.kind is StepKind.COMMAND)


def _asks_guest(op: Op, step: Step) -> bool:
    return op in {Op.DETACH, Op.RECONCILE} and step.name.startswith("device_del")


def learn(kind: Kind, op: Op) -> tuple[Pictures, list[Step]]:
    """What is right and which steps there are, in memory."""
    with world(kind) as made:
        right = Column(made, op).right
    with world(kind) as made:
        return right, Column(made, op, right).steps()


def cells(kind: Kind, op: Op, table: Table = FAULTS) -> Iterator[Cell]:
    """Every cell in memory; after one that went wrong there is another world."""
    right, steps = learn(kind, op)
    plans = [(step, fault) for step in steps for fault in faults_at(kind, op, step, table)]
    patient = False
    while plans:
        with world(kind) as made:
            column = Column(made, op, right, silence_s=PATIENT_S if patient else SILENCE_S)
            patient = False
            is_usable = True
            while plans and is_usable:
                step, fault = plans.pop(0)
                done = column.cell(step, fault)
                if done.problem and fault is Fault.SILENT and not patient:
                    patient = True  # the machine is busy: QEMU seemed silent before it was
                    plans.insert(0, (step, fault))
                    break
                yield done
                is_usable = not (done.problem or kind.is_retained)
