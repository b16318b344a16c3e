"""Every block of commands or code that a person reads: README, docs, and the help of verbs.

Above a block of a page stands a comment that nobody sees: `<!-- run: SCENE -->` names the scene of
tests/docs/scenes.py in which it runs, `<!-- not run: WHY -->` says why it cannot.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from vmplug.cli.answer import main
from vmplug.manager.manager import DeviceManager

PROJECT = Path(__file__).parents[2]
RUN = {"sh", "console", "python", "json", "toml"}
"""What of a page is run or read. `text` is a picture, or a message."""

HELP: Mapping[str, str] = {
    "vmplug": "help_to_begin_with",
    "vmplug record": "help_about_the_host",
    "vmplug host": "help_about_the_host",
    "vmplug info": "help_about_the_host",
    "vmplug resolve": "help_about_the_host",
    "vmplug check": "help_about_the_host",
    "vmplug completion": "help_about_the_host",
    "vmplug help": "help_about_the_host",
    "vmplug plan": "help_about_devices",
    "vmplug list": "help_about_devices",
    "vmplug watch": "help_about_devices",
    "vmplug resize": "help_about_devices",
    "vmplug detach": "help_about_devices",
    "vmplug attach": "help_about_devices",
    "vmplug vm list": "help_about_devices",
    "vmplug vm stop": "help_about_devices",
    "vmplug reconcile": "help_about_repair",
    "vmplug vm start": "help_about_starting",
    "vmplug vm adopt": "another_qemu",
    "vmplug import-kata": "kata_sandbox",
    "vmplug cdi": "cdi_specs",
    "vmplug cdi list": "cdi_specs",
    "vmplug cdi show": "cdi_specs",
    "vmplug cdi validate": "cdi_specs",
    "vmplug cdi inject": "cdi_specs",
    "vmplug cdi write": "cdi_specs",
    "vmplug lease run": "help_about_leases",
    "vmplug lease list": "help_about_leases",
    "vmplug lease": "help_about_leases",
    "vmplug lease end": "another_lease",
}
"""The scene of the help of each verb that is run; the order is that in which one can do it."""

CANNOT = {
    r"3b:00\.0|/dev/vfio/\d|host 26": "needs a PCI device behind an IOMMU: tests/lab",
    r"mdev (create|remove)": "needs a device that offers some: tests/lab",
    r"/dev/disk/by-id": "needs a disk of that name",
    r"crictl": "needs a CRI engine",
    r"device-plugin": "needs a kubelet: tests/unit/kubernetes",
    r"lvextend": "needs a volume group",
    r"vmplug watch( --vm sb1 --json \|.*)?$": "runs until it is stopped: tests/cli/test_watch.py",
    r"cdi write --watch": "runs until it is stopped: tests/cli/test_cdi_watch.py",
    r"vm resume": "needs a VM that an error has stopped: tests/cli/test_io_errors.py",
}
"""Examples in the help of verbs, and why they are not run."""

_FENCED = re.compile(
    r"^(?:<!-- (?P<how>run|not run): (?P<what>.+?) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PROMPT = re.compile(r"^[#$] ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`scene` is None for one that is not run, and `why` says why then."""

    page: str
    line: int
    language: str
    text: str
    scene: str | None
    why: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> str:
        """The verb whose help it is from."""
        return self.page.removesuffix(" --help")


def blocks() -> list[Block]:
    """All of them."""
    return [
        *page_blocks(PROJECT / "README.md"),
        manager_block(),
        *(
            block
            for page in sorted((PROJECT / "docs").glob("*.md"))
            for block in page_blocks(page)
        ),
        *sorted(help_blocks("vmplug", main), key=_turn),
    ]


def _turn(block: Block) -> int:
    """When the help of this verb has its turn."""
    return [*HELP].index(block.words) if block.words in HELP else len(HELP)


def page_blocks(path: Path) -> Iterator[Block]:
    """Those of a page."""
    text = path.read_text()
    for match in _FENCED.finditer(text):
        is_run = match["how"] == "run"
        yield Block(
            page=path.relative_to(PROJECT).as_posix(),
            line=text[: match.start("text")].count("\n"),
            language=match["language"],
            text=match["text"],
            scene=match["what"] if is_run else None,
            why=None if is_run else match["what"],
        )


def manager_block() -> Block:
    """What `help(vmplug.DeviceManager)` begins with."""
    _, code, _ = inspect.cleandoc(DeviceManager.__doc__ or "").split("\n\n", 2)
    code = inspect.cleandoc(f"\n{code}")
    return Block(
        page="help(vmplug.DeviceManager)",
        line=3,
        language="python",
        text=f"import vmplug\n\n{code}\n",
        scene="running_vm",
    )


def help_blocks(words: str, command: click.Command) -> Iterator[Block]:
    """The examples of a verb, which its help has as they are, without those that cannot be run."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            verb = command.get_command(click.Context(command), name)
            assert verb
            yield from help_blocks(f"{words} {name}", verb)
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines = paragraph.removeprefix("\b\n").replace("\\\n", "").splitlines()
            run = [line for line in lines if not any(re.search(word, line) for word in CANNOT)]
            text = "".join(f"{line}\n" for line in run)
            page, scene = f"{words} --help", HELP.get(words)
            if text:
                yield Block(page=page, line=1, language="sh", text=text, scene=scene)


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a block, each with what it prints there."""
    if block.language == "sh":
        text = re.sub(r" +# .*", "", block.text.replace("\\\n", ""))
        return [(line, "") for line in text.splitlines() if line.strip()]
    _, *pieces = _PROMPT.split(block.text)
    found = (piece.partition("\n") for piece in pieces)
    return [(command, output) for command, _, output in found]
