"""What vmplug makes of a case, in the table's words."""

from pathlib import Path

import msgspec

from tests.cdi.table import Case, Config, Verdict, name_host
from vmplug import cdi


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What should come of a case, or what did; `config` is that after the injection."""

    verdict: Verdict
    refused: dict[str, str]
    unresolved: list[str]
    config: Config | None
    failed: str | None
    conflicts: list[str]


def expect(case: Case, root: Path) -> Outcome:
    """What the table says, of a case that was laid out below `root`."""
    is_injected = case.verdict == "injected"
    return Outcome(
        verdict=case.verdict,
        refused=case.refused,
        unresolved=case.wants_unresolved,
        config=name_host(case.result if is_injected else case.config, root),
        failed=case.failed,
        conflicts=case.conflicts,
    )


def try_vmplug(case: Case, root: Path) -> Outcome:
    """Lay a case out below `root`, and let vmplug inject its devices."""
    registry = cdi.read_directories(case.lay_out(root))
    config = name_host(case.config, root)
    verdict: Verdict = "injected"
    unresolved, failed = list[str](), None
    try:
        config = cdi.inject(config, case.devices, registry)
    except cdi.UnresolvableDevices as error:
        verdict, unresolved = "unresolved", list(error.names)
    except cdi.MissingNode as error:
        verdict, failed = "failed", error.problems[0].field
    refused = dict[str, str]()
    for problem in registry.problems:
        refused.setdefault(str(Path(problem.file).relative_to(root)), problem.field)
    return Outcome(
        verdict=verdict,
        refused=refused,
        unresolved=unresolved,
        config=config,
        failed=failed,
        conflicts=list(registry.conflicts),
    )
