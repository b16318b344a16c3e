"""`vmplug sriov`."""

from typing import Any

import click

from vmplug.cli.options import (
    allow_option,
    completes,
    json_option,
    parse_allow,
    parse_function,
    root_option,
    state_dir_option,
)
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json
from vmplug.cli.render.table import print_table
from vmplug.host.pci.sriov import VfSettings
from vmplug.host.root import HostRoot
from vmplug.manager.binding.virtual_functions import (
    PhysicalFunction,
    VfStatus,
    configure_virtual_function,
    read_virtual_functions,
    set_virtual_function_count,
)
from vmplug.manager.setup import Setup


@click.command("sriov")
@click.argument("function", shell_complete=completes("function"))
@click.option(
    "--count",
    type=click.IntRange(min=0),
    metavar="N",
    help="Create this number of virtual functions.",
)
@click.option(
    "--autoprobe",
    type=click.Choice(["on", "off"]),
    help="Whether the host's drivers take new ones; only with --count.",
)
@click.option(
    "--vf",
    "number",
    type=click.IntRange(min=0),
    metavar="I",
    help="Configure the I-th one, from 0.",
)
@click.option("--mac", metavar="ADDRESS", help="Its network address.")
@click.option("--vlan", type=int, metavar="ID", help="Its VLAN, 1 to 4094; 0 for none.")
@click.option(
    "--trust",
    type=click.Choice(["on", "off"]),
    help="Whether it may change its address and receive all traffic.",
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
    """Show the virtual functions of a physical one, change their number, or configure one.

    Changing the number removes all existing ones first, and is refused while one of them is in
    use. A network's virtual function is configured with ip(8), through the physical function's
    interface.

    \b
    vmplug sriov 3b:00.0
    vmplug sriov 3b:00.0 --count 4
    vmplug sriov 3b:00.0 --vf 2 --mac 02:00:00:00:00:02 --vlan 100 --trust off
    """
    bdf, allowed = parse_function(function), parse_allow(allow)
    setup = Setup(host=HostRoot(root), state_dir=state_dir)
    count, autoprobe, number = (options.pop(name) for name in ("count", "autoprobe", "number"))
    settings = _settings(**options)
    _check_options(count, autoprobe, number, settings)
    if number is not None:
        now = configure_virtual_function(bdf, number, settings, setup=setup)
    elif count is not None:
        with at_work(f"dividing {bdf}", setup):
            now = set_virtual_function_count(
                bdf,
                count,
                autoprobe=None if autoprobe is None else autoprobe == "on",
                allow=allowed,
                setup=setup,
            )
    else:
        now = read_virtual_functions(bdf, setup=setup)
    if as_json:
        print_json(_json(now))
    else:
        _print(now)


def _settings(*, mac: str | None, vlan: int | None, trust: str | None) -> VfSettings:
    return VfSettings(mac=mac, vlan=vlan, trust=None if trust is None else trust == "on").checked()


def _check_options(
    count: int | None, autoprobe: str | None, number: int | None, settings: VfSettings
) -> None:
    says_something = settings != VfSettings()
    if count is not None and (number is not None or says_something):
        raise click.UsageError("pass --count, or --vf with its settings, one at a time")
    if says_something and number is None:
        raise click.UsageError("pass --vf: which virtual function?")
    if number is not None and not says_something:
        raise click.UsageError("pass --mac, --vlan or --trust: there is nothing to configure")
    if autoprobe is not None and count is None:
        raise click.UsageError("--autoprobe goes with --count")


def _json(function: PhysicalFunction) -> dict[str, Any]:
    return {
        "address": str(function.bdf),
        "total": function.total,
        "autoprobe": function.autoprobe,
        "interface": function.interface,
        "functions": [_facts(virtual) for virtual in function.functions],
    }


def _facts(virtual: VfStatus) -> dict[str, object]:
    return {
        "number": virtual.number,
        "address": str(virtual.bdf),
        "driver": virtual.driver,
        "iommu_group": virtual.iommu_group,
        "mac": virtual.mac,
        "vlan": virtual.vlan,
        "trust": virtual.trust,
    }


def _print(function: PhysicalFunction) -> None:
    count = len(function.functions)
    click.echo(f"{function.bdf} has {count} of {function.total} virtual functions")
    print_table(
        ("VF", "FUNCTION", "DRIVER", "GROUP", "MAC", "VLAN", "TRUST"),
        [
            tuple(_text(value) for value in _facts(virtual).values())
            for virtual in function.functions
        ],
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)
