"""`vmplug detach`."""

from collections.abc import Sequence

import click

from vmplug.cli.options import complete_vm, json_option, state_dir_option, timeout_option
from vmplug.cli.render.output import attachment_json, print_json, progress
from vmplug.cli.render.text import one_line
from vmplug.cli.wiring import open_journal, open_manager, read_attachments
from vmplug.errors import HypervisorError, NotAttached
from vmplug.host.root import HostRoot
from vmplug.journal.records import Attachment
from vmplug.journal.state import State


@click.command("detach")
@click.argument("attachments", nargs=-1, metavar="[ATTACHMENT]...")
@click.option("--owner", metavar="ID", help="Everything that this owner holds.")
@click.option(
    "--vm", metavar="NAME", shell_complete=complete_vm, help="Only in this VM, with --owner."
)
@timeout_option
@state_dir_option
@json_option
def command(
    as_json: bool,
    state_dir: str,
    timeout_s: float,
    vm: str | None,
    owner: str | None,
    attachments: tuple[str, ...],
) -> None:
    """Take devices out of a VM again.

    An ATTACHMENT that was attached several times loses one count. A device is unplugged when its
    last owner lets go; a guest that does not answer in time leaves it "detaching", and the same
    command tries again.

    \b
    vmplug detach 0123456789abcdef
    vmplug detach --owner ctr1
    """
    if bool(attachments) == bool(owner):
        raise click.UsageError("name the attachments, or an --owner")
    with open_journal(state_dir) as journal:
        held = read_attachments(journal, vm)
    held = [hold for hold in held if hold.state is not State.RETAINED]
    chosen = [hold for hold in held if hold.owner == owner] if owner else _find(held, attachments)
    if not chosen:
        raise NotAttached(
            f"{owner} holds no device" + (f" of VM {vm}" if vm else ""),
            hint="vmplug list shows who holds what",
        )
    failures = []
    for name in dict.fromkeys(hold.vm for hold in chosen):
        ids = [hold.id for hold in chosen if hold.vm == name]
        try:
            with (
                open_manager(name, state_dir, host=HostRoot()) as devices,
                progress(f"waiting for the guest of VM {name} to let go"),
            ):
                devices.detach_all(ids, timeout_s=timeout_s, whole=bool(owner))
        except HypervisorError as error:  # one VM that is gone keeps no other from it
            failures.append(error)
    if failures:
        raise failures[0]
    with open_journal(state_dir) as journal:
        left = {hold.id: hold.state for hold in journal.attachments()}
    retained = {i for i, state in left.items() if state is State.RETAINED}
    if as_json:
        listed = [
            {
                **attachment_json(hold),
                "still_held": hold.id in left.keys() - retained,
                "retained": hold.id in retained,
            }
            for hold in chosen
        ]
        print_json({"detached": listed})
        return
    for hold in chosen:
        what = f"{hold.id}  {one_line(hold.host_path)}"
        if hold.id in retained:
            click.echo(f"released {what}  stays in VM {hold.vm} until that ends")
        else:
            verb = "still held" if hold.id in left else "detached"
            click.echo(f"{verb} {what}  from VM {hold.vm}")


def _find(held: Sequence[Attachment], ids: Sequence[str]) -> list[Attachment]:
    known = {hold.id: hold for hold in held}
    for attachment_id in ids:
        if attachment_id not in known:
            raise NotAttached(
                f"there is no attachment {attachment_id}",
                hint="vmplug list shows what there is",
            )
    return [known[attachment_id] for attachment_id in ids]
