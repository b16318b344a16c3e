"""What <Tab> offers: names out of the journal, of this host, and of the options of drivers.

It creates nothing, and says nothing where it cannot read: a mistake is reported by the verb.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    split_arg_string,
)

from vmplug.cdi.registry import DEFAULT_DIRECTORIES, read_directories
from vmplug.drivers import block, rng, share, vfio, vhost_user
from vmplug.drivers.options import Option
from vmplug.errors import HostError, PolicyError, StoreError
from vmplug.host.finding import NEVER_ALLOWED, Code
from vmplug.host.root import THIS_HOST
from vmplug.host.use.claim import LEASE_PREFIX
from vmplug.journal import DEFAULT_STATE_DIR
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.policy.find import find_policy

T = TypeVar("T")
Item = CompletionItem[str]

_BASH = r"""
%(complete_func)s() {
    local IFS=$'\n' breaks=${COMP_WORDBREAKS//[^:=]/} type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                [[ $value == *[:=] ]] && compopt -o nospace
                ;;
        esac
    done < <(
        COMP_WORDS=${COMP_LINE:0:COMP_POINT} VMPLUG_WORDBREAKS=$breaks \
            %(complete_var)s=bash_complete "$1"
    )
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """bash ends a word at each ':' and '='; vmplug's words have both: `b:8:16`, `cache=none`.

    So it reads the line, not bash's words, and answers without what bash takes for other words.
    """

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The whole words of the line up to the cursor, and the one at the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        return words[1:], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[Item]:
        """Without what is already on the line, as far as bash sees another word in it."""
        items = super().get_completions(args, incomplete)
        value = incomplete.partition("=")[2] if incomplete.startswith("--") else incomplete
        breaks = os.environ.get("VMPLUG_WORDBREAKS", "")
        kept = max((value.rfind(character) + 1 for character in breaks), default=0)
        for item in items:
            if item.type == "plain" and item.value.startswith(value):
                item.value = item.value[kept:]
        return items


add_completion_class(_Bash)


def vm(ctx: click.Context, incomplete: str) -> list[Item]:
    """VMs that the journal knows."""
    return _starting(_read(ctx, lambda journal: [vm.name for vm in journal.vms()]), incomplete)


def lease(ctx: click.Context, incomplete: str) -> list[Item]:
    """Leases that the journal knows."""
    records = _read(ctx, lambda journal: [r for r in journal.all_holders() if r.is_lease])
    return _starting([record.name.removeprefix(LEASE_PREFIX) for record in records], incomplete)


def attachment(ctx: click.Context, incomplete: str) -> list[Item]:
    """The ids of what is attached and of its devices, each with what it is."""
    known = {}
    for hold in _holds(ctx):
        what = f"{hold.host_path} in {hold.vm}"
        known[hold.id] = f"{what} for {hold.owner}"
        known.setdefault(hold.device_id, what)
    for name in ctx.params.get("attachments") or ():
        known.pop(name, None)
    return _starting(known, incomplete)


def owner(ctx: click.Context, incomplete: str) -> list[Item]:
    """Owners that hold something."""
    return _starting(dict.fromkeys(hold.owner for hold in _holds(ctx)), incomplete)


def allow(ctx: click.Context, incomplete: str) -> list[Item]:
    """Codes that can be allowed, without those that already are."""
    codes = (code for code in Code if code not in NEVER_ALLOWED)
    return _starting(_others(codes, ctx.params.get("allow")), incomplete)


def option(ctx: click.Context, incomplete: str) -> list[Item]:
    """`cache=` and, after that, `cache=none`: of the kinds of device that the line asks for."""
    devices = ctx.params.get("devices") or ()
    tables = [_options_of(name, ctx) for name in devices] or [_ALL_OPTIONS]
    known = {key: option for table in tables for key, option in table.items()}
    key, equals, _ = incomplete.partition("=")
    if equals:
        words = known[key].words if key in known else ()
        return _starting([f"{key}={word}" for word in words], incomplete)
    said = {text.partition("=")[0] for text in ctx.params.get("driver_options") or ()}
    keys = {f"{name}=": known[name].help for name in known if name not in said}
    return _starting(keys, incomplete)


def verb(ctx: click.Context, incomplete: str) -> list[Item]:
    """The verbs below those that the line has."""
    group: click.Command | None = ctx.find_root().command
    for word in ctx.params.get("verbs") or ():
        group = group.get_command(ctx, word) if isinstance(group, click.Group) else None
    return _starting(
        group.list_commands(ctx) if isinstance(group, click.Group) else (), incomplete
    )


def thing(ctx: click.Context, incomplete: str) -> list[Item]:  # noqa: ARG001  as the others
    """Addresses of functions, and nodes of block devices."""
    return _starting([*_functions(), *_disks()], incomplete)


def function(ctx: click.Context, incomplete: str) -> list[Item]:  # noqa: ARG001  as the others
    """Addresses of functions."""
    return _starting(_functions(), incomplete)


def device(ctx: click.Context, incomplete: str) -> list[Item]:
    """Paths, `b:8:16`, `vfio:0000:3b:00.0`, CDI names, or the words that these begin with."""
    kind, colon, rest = incomplete.partition(":")
    if incomplete.startswith("/") or (kind in _PATHS and colon and ":" not in rest):
        return [Item(rest if colon else incomplete, type="file")]
    known: Mapping[str, str | None] = {**dict.fromkeys(_disks()), **_WORDS, **_cdi_names(ctx)}
    if kind == "b" and colon:
        known = {f"b:{number}": node for number, node in _numbers()}
    elif kind == "vfio" and colon:
        known = dict.fromkeys(f"vfio:{name}" for name in _functions())
    return _starting(known, incomplete)


def cdi_device(ctx: click.Context, incomplete: str) -> list[Item]:
    """CDI devices of the directories on the line, each with its file; not those named already."""
    registry = read_directories(ctx.params.get("spec_dirs") or DEFAULT_DIRECTORIES)
    said = ctx.params.get("names") or ()
    files = {name: d.source.file for name, d in registry.devices.items() if name not in said}
    return _starting(files, incomplete)


def _cdi_names(ctx: click.Context) -> dict[str, str]:
    """Each with its file, of the directories that the policy lists."""
    try:
        policy = find_policy(ctx.params.get("policy"))
    except PolicyError:
        return {}
    directories = None if policy is None else policy.cdi_directories
    registry = read_directories(DEFAULT_DIRECTORIES if directories is None else directories)
    return {name: found.source.file for name, found in registry.devices.items()}


_PATHS = frozenset({"file", "nvdimm", "share", "net", "rng"})
_WORDS = {
    "b:": "a disk by MAJOR:MINOR",
    "c:": "a character device by MAJOR:MINOR",
    "file:": "a disk made of an image",
    "nvdimm:": "persistent memory made of an image",
    "vfio:": "a PCI function with its group",
    "net:": "a vhost-user network by its socket",
    "share:": "a share by DIRECTORY:TAG",
    "rng": "random numbers",
}
"""Without commas: click's script for fish ends a description there."""

_OPTIONS_OF_KIND: Mapping[str, Mapping[str, Option]] = {
    "net": vhost_user.NET_OPTIONS,
    "share": share.OPTIONS,
    "rng": rng.OPTIONS,
    "vfio": vfio.OPTIONS,
}
_STORED_OPTIONS = {**vhost_user.BLK_OPTIONS, **vhost_user.SCSI_OPTIONS}
_ALL_OPTIONS = {
    key: option
    for table in (*_OPTIONS_OF_KIND.values(), _STORED_OPTIONS, block.OPTIONS)
    for key, option in table.items()
}


def _options_of(name: str, ctx: click.Context) -> Mapping[str, Option]:
    disk = block.OPTIONS
    if ctx.params.get("vhost_user_store"):
        disk = {**_STORED_OPTIONS, **disk}
    return _OPTIONS_OF_KIND.get(name.partition(":")[0], disk)


def _starting(known: Iterable[str], incomplete: str) -> list[Item]:
    """Those that begin so; the values of a mapping are their descriptions."""
    described = known if isinstance(known, Mapping) else {}
    return [Item(name, help=described.get(name)) for name in known if name.startswith(incomplete)]


def _others(known: Iterable[str], said: Iterable[str] | None) -> list[str]:
    return [name for name in known if name not in (said or ())]


def _read(ctx: click.Context, ask: Callable[[Journal], list[T]]) -> list[T]:
    """What the journal on the line says; nothing where there is none to be read."""
    try:
        with Journal.open_existing(ctx.params.get("state_dir") or DEFAULT_STATE_DIR) as journal:
            return ask(journal)
    except StoreError:
        return []


def _holds(ctx: click.Context) -> list[Attachment]:
    name = ctx.params.get("vm")
    return _read(ctx, lambda journal: journal.attachments(name))


def _functions() -> list[str]:
    return _list(THIS_HOST.pci_devices)


def _disks() -> list[str]:
    return [f"/dev/{name.replace('!', '/')}" for name in _list("/sys/class/block")]


def _numbers() -> Iterator[tuple[str, str]]:
    for name in _list("/sys/class/block"):
        number = THIS_HOST.read_text(f"/sys/class/block/{name}/dev")
        if number:
            yield number.strip(), f"/dev/{name.replace('!', '/')}"


def _list(directory: str) -> list[str]:
    try:
        return THIS_HOST.list_dir(directory)
    except HostError:
        return []
