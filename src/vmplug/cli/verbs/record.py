"""`vmplug record`."""

import click

from vmplug.cli.options import AnsweringPath, json_option, root_option
from vmplug.cli.progress import progress
from vmplug.cli.render.output import print_json
from vmplug.host.record.write import write_record
from vmplug.host.root import HostRoot
from vmplug.text import one_line


@click.command("record")
@click.argument("file", type=AnsweringPath(dir_okay=False), metavar="FILE.tar")
@click.option("--force", is_flag=True, help="Replace the file if it is there already.")
@root_option
@json_option
def command(as_json: bool, root: str, force: bool, file: str) -> None:
    """Write what vmplug reads of this host into a tar file, for a bug report.

    Every reading verb takes the file in place of a host: `vmplug host --root FILE.tar`. It holds
    links and small text files of /sys, the device nodes that they name, and tables of /proc:
    mounts, which name directories and files of this host, swap areas, routes and interrupts. It
    holds nothing of what is stored on the host's disks. Prints what it could not read, as happens
    without root. A file whose name ends in .gz or .tgz is compressed.

    \b
    vmplug record report.tar
    vmplug record report.tgz --force
    vmplug check --device vfio:0000:3b:00.0 --root report.tar
    """
    with progress("reading /sys, /proc and /dev"):
        recorded = write_record(file, HostRoot(root), replace=force)
    if as_json:
        print_json(
            {
                "file": file,
                "files": recorded.files,
                "links": recorded.links,
                "nodes": recorded.nodes,
                "unreadable": list(recorded.unreadable),
            }
        )
        return
    click.echo(
        f"{one_line(file)} holds {recorded.files} files, {recorded.links} links and "
        f"{recorded.nodes} device nodes"
    )
    for line in recorded.unreadable:
        click.echo(f"could not be read: {one_line(line)}")
