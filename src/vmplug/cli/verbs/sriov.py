"""`vmplug sriov`."""

from contextlib import suppress
from typing import Any, NamedTuple

import click

from vmplug.address import Bdf
from vmplug.cli.options import (
    allow_option,
    json_option,
    parse_allow,
    root_option,
    state_dir_option,
)
from vmplug.cli.render.output import print_json, print_table, progress
from vmplug.cli.target import parse_function
from vmplug.cli.wiring import open_journal
from vmplug.errors import BindError
from vmplug.host.pci.function import read_function
from vmplug.host.pci.sriov import (
    VfSettings,
    VirtualFunction,
    find_interface,
    read_virtual,
    set_virtual,
)
from vmplug.host.root import HostRoot
from vmplug.manager.binding.subdevices import divide, find_sriov, read_interface


@click.command("sriov")
@click.argument("function")
@click.option(
    "--count", type=click.IntRange(min=0), metavar="N", help="Have that many virtual functions."
)
@click.option(
    "--autoprobe",
    type=click.Choice(["on", "off"]),
    help="Whether the host's drivers take new ones; only with --count.",
)
@click.option(
    "--vf", "number", type=click.IntRange(min=0), metavar="I", help="Tell the I-th one, from 0."
)
@click.option("--mac", metavar="ADDRESS", help="Its network address.")
@click.option("--vlan", type=int, metavar="ID", help="Its VLAN, 1 to 4094; 0 for none.")
@click.option(
    "--trust",
    type=click.Choice(["on", "off"]),
    help="Whether it may change its address and listen to everything.",
)
@allow_option
@root_option
@state_dir_option
@json_option
def command(
    as_json: bool,
    state_dir: str,
    root: str,
    allow: tuple[str, ...],
    function: str,
    **options: Any,
) -> None:
    """Show the virtual functions of a physical one, change their number, or tell one what it is.

    To change the number takes away all that there are first, which is refused while one of them is
    in use. What a virtual function of a network is told goes by way of the physical one's
    interface, with ip(8).

    \b
    vmplug sriov 3b:00.0
    vmplug sriov 3b:00.0 --count 4
    vmplug sriov 3b:00.0 --vf 2 --mac 02:00:00:00:00:02 --vlan 100 --trust off
    """
    bdf, host, allowed = parse_function(function), HostRoot(root), parse_allow(allow)
    count, autoprobe, number = (options.pop(name) for name in ("count", "autoprobe", "number"))
    wanted = _wanted(**options)
    _check_options(count, autoprobe, number, wanted)
    if number is not None:
        set_virtual(read_interface(bdf, host), number, wanted)
    elif count is not None:
        with open_journal(state_dir) as journal, progress(f"dividing {bdf}"):
            divide(
                bdf,
                count,
                journal=journal,
                host=host,
                autoprobe=None if autoprobe is None else autoprobe == "on",
                allow=allowed,
            )
    _show(_read(bdf, host), as_json=as_json)


def _wanted(*, mac: str | None, vlan: int | None, trust: str | None) -> VfSettings:
    return VfSettings(mac, vlan, None if trust is None else trust == "on").checked()


def _check_options(
    count: int | None, autoprobe: str | None, number: int | None, wanted: VfSettings
) -> None:
    says_something = wanted != VfSettings()
    if count is not None and (number is not None or says_something):
        raise click.UsageError("say --count, or --vf with what to tell it, one at a time")
    if says_something and number is None:
        raise click.UsageError("say --vf: which virtual function?")
    if number is not None and not says_something:
        raise click.UsageError("say --mac, --vlan or --trust: what is it told?")
    if autoprobe is not None and count is None:
        raise click.UsageError("--autoprobe goes with --count")


class _Shown(NamedTuple):
    bdf: Bdf
    total: int
    autoprobe: bool
    interface: str | None
    functions: list[dict[str, object]]


def _read(bdf: Bdf, host: HostRoot) -> _Shown:
    found = find_sriov(bdf, host)
    interface = find_interface(bdf, host)
    told: dict[int, VirtualFunction] = {}
    if interface and found.virtfns:
        with suppress(BindError):  # a host without ip, or with an interface of another namespace
            told = {virtual.number: virtual for virtual in read_virtual(interface)}
    functions = []
    for number, virtfn in enumerate(found.virtfns):
        facts, virtual = read_function(virtfn, host), told.get(number, VirtualFunction(number))
        functions.append(
            {
                "number": number,
                "address": str(virtfn),
                "driver": facts.driver,
                "iommu_group": facts.iommu_group,
                "mac": virtual.mac,
                "vlan": virtual.vlan,
                "trust": virtual.trust,
            }
        )
    return _Shown(bdf, found.total, found.autoprobe, interface, functions)


def _show(shown: _Shown, *, as_json: bool) -> None:
    if as_json:
        facts = shown._asdict()
        print_json({"address": str(facts.pop("bdf")), **facts})
        return
    count = len(shown.functions)
    click.echo(f"{shown.bdf} has {count} of {shown.total} virtual functions")
    print_table(
        ("VF", "FUNCTION", "DRIVER", "GROUP", "MAC", "VLAN", "TRUST"),
        [tuple(_text(value) for value in function.values()) for function in shown.functions],
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)
