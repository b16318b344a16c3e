"""`vmplug unbind`."""

import click

from vmplug.cli.options import completes, json_option, root_option, state_dir_option
from vmplug.cli.progress import at_work
from vmplug.cli.render.output import print_json
from vmplug.cli.render.table import print_table
from vmplug.host.root import HostRoot
from vmplug.manager.binding.groups import ReturnedFunction, unbind_device
from vmplug.manager.setup import Setup


@click.command("unbind")
@click.argument("function", shell_complete=completes("function"))
@root_option
@state_dir_option
@json_option
def command(as_json: bool, state_dir: str, root: str, function: str) -> None:
    """Give a PCI function, with its whole IOMMU group, back to its former driver.

    Gives back only what vmplug has bound. Refused while a VM or a process uses the group. FUNCTION
    may also be a VFIO node, such as /dev/vfio/26.

    \b
    vmplug unbind 0000:3b:00.0
    vmplug unbind /dev/vfio/26 --json
    """
    setup = Setup(host=HostRoot(root), state_dir=state_dir)
    with at_work(f"giving {function} back", setup):
        group = unbind_device(function, setup=setup)
    if as_json:
        functions = [_json(member) for member in group.functions]
        print_json({"iommu_group": group.number, "functions": functions})
        return
    print_table(
        ("FUNCTION", "FORMER", "NOW", "OUTCOME"),
        [
            (
                str(member.bdf),
                member.former_driver or "-",
                member.driver or "-",
                str(member.outcome or "left: vmplug has not bound it"),
            )
            for member in group.functions
        ],
    )


def _json(function: ReturnedFunction) -> dict[str, object]:
    return {
        "address": str(function.bdf),
        "former_driver": function.former_driver,
        "driver": function.driver,
        "outcome": str(function.outcome or "left"),
    }
