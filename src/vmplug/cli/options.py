"""Arguments that several verbs share, and what they mean.

msgspec, and what is made with it, are imported where they are used: msgspec costs 9 ms, an eighth
of `resolve`, which does without.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from vmplug.errors import SpecError
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.journal import DEFAULT_STATE_DIR, STATE_DIR_VARIABLE
from vmplug.manager import UNPLUG_TIMEOUT_S
from vmplug.policy import DEFAULT_POLICY
from vmplug.policy.find import find_policy

if TYPE_CHECKING:
    from vmplug.address import Bdf
    from vmplug.host.finding import Code
    from vmplug.host.vhost_user.store import VhostUserStore
    from vmplug.manager.setup import Setup
    from vmplug.oci.requests import Request
    from vmplug.policy.rules import Policy

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


def request_options(command: F) -> F:
    """BUNDLE (or a device in its place), --device and how the devices are wanted."""
    return click.argument("bundle", required=False, type=AnsweringPath())(device_options(command))


def device_options(command: F) -> F:
    """--device and how the devices are wanted."""
    for decorate in (
        policy_option,
        store_option,
        host_option,
        click.option(
            "-o",
            "--option",
            "driver_options",
            multiple=True,
            metavar="KEY=VALUE",
            shell_complete=completes("option"),
            help="An option of every disk and --device; `vmplug attach --help` lists them.",
        ),
        click.option("--read-only", is_flag=True, help="Ask for every device read-only."),
        click.option(
            "-d",
            "--device",
            "devices",
            multiple=True,
            metavar="DEVICE",
            shell_complete=completes("device"),
            help="Ask for NODE[:PATH] such as /dev/sdb, b:MAJOR:MINOR[:PATH], "
            "c:MAJOR:MINOR[:PATH], file:IMAGE[:PATH], nvdimm:IMAGE[:PATH], "
            "vfio:BDF (also: a mediated device's UUID, /dev/vfio/N), "
            "net:SOCKET, share:DIRECTORY:TAG (also: a virtiofsd's socket, fd:N), rng[:SOURCE] or "
            "a CDI name, VENDOR/CLASS=NAME; "
            "PATH is the one in the container. :ro at the end asks for it read-only.",
        ),
    ):
        command = decorate(command)
    return command


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


class RequestArguments(NamedTuple):
    """What the arguments ask for: the devices, the bundle's name, and where to look.

    `resolved_annotations` are those of the bundle that no guest may get.
    """

    requests: "tuple[Request, ...]"
    name: str | None
    host: HostRoot
    vhost_user_store: "VhostUserStore | None"
    find_policy: "Callable[[], Policy | None]"
    resolved_annotations: tuple[str, ...] = ()

    def setup(self, state_dir: str) -> "Setup":
        """The host that is meant, with its journal and the policy that holds."""
        from vmplug.manager.setup import Setup  # noqa: PLC0415  msgspec: 9 ms

        return Setup(
            host=self.host,
            state_dir=state_dir,
            vhost_user_store=self.vhost_user_store,
            policy=self.find_policy(),
        )


def require_owner(owner: str | None, asked: RequestArguments) -> str:
    """`--owner`, or else the bundle's name. Raises UsageError where there is neither."""
    if owner or asked.name:
        return owner or str(asked.name)
    raise click.UsageError("pass --owner: there is no bundle directory to name the owner after")


