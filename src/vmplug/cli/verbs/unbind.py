"""`vmplug unbind`."""

import click

from vmplug.cli.options import json_option, root_option, state_dir_option
from vmplug.cli.render.output import print_json, print_table, progress
from vmplug.cli.target import find_group
from vmplug.cli.wiring import open_journal
from vmplug.host.pci.bind import read_driver
from vmplug.host.root import HostRoot
from vmplug.manager.binding.binder import Binder


@click.command("unbind")
@click.argument("function")
@root_option
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, root: str, function: str) -> None:
    """Give a PCI function, with its whole IOMMU group, back to the driver that it had.

    Only what vmplug has bound is given back. It is refused while a VM or a process has the group.
    FUNCTION may also be a node of VFIO, /dev/vfio/26.

    \b
    vmplug unbind 0000:3b:00.0
    vmplug unbind /dev/vfio/26 --json
    """
    host = HostRoot(root)
    group = find_group(function, host)
    with open_journal(state_dir) as journal, progress(f"giving {function} back"):
        returned = {told.former.bdf: told for told in Binder(journal, host).unbind(group)}
    functions = [
        {
            "address": str(member.bdf),
            "former_driver": member.driver,
            "driver": read_driver(member.bdf, host),
            "outcome": str(returned[member.bdf].outcome) if member.bdf in returned else "left",
        }
        for member in group.functions
    ]
    if as_json:
        print_json({"iommu_group": group.number, "functions": functions})
        return
    print_table(
        ("FUNCTION", "FORMER", "NOW", "OUTCOME"),
        [
            (
                str(row["address"]),
                str(row["former_driver"] or "-"),
                str(row["driver"] or "-"),
                "left: vmplug has not bound it"
                if row["outcome"] == "left"
                else str(row["outcome"]),
            )
            for row in functions
        ],
    )
