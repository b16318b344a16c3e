"""What a command printed, compared with what a page says that it prints."""

import re

_OTHER = (
    (r"\b[0-9a-f]{16}\b", "ID"),
    (r"\b(?=[a-f]*\d)[0-9a-f]{6}\b", "JOURNAL"),
    (r"\b\d{8}T\d{6}Z\b", "TIME"),
    (r"\bprocess \d+", "process PID"),
    (r"\bpc-q35-[\d.]+", "MACHINE"),
    (r"[ \t]+", " "),
)
"""What is another one each time, and how wide columns are."""


def is_as_printed(said: str, printed: str) -> bool:
    """Whether it is the same; `...` stands for what is left out."""
    pattern = ""
    for line in _plain(said):
        if line == "...":
            pattern += r"(.*\n)*?"
        else:
            pattern += r".*".join(re.escape(part) for part in line.split("...")) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _plain(printed))) is not None


def _plain(text: str) -> list[str]:
    for pattern, word in _OTHER:
        text = re.sub(pattern, word, text)
    return [line.strip() for line in text.splitlines() if line.strip()]