def read_request(
    *,
    bundle: str | None,
    devices: Sequence[str],
    read_only: bool,
    driver_options: Sequence[str],
    root: str,
    vhost_user_store: str | None,
    policy: str | None,
) -> RequestArguments:
    """The request that `request_options` describe. Raises UsageError, SpecError or HostError."""
    from vmplug.cli.device import names_cdi_device, names_device  # noqa: PLC0415  5 ms, with requests

    host, load_policy = open_root(root), cache(partial(find_policy, policy))
    if bundle is not None and names_device(bundle, host):
        devices = (bundle if names_cdi_device(bundle) else os.path.abspath(bundle), *devices)
        bundle = None
    requests = _parse_devices(devices, host, load_policy)
    options = _parse_options(driver_options)
    annotated: Sequence[Request] = ()
    name = None
    resolved: tuple[str, ...] = ()
    if bundle is not None:
        from vmplug.host.block.volumes import find_requests  # noqa: PLC0415  msgspec: 9 ms
        from vmplug.host.use.silent import require_answer  # noqa: PLC0415
        from vmplug.oci.spec import read_bundle  # noqa: PLC0415  msgspec: 9 ms

        require_answer(os.path.join(bundle, "config.json"), THIS_HOST)
        asked = read_bundle(bundle)
        directories = _cdi_directories(load_policy) if asked.cdi_annotations else None
        requests = [*find_requests(asked, host, directories), *requests]
        name, annotated = asked.name, asked.annotated
        resolved = asked.resolved_annotations
    elif not requests:
        raise click.UsageError("name a BUNDLE, or a device with --device")
    wanted = tuple(
        _wanted(info, {} if info in annotated else options, read_only=read_only)
        for info in requests
    )
    _check_names(wanted)
    store = open_store(vhost_user_store, host) if vhost_user_store else None
    return RequestArguments(
        requests=wanted,
        name=name,
        host=host,
        vhost_user_store=store,
        find_policy=load_policy,
        resolved_annotations=resolved,
    )


def _parse_devices(
    texts: Sequence[str], host: HostRoot, load_policy: "Callable[[], Policy | None]"
) -> "list[Request]":
    """What `--device` asks for, and then what its CDI names bring."""
    from vmplug.cli.device import (  # noqa: PLC0415  as above
        names_cdi_device,
        parse_cdi_names,
        parse_device,
        request_read_only,
    )

    named = parse_cdi_names(filter(names_cdi_device, texts))
    requests: list[Request] = [
        parse_device(text, host) for text in texts if not names_cdi_device(text)
    ]
    if named:
        from vmplug.host.cdi.find import find_cdi_devices  # noqa: PLC0415  msgspec: 9 ms

        for info in find_cdi_devices(named, host, _cdi_directories(load_policy)):
            is_read_only = any(named[name] for name in info.cdi_names)
            requests.append(request_read_only(info) if is_read_only else info)
    return requests


def _cdi_directories(load_policy: "Callable[[], Policy | None]") -> Sequence[str] | None:
    policy = load_policy()
    return None if policy is None else policy.cdi_directories


def _wanted(info: "Request", options: Mapping[str, str], *, read_only: bool) -> "Request":
    """The request with what was passed for all of them; what is only counted has no options."""
    from vmplug.cli.device import request_read_only  # noqa: PLC0415
    from vmplug.oci.info import DeviceInfo, DevType  # noqa: PLC0415

    info = request_read_only(info) if read_only else info
    wanted = {**info.driver_options, **options}
    if isinstance(info, DeviceInfo):
        return info._replace(driver_options=wanted) if info.dev_type is DevType.BLOCK else info
    from msgspec import structs  # noqa: PLC0415  9 ms, but `info` was made with it

    return structs.replace(info, driver_options=wanted)


def _check_names(requests: "Iterable[Request]") -> None:
    """SpecError when one name is asked for as two things."""
    known: dict[str, Request] = {}
    for info in requests:
        if (one := known.setdefault(info.name, info)) != info:
            raise SpecError(
                info.name, f"is asked for twice: {_told(one, info)} and {_told(info, one)}"
            )


def _told(info: "Request", other: "Request") -> str:
    """A request, with how it differs from another one for what may be the same thing."""
    mode = ", read-only" if info.read_only and not other.read_only else ""
    options = (
        f", {key}={value}"
        for key, value in info.driver_options.items()
        if other.driver_options.get(key) != value
    )
    return f"{info.description}{mode}{''.join(options)}"


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


def _parse_options(texts: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--option {text}", "write it as KEY=VALUE")
        if options.setdefault(key, value) != value:
            raise SpecError(f"--option {key}", "passed twice, with different values")
    return options


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
