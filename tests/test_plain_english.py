"""What people read is plain English: source text, docs and the README have none of the odd words.

To add a pattern: a row in `ODD` with what to write instead and a sentence that has it.
"""

import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.together("source")

PROJECT = Path(__file__).parents[1]
SENTENCE_WORDS_MAX = 30
TEXT_TOKENS = {"COMMENT", "STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}
MODULES = ["src", "lab", "guest", "bench"]
PAGES = ["*.md", "docs/*.md", "Makefile"]
SCRIPTS = ["examples", "tools", "lab", "guest"]
CODE = "\0"
"""Stands for what is not prose, so that no pattern matches across it."""


class Odd(NamedTuple):
    """Words that are odd, what to write instead, and a sentence that has them."""

    pattern: str
    instead: str
    example: str


ODD = [
    Odd(r"says? --", "pass --x, give --x", "say --owner: there is no bundle directory"),
    Odd(r"\banew\b", "again", "the link is made anew"),
    Odd(r"\bby way of\b", "through, with, uses", "has a function by way of VFIO"),
    Odd(r", ignoring\b", "ignored: X", "bad line, ignoring"),
    Odd(
        r"\brul(e|es|ed|ing) (the|a|that|its) (VM|QEMU|guest|host)\b",
        "control the VM",
        "whoever reaches the socket rules that QEMU",
    ),
    Odd(
        r"(?<!\bthere\s)\b(is|are|was|were) no (?!longer\b)\w+",
        "is not a X; has no X; has ended",
        "'x' is no PCI address",
    ),
    Odd(
        r"(?<!\bthere\s)\b(is|are) (?-i:none|nothing)\b",
        "is not one; does not exist",
        "a link is none",
    ),
    Odd(
        r"(?<!\w\s)(?-i:Who)(ever)? (?![^.?]*\?)",
        "name who acts: A thread that ..., The process that ...",
        "Who waits for a guest holds no lock.",
    ),
    Odd(r"\bwhoever\b", "anyone who, the process that", "it wakes whoever waits"),
    Odd(
        r"\b(for|from|of|to|wakes?) who\b",
        "for callers that, to a process that",
        "for who handles those",
    ),
    Odd(
        r"\b(is|are|was|were|be|been)(\s\w+)? looked (at|into)\b",
        "vmplug checks, reads, verifies",
        "it is looked at whether QEMU has opened it",
    ),
    Odd(
        r"\b(a|the|two|each|every|of|and) looks?\b(?! (at|for|like|up)\b)",
        "check, scan",
        "between two looks",
    ),
    Odd(
        r"\b(tells?|told|telling)\b(?!(\s\S+){0,4}\sapart\b)",
        "reports, prints, says, shows",
        "`backend lost` is told of what the VM still has",
    ),
    Odd(r"\bbears?\b", "records, has, carries", "it bears the process that is at it"),
    Odd(r"\bconversations?\b", "connection", "a conversation that is open"),
    Odd(r"\bheirs?\b", "the one that now serves the socket", "else its heir's"),
    Odd(
        r"\b(put|puts|writes?|wrote|written) down\b",
        "record",
        "each VM is written down with the boot",
    ),
    Odd(r"\bby then\b", "at that time, already", "by then it may be somebody's"),
    Odd(r"\b(is|are|was|were) at it\b", "works on it", "the process that is at it"),
    Odd(r"\blives\b|\bliving\b", "runs, exists, is in", "while that process lives"),
    Odd(r"\ball else\b", "everything else", "all else is the host's"),
    Odd(r"\b(is|are|was|were) to be\b", "will be, must be, becomes", "nothing is to be done"),
    Odd(
        r"\b(is|are|was|were|if|not|unless) said\b",
        "given, set, passed, named",
        "unless another driver is said",
    ),
    Odd(r"\bspeaks? against\b", "is a reason not to, prevents", "what speaks against a device"),
    Odd(r"\bmended\b", "fixed, corrected", "until it is mended"),
    Odd(r"\bhinders?\b", "blocks", "it hinders nobody"),
    Odd(r"\bheed(s|ed)?\b", "honoured, used", "the offset is heeded"),
    Odd(r"\bfor want of\b", "because there is no", "not run for want of a machine"),
    Odd(r"\bbut for\b", "except", "all of it but for the last"),
    Odd(r"\bfor ever\b", "forever", "it waits for ever"),
    Odd(r"\bbec[ao]mes? of\b", "happened to", "what has become of a device"),
    Odd(
        r"\b(is|are|was|were) (of|at|with)(?=[.,;:)|\"]|\s*$)",
        "no stranded preposition: the device's ids",
        "names, with the devices they are of.",
    ),
    Odd(r"\b(is|are) of version\b", "has version", "the journal is of version 5"),
    Odd(
        r"(?-i:\bOf) (its|a|an|the|that|this|what)\b[^.]{0,60}\b(nothing|neither|not)\b",
        "start with the subject: nothing of X",
        "Of its devices nothing else is known.",
    ),
    Odd(
        r"\b(a|one) (?!or|few|little|lot|bit|step)\w+ more\b(?! (than|\w+ly)\b)",
        "one more X",
        "a descriptor more is open",
    ),
]


def prose_of_python(source: str) -> str:
    """The comments and strings of a module on their lines, and `CODE` for what is between them."""
    lines = [0, *accumulate(map(len, io.StringIO(source)))]
    prose, done = list[str](), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] in TEXT_TOKENS:
            start, end = (lines[row - 1] + column for row, column in (token.start, token.end))
            prose += [re.sub(r".*\S.*", CODE, source[done:start]), source[start:end]]
            if token.type == tokenize.COMMENT:
                prose[-1] = f" {prose[-1][1:]}"
            done = end
    return strings_without_marks("".join(prose))


