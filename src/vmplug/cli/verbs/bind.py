"""`vmplug bind`."""

import click

from vmplug.cli.options import (
    allow_option,
    json_option,
    parse_allow,
    root_option,
    state_dir_option,
)
from vmplug.cli.render.output import print_json, print_table, progress
from vmplug.cli.target import find_group
from vmplug.cli.wiring import open_journal
from vmplug.host.pci.bind import read_driver
from vmplug.host.root import HostRoot
from vmplug.manager.binding.binder import Binder


@click.command("bind")
@click.argument("function")
@click.option(
    "--driver",
    metavar="NAME",
    help="A driver of VFIO; default: the variant that the kernel has for the function, or "
    "vfio-pci.",
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
    driver: str | None,
    function: str,
) -> None:
    """Give a PCI function, with its whole IOMMU group, to VFIO.

    What the host uses is refused, as `vmplug check` would: a mounted disk, a network interface
    with an address. `vmplug unbind` gives every function back to the driver that it had; functions
    that VFIO has already stay as they are. FUNCTION may also be a node of VFIO, /dev/vfio/26.

    \b
    vmplug bind 0000:3b:00.0
    vmplug bind 3b:00.0 --driver mlx5_vfio_pci
    vmplug bind 3b:00.0 --allow network-in-use --json
    """
    host, allowed = HostRoot(root), parse_allow(allow)
    group = find_group(function, host)
    with open_journal(state_dir) as journal, progress(f"binding {function} to VFIO"):
        bound = Binder(journal, host).bind(group, driver=driver, allow=allowed)
    former = {binding.bdf: binding.former for binding in bound}
    functions = [
        {
            "address": str(member.bdf),
            "former_driver": former[member.bdf].driver if member.bdf in former else member.driver,
            "driver": read_driver(member.bdf, host),
            "bound_by_vmplug": member.bdf in former,
        }
        for member in group.functions
    ]
    if as_json:
        node = None if group.number is None else f"/dev/vfio/{group.number}"
        print_json({"iommu_group": group.number, "group_node": node, "functions": functions})
        return
    print_table(
        ("FUNCTION", "FORMER", "NOW"),
        [
            (str(row["address"]), str(row["former_driver"] or "-"), str(row["driver"] or "-"))
            for row in functions
        ],
    )
    if group.mediated:
        click.echo(f"{group.mediated.uuid} is a mediated device: it needs no binding")
