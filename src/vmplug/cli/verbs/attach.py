"""`vmplug attach`."""

import click

from vmplug.cli.options import (
    allow_option,
    json_option,
    managed_option,
    owner_option,
    parse_allow,
    policy_option,
    read_request,
    request_options,
    state_dir_option,
    vm_option,
)
from vmplug.cli.render.output import attachment_json, print_attachments, print_json
from vmplug.cli.wiring import find_policy, open_manager
from vmplug.drivers import block, rng, share, vfio, vhost_user

_KINDS = {
    "a disk": block.OPTIONS,
    "a vhost-user-blk device": vhost_user.BLK_OPTIONS,
    "a vhost-user-scsi device": vhost_user.SCSI_OPTIONS,
    "a vhost-user network": vhost_user.NET_OPTIONS,
    "a shared directory": share.OPTIONS,
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
@policy_option
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
    policy: str | None,
    **request: object,
) -> None:
    """Plug the devices into a VM, all of them or none, and tell where the guest sees them.

    A device that the VM has already is only counted: it stays until its last owner lets go.
    Character devices are counted and never given to the VM.

    \b
    vmplug attach bundle/ --vm sb1
    vmplug attach --device b:7:0:/dev/xvda --vm sb1 --owner ctr1 -o cache=none -o discard=unmap
    vmplug attach --device file:/images/a.qcow2 -o format=qcow2 --vm sb1 --owner ctr1
    vmplug attach --device share:/srv/work:work --read-only --vm sb1 --owner ctr1
    vmplug attach --device vfio:0000:3b:00.0 --managed --vm sb1 --owner ctr1
    """
    asked = read_request(**request)  # type: ignore[arg-type]
    owner = owner or asked.name
    if owner is None:
        raise click.UsageError("say --owner: there is no bundle directory to take a name from")
    allowed = parse_allow(allow)
    with open_manager(
        vm,
        state_dir,
        host=asked.host,
        vhost_user_store=asked.vhost_user_store,
        policy=find_policy(policy),
    ) as devices:
        attachments = devices.attach_all(
            asked.requests, owner=owner, allow=allowed, managed=managed
        )
    if as_json:
        listed = [attachment_json(attachment) for attachment in attachments]
        print_json({"vm": vm, "attachments": listed})
        return
    print_attachments(attachments, with_vm=False)
    if not attachments:
        click.echo("no devices are asked for")
