"""What a verb is asked for: a BUNDLE, devices, and how they are wanted.

Separate from the options of all verbs: those that only list have no request. msgspec, and what is
made with it, are imported where they are used: it costs 9 ms, an eighth of `resolve`, which does
without.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from vmplug.cli.options import (
    AnsweringPath,
    completes,
    host_option,
    open_root,
    open_store,
    policy_option,
    store_option,
)
from vmplug.errors import SpecError
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.policy.find import find_policy

if TYPE_CHECKING:
    from vmplug.host.vhost_user.store import VhostUserStore
    from vmplug.manager.setup import Setup
    from vmplug.oci.requests import Request
    from vmplug.policy.rules import Policy

F = TypeVar("F", bound=Callable[..., Any])


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


def _parse_options(texts: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--option {text}", "write it as KEY=VALUE")
        if options.setdefault(key, value) != value:
            raise SpecError(f"--option {key}", "passed twice, with different values")
    return options
