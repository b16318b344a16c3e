"""`python -m tests.fuzz [TARGET ...] [--seconds N] [--seed N]`: atheris, the time divided.

Coverage decides which inputs are kept and changed further. They are below build/fuzz/TARGET, with
what broke the property; `--input FILE` runs the property on one file.
"""

import argparse
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS, load

BUILD = Path("build/fuzz")
_START_S = 2
"""What a process needs before it does anything."""
_LONGEST_INPUT_S = 20


def main() -> int:
    """How many targets broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0, help="of the changes; 0: another each time")
    parser.add_argument("--input", type=Path, help="one input, for one target")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    targets = asked.targets or list(TARGETS)
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}")
    if asked.input:
        load(targets[0])(asked.input.read_bytes())
        return 0
    if asked.engine:
        _run_engine(targets[0], asked.seconds, asked.seed)
    if find_spec("atheris") is None:
        parser.error("atheris is not installed; it has wheels for Linux on x86-64 only")
    return _run_all(targets, time.monotonic() + asked.seconds, asked.seed)


def _run_all(targets: list[str], deadline: float, seed: int) -> int:
    broken = []
    for index, target in enumerate(targets):
        share = TARGETS[target] / sum(TARGETS[later] for later in targets[index:])
        seconds = max(1, round((deadline - time.monotonic()) * share) - _START_S)
        log = BUILD / target / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.fuzz", target, "--engine", "--seed", str(seed)]
        with log.open("wb") as output:
            run = subprocess.run(
                [*command, "--seconds", str(seconds)], check=False, stdout=output, stderr=output
            )
        lines = log.read_text(errors="replace").splitlines()
        done = [line for line in lines if "stat::number_of_executed_units" in line]
        print(f"{target}: {done[-1].split()[-1] if done else 'no'} inputs in {seconds} s")
        if run.returncode:
            broken.append(target)
            print("\n".join(lines[-60:]))
            print(f"again: python -m tests.fuzz {target} --input {BUILD / target}/crash-...")
    return len(broken)


def _run_engine(target: str, seconds: int, seed: int) -> None:
    """Does not come back: libFuzzer ends the process."""
    import atheris  # noqa: PLC0415  only where it is installed

    with atheris.instrument_imports(include=["vmplug"]):
        check = load(target)
    found = BUILD / target / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    words = CORPUS / f"{target}.dict"
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-timeout={_LONGEST_INPUT_S}",
            f"-artifact_prefix={BUILD / target}/",
            "-max_len=4096",
            "-len_control=0",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
            *([f"-dict={words}"] if words.exists() else []),
            str(found),
            str(CORPUS / target),
        ],
        check,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
