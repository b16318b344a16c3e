"""`vmplug attach`."""

import click

from vmplug.cli.options import (
    allow_option,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    state_dir_option,
    vm_option,
)
from vmplug.cli.progress import at_work
from vmplug.cli.render.attachments import attachments_json, print_attachments
from vmplug.cli.render.output import print_json, resolved_json
from vmplug.cli.request import read_request, request_options, require_owner
from vmplug.drivers import block, rng, share, vfio, vhost_user
from vmplug.vms.connect import connect_vm

_KINDS = {
    "a disk": block.OPTIONS,
    "a vhost-user-blk device": vhost_user.BLK_OPTIONS,
    "a vhost-user-scsi device": vhost_user.SCSI_OPTIONS,
    "a vhost-user network": vhost_user.NET_OPTIONS,
    "a share": share.OPTIONS,
    "random numbers": rng.OPTIONS,
    "a VFIO device": vfio.OPTIONS,
}
_OPTIONS_HELP = "\n\n".join(
    f"\b\nOptions of {kind} (-o KEY=VALUE):\n"
    + "\n".join(f"  {key:12} {option.help}" for key, option in options.items())
    for kind, options in _KINDS.items()
)


@click.command(
    "attach",
    epilog=_OPTIONS_HELP,
)
@request_options
@vm_option
@owner_option
@allow_option
@managed_option
@state_dir_option
@json_option
def command(
    *,
    as_json: bool,
    state_dir: str,
    allow: tuple[str, ...],
    managed: bool,
    owner: str | None,
    vm: str,
    **request: object,
) -> None:
    """Plug the devices into a VM, all of them or none, and print where the guest sees them.

    A device that the VM already has is counted, and stays until its last owner detaches it.
    Character devices are counted and never given to the VM.

    \b
    vmplug attach bundle/ --vm sb1
    vmplug attach --device /dev/sdb:/dev/xvda --vm sb1 --owner ctr1 -o discard=unmap
    vmplug attach --device file:/images/a.qcow2 -o format=qcow2 --vm sb1 --owner ctr1
    vmplug attach --device share:/srv/work:work --read-only --vm sb1 --owner ctr1
    vmplug attach --device vfio:0000:3b:00.0 --managed --vm sb1 --owner ctr1
    vmplug attach --device vendor.com/disk=data --vm sb1 --owner ctr1
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    setup = asked.setup(state_dir)
    with at_work(f"attaching to VM {vm}", setup), connect_vm(vm, setup=setup) as devices:
        attachments = devices.attach_all(
            asked.requests,
            owner=require_owner(owner, asked),
            allow=parse_allow(allow),
            managed=managed,
        )
        held = devices.attachments()
    if as_json:
        listed = attachments_json(attachments, held)
        resolved = resolved_json(asked.resolved_annotations)
        print_json({"vm": vm, "attachments": listed, **resolved})
        return
    print_attachments(attachments, with_vm=False)
    if not attachments:
        click.echo("no devices are asked for")
