"""`python -m tests.system.faults [--quick] [--qemu] [WORD]...`: the matrix, and its totals.

Words choose kinds; without any it is all of them. Two columns run at a time.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from tests.system.faults.columns import ColumnName, pool, run
from tests.system.faults.kinds import Kind
from tests.system.faults.matrix import KINDS, Cell, learn, step_lines
from tests.system.faults.steps import Fault, Op


def table(done: Iterable[Cell]) -> Iterator[str]:
    """One line for each cell."""
    for cell in done:
        outcome = f"WRONG: {cell.problem}" if cell.problem else cell.outcome
        yield f"{cell.kind:26} {cell.op:9} {cell.step!s:44} {cell.fault:18} {outcome}"


def totals(done: Iterable[Cell]) -> Iterator[str]:
    """How many cells of each kind and fault were right, of how many."""
    counts: dict[str, Counter[tuple[Fault, bool]]] = defaultdict(Counter)
    for cell in done:
        counts[cell.kind][cell.fault, cell.problem is None] += 1
        counts["all"][cell.fault, cell.problem is None] += 1
    yield "| kind | " + " | ".join(Fault) + " | all |"
    yield "| --- |" + " --- |" * (len(Fault) + 1)
    for kind in sorted(counts, key=lambda kind: kind == "all"):
        found = counts[kind]
        words = [_word(found[fault, True], found[fault, False]) for fault in Fault]
        right = sum(n for (_, is_right), n in found.items() if is_right)
        words.append(_word(right, sum(found.values()) - right))
        yield f"| {kind} | " + " | ".join(words) + " |"


def _word(right: int, wrong: int) -> str:
    if not right + wrong:
        return "-"
    return f"{right} of {right + wrong}" if wrong else str(right)


def chosen(words: list[str]) -> list[Kind]:
    """The kinds that the words name."""
    return [kind for kind in KINDS if not words or any(word in kind.name for word in words)]


def main() -> int:
    """0 when every cell is right."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what every run of the tests does")
    parser.add_argument("--qemu", action="store_true", help="against a real QEMU")
    parser.add_argument("--steps", action="store_true", help="print what steps.txt lists")
    parser.add_argument("words", nargs="*")
    said = parser.parse_args()
    columns = [
        ColumnName(kind.name, op, said.qemu, said.quick)
        for kind in chosen(said.words)
        for op in ((Op.ATTACH, Op.DETACH) if said.qemu else kind.ops)
        if not (said.qemu and (kind.is_vfio or kind.own))
    ]
    if said.steps:
        for kind in chosen(said.words):
            for op in kind.ops:
                print("\n".join(step_lines(kind.name, op, learn(kind, op)[1])), flush=True)
        return 0
    done: list[Cell] = []
    with pool() as workers:
        for found in workers.map(run, columns):
            done += found
            print("\n".join(table(found)), flush=True)
    print("\n" + "\n".join(totals(done)))
    return int(any(cell.problem for cell in done))


if __name__ == "__main__":
    sys.exit(main())
