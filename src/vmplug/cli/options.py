"""Options that several verbs share, and what they mean.

msgspec, and what is made with it, are imported where they are used: msgspec costs 9 ms, an eighth
of `resolve`, which does without.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmplug.errors import SpecError
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.journal import DEFAULT_STATE_DIR, STATE_DIR_VARIABLE
from vmplug.manager import UNPLUG_TIMEOUT_S
from vmplug.policy import DEFAULT_POLICY

if TYPE_CHECKING:
    from vmplug.address import Bdf
    from vmplug.host.finding import Code
    from vmplug.host.vhost_user.store import VhostUserStore

F = TypeVar("F", bound=Callable[..., Any])


class AnsweringPath(click.Path):
    """A path of the caller, and never an empty one, which would be taken for another.

    Raises AttributeReadError when its storage does not answer.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        from vmplug.host.use.silent import require_answer  # noqa: PLC0415

        require_answer(os.fspath(value), THIS_HOST)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """How long to wait: a number, however large, but not `nan`."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:  # noqa: PLR0124
            self.fail(f"{value} is not a time", param, ctx)
        return seconds


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Answer with one JSON document."
)
root_option = click.option(
    "--root",
    type=AnsweringPath(exists=True, file_okay=False),
    default="/",
    help="Read /sys, /proc and /dev below this directory instead of this host's.",
)
host_option = click.option(
    "--root",
    type=AnsweringPath(exists=True),
    default="/",
    help="Read /sys, /proc and /dev below this directory, or out of this file of `vmplug record`, "
    "instead of this host's.",
)
state_dir_option = click.option(
    "--state-dir",
    type=AnsweringPath(file_okay=False),
    default=DEFAULT_STATE_DIR,
    envvar=STATE_DIR_VARIABLE,
    show_default=True,
    show_envvar=True,
    help="Where the journal is.",
)
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(),
    default=UNPLUG_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the guest.",
)
store_option = click.option(
    "--vhost-user-store",
    type=AnsweringPath(),
    metavar="DIR",
    help="The host's vhost-user store; vmplug looks up block majors 241 and 242 there.",
)


def completes(what: str) -> Callable[..., Any]:
    """What <Tab> offers: a function of `vmplug.cli.complete`."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:  # noqa: ARG001  click's
        from vmplug.cli import complete as offers  # noqa: PLC0415  30 ms, only for <Tab>

        return getattr(offers, what)(ctx, incomplete)

    return complete


vm_option = click.option(
    "--vm",
    "vm",
    required=True,
    metavar="NAME",
    shell_complete=completes("vm"),
    help="The VM's name.",
)


policy_option = click.option(
    "--policy",
    "policy",
    type=AnsweringPath(),
    metavar="FILE",
    envvar="VMPLUG_POLICY",
    show_envvar=True,
    help="Rules for what may be handed over, and where CDI names are looked for; default: "
    f"{DEFAULT_POLICY}, if it exists.",
)


owner_option = click.option(
    "--owner",
    metavar="ID",
    shell_complete=completes("owner"),
    help="The owner of the devices; default: the bundle directory's name.",
)
allow_option = click.option(
    "--allow",
    "allow",
    multiple=True,
    metavar="CODE",
    shell_complete=completes("allow"),
    help="Hand over in spite of this finding of `check`; pass it once for each code.",
)


managed_option = click.option(
    "--managed",
    is_flag=True,
    help="Bind PCI functions to VFIO if needed; detach gives them back.",
)


def open_root(path: str) -> HostRoot:
    """The host below a directory, or in a file that `vmplug record` wrote.

    Raises SpecError for a file that is not a record.
    """
    if os.path.isdir(path):
        return HostRoot(path)
    from vmplug.host.record.read import read_record  # noqa: PLC0415  tarfile too, 29 ms in all

    return read_record(path)


def open_store(path: str, host: HostRoot) -> "VhostUserStore":
    """The vhost-user store in that directory of the host."""
    from vmplug.host.vhost_user.store import VhostUserStore  # noqa: PLC0415  msgspec: 9 ms

    return VhostUserStore(os.path.abspath(path), root=host)  # QEMU works in another directory


def parse_function(text: str) -> "Bdf":
    """`0000:3b:00.0`, or `3b:00.0` for domain 0000. Raises SpecError."""
    from vmplug.address import Bdf  # noqa: PLC0415  msgspec: 9 ms

    try:
        return Bdf.parse_written(text)
    except ValueError:
        raise SpecError(
            repr(text),
            "not the address of a PCI function",
            hint="write 0000:3b:00.0 or 3b:00.0",
        ) from None


def parse_allow(words: Sequence[str]) -> "frozenset[Code]":
    """The codes of `--allow`; SpecError for a word that is not one, such as `all`."""
    from vmplug.host.finding import NEVER_ALLOWED, Code  # noqa: PLC0415  msgspec: 9 ms

    known = {str(code): code for code in Code if code not in NEVER_ALLOWED}
    for word in words:
        if word not in known:
            raise SpecError(
                f"--allow {word}",
                "not a finding that can be allowed",
                hint="one of " + ", ".join(known),
            )
    return frozenset(known[word] for word in words)
