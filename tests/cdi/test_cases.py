"""Each case of the table gets its verdict from vmplug."""

import re
from pathlib import Path

import pytest

from tests.cdi.outcome import expect, try_vmplug
from tests.cdi.table import Case, read_cases


@pytest.mark.parametrize("case", read_cases(), ids=lambda case: case.name)
def test_case(case: Case, tmp_path: Path) -> None:
    assert try_vmplug(case, tmp_path) == expect(case, tmp_path)


def test_docs_list_the_differences() -> None:
    page = Path("docs", "cdi.md").read_text(encoding="utf-8")
    section = page.partition("\n## Differences from the reference library\n")[2]
    listed = re.findall(r"^### (.*)$", section.partition("\n## ")[0], re.MULTILINE)
    assert set(listed) == {each.why for case in read_cases() for each in case.differs}
