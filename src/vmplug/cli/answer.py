"""`vmplug`: the group of verbs, loaded when asked for, and how errors reach people."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from vmplug.cli.group import VerbGroup
from vmplug.cli.progress import Interrupted, with_verbose
from vmplug.cli.render.terminal import Style, say
from vmplug.errors import (
    DeviceError,
    HostError,
    HypervisorError,
    PolicyError,
    SpecError,
    StateError,
    StoreError,
)
from vmplug.text import one_line

_VERBS = {
    "host": "what could this host hand over, and what holds it?",
    "info": "what does the container ask for?",
    "resolve": "what is that on this host?",
    "check": "may it be handed over? every problem with its remedy",
    "plan": "what would attach do? every step with its undo",
    "attach": "plug the devices into a VM",
    "detach": "take them out again",
    "list": "what is plugged where?",
    "watch": "what happens to the host devices that VMs have?",
    "resize": "give the guest a disk's new size",
    "bind": "give a PCI function and its group to VFIO",
    "unbind": "give them back to the drivers that they had",
    "sriov": "virtual functions: show, create, configure",
    "mdev": "mediated devices: create, remove",
    "reconcile": "make the journal and the VMs agree",
    "import-kata": "take over what Kata Containers has plugged",
    "vm": "start, adopt, stop and list VMs",
    "lease": "hand devices to any process for as long as it runs",
    "cdi": "devices by name: list, show, validate, inject into a config.json, write",
    "device-plugin": "offer devices to Kubernetes; show them, give them back",
    "record": "write what vmplug reads of this host into a file, for a bug report",
    "completion": "shell completion for bash, zsh or fish",
    "help": "how is a verb used?",
}

_BUG, _USAGE, _HOST = 1, 2, 4
_SIGINT, _SIGPIPE = 130, 141
_EXIT_STATUS = (
    (SpecError, 3),
    (PolicyError, 3),
    (HostError, _HOST),
    (HypervisorError, 5),
    (StateError, 6),
    (StoreError, 6),
)


class _Verbs(VerbGroup):
    """Imports a verb's module only when that verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _VERBS:
            return None
        module = import_module(f"vmplug.cli.verbs.{cmd_name.replace('-', '_')}")
        return with_verbose(module.command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.command(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 99},
    epilog="Exit status: 0 done, 1 a bug of vmplug, 2 usage, 3 bad request or not allowed, "
    "4 host, 5 hypervisor, 6 wrong state.",
)
@click.version_option(package_name="vmplug", message="%(prog)s %(version)s")
def main() -> None:
    """Hand host devices to containers that run inside virtual machines.

    \b
    vmplug vm start sb1 --kernel vmlinuz --initrd initrd.img
    vmplug check bundle/
    vmplug attach bundle/ --vm sb1
    vmplug detach --owner bundle
    """


def answer(words: Sequence[str]) -> int:
    """Run the verb of these words, without ending the process; gives the exit status.

    Errors become one sentence and a hint.
    """
    stdout = sys.stdout
    if "_VMPLUG_COMPLETE" in os.environ:
        import_module("vmplug.cli.complete")
    try:
        status = main.main(args=[*words], prog_name="vmplug", standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()
        return int(status or 0)
    except SystemExit as end:  # click ends shell completion so, and a broken pipe
        return _SIGPIPE if sys.stdout is not stdout else int(end.code or 0)
    except Interrupted as interrupt:
        for what, hint in interrupt.told(as_one="--json" in words):
            message = f"interrupted: {what}"
            _print_error("interrupted", message, hint, {}, wants_json="--json" in words)
        return _SIGINT
    except (click.Abort, KeyboardInterrupt):
        return _SIGINT
    except BrokenPipeError:
        return _SIGPIPE
    except Exception as error:  # noqa: BLE001  an error that no verb foresaw is reported too
        return _report(error, words)


def _report(error: Exception, words: Sequence[str]) -> int:
    """Report an error, and return its exit status."""
    wants_json = "--json" in words
    match error:
        case DeviceError():
            _print_error(error.code, error.message, error.hint, error.facts, wants_json=wants_json)
            for note in () if wants_json else error.notes:
                say(f"vmplug: {one_line(note)}", Style.ERROR, err=True)
            return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            return _USAGE
        case click.UsageError():
            message = " ".join(error.format_message().split())
            hint = f"{_verb(words)} --help"
            _print_error(
                "usage", message[:1].lower() + message[1:], hint, {}, wants_json=wants_json
            )
            return _USAGE
        case FileNotFoundError(filename=None) if not _has_working_directory():
            message = "the working directory does not exist any more"
            hint = "change to another directory, or pass absolute paths"
            _print_error("no-directory", message, hint, {}, wants_json=wants_json)
            return _HOST
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG | errno.EIO, filename=None):
            message = f"the answer cannot be written: {error.strerror}"
            _print_error("cannot-write", message, None, {}, wants_json=wants_json)
            return _HOST
        case _:
            if "VMPLUG_DEBUG" in os.environ:
                sys.excepthook(type(error), error, error.__traceback__)
            message = f"a bug of vmplug: {type(error).__name__}: {error}"
            hint = "set VMPLUG_DEBUG=1 and report what it prints"
            _print_error("bug", message, hint, {}, wants_json=wants_json)
            return _BUG


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _verb(words: Sequence[str]) -> str:
    """The verb on the command line, as far as there is one: `vmplug vm adopt`."""
    command: click.Command = main
    path = ["vmplug"]
    for word in words:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        if found is None:
            break
        command = found
        path.append(word)
    return " ".join(path)


def _print_error(
    code: str, message: str, hint: str | None, facts: dict[str, object], *, wants_json: bool
) -> None:
    """Print one error on stderr. A message begins in lower case, unless with a name."""
    if wants_json:
        import json  # noqa: PLC0415  3 ms, 4 % of `resolve`

        error = {"code": code, "message": message, "hint": hint, "facts": facts}
        click.echo(json.dumps({"version": 1, "error": error}, default=str), err=True)
        return
    say(f"vmplug: {one_line(message.rstrip('.'))}", Style.ERROR, err=True)
    if hint:
        say(f"hint: {one_line(hint)}", err=True)