def strings_without_marks(text: str) -> str:
    """With spaces for quotes: a sentence goes on from one string to the next."""
    text = re.sub(r"\{[^{}\n]*\}", CODE, text)
    return re.sub(r"\b[rf]?(\"\"\"|\")|\"", lambda found: " " * len(found[0]), text)


def pages() -> dict[str, str]:
    """The documents, by the name of the file."""
    return read_all(path for words in PAGES for path in PROJECT.glob(words))


@cache
def texts() -> Mapping[str, str]:
    """What people read of the project, by the name of its file."""
    modules = (path for folder in MODULES for path in (PROJECT / folder).rglob("*.py"))
    files = [path for folder in SCRIPTS for path in (PROJECT / folder).iterdir()]
    scripts = [path for path in files if path.is_file() and path.suffix in {"", ".sh"}]
    code = {file: prose_of_python(text) for file, text in read_all(modules).items()}
    return code | pages() | read_all(scripts)


def read_all(paths: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(PROJECT).as_posix(): path.read_text() for path in sorted(paths)}


def odd_words(odd: Odd, text: str) -> Iterator[tuple[int, str]]:
    """Line and words of each place that has the pattern; a line's end counts as a space."""
    pattern = re.sub(r" (?![^\[]*\])", r"[ \\n\\t#]+", odd.pattern)
    for found in re.finditer(pattern, text, re.IGNORECASE):
        line = text.count("\n", 0, found.start()) + 1
        yield line, " ".join(found[0].replace(CODE, "").split())


@pytest.mark.parametrize("odd", ODD, ids=[odd.instead for odd in ODD])
def test_each_pattern_finds_what_it_is_for(odd: Odd) -> None:
    assert list(odd_words(odd, odd.example))
    assert list(odd_words(odd, odd.example.replace(" ", "\n    ")))


def test_what_people_read_has_no_odd_words() -> None:
    found = [
        f"{file}:{line}: {words!r}: write {odd.instead}"
        for file, text in texts().items()
        for odd in ODD
        for line, words in odd_words(odd, text)
    ]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_plain_words_are_let_through() -> None:
    plain = [
        "there is no such device",
        "it is no longer there",
        "Who uses a function of the host?",
        "the IOMMU cannot tell the functions apart",
        "a function that looks like a disk",
        "one or more disks, and a few more",
    ]
    assert [
        (text, odd.pattern) for text in plain for odd in ODD if list(odd_words(odd, text))
    ] == []


def test_only_comments_and_strings_of_a_module_count() -> None:
    source = 'told = "it "\\\n    "is no"  # a disk\nanew = f"{told} of {anew}"\n'
    prose = prose_of_python(source)
    assert not list(odd_words(Odd(r"\btold\b|\banew\b", "", ""), prose))
    assert list(odd_words(Odd(r"is no", "", ""), prose)) == [(2, "is no")]


def sentences(page: str) -> Iterator[tuple[int, str]]:
    """The first line and the words of each sentence of a page, without code and tables."""
    page = re.sub(r"(?ms)^```.*?^```$", lambda found: re.sub(r"[^\n]", "", found[0]), page)
    page = re.sub(r"(?m)^(\||    \S|#|\[).*$", "", page)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    for block in re.finditer(r"(?:[^\n]+\n?)+", page):
        at = block.start()
        for sentence in re.split(r"(?<=[.?!:])\s+|\n(?=\* )", block[0]):
            at = page.index(sentence, at)
            yield page.count("\n", 0, at) + 1, sentence


def test_no_sentence_of_the_docs_is_too_long_to_follow() -> None:
    found = [
        f"{file}:{line}: {len(sentence.split())} words: {' '.join(sentence.split()[:8])} ..."
        for file, text in pages().items()
        if file.endswith(".md")
        for line, sentence in sentences(text)
        if len(sentence.split()) > SENTENCE_WORDS_MAX
    ]
    if found:
        pytest.fail("\n".join(found), pytrace=False)
