"""`vmplug help`."""

import click

from vmplug.cli.options import completes


@click.command("help")
@click.argument("verbs", nargs=-1, metavar="[VERB]...", shell_complete=completes("verb"))
@click.pass_context
def command(ctx: click.Context, verbs: tuple[str, ...]) -> None:
    """How is a verb used? The same as `vmplug VERB --help`.

    \b
    vmplug help
    vmplug help attach
    vmplug help vm start
    """
    shown = ctx.find_root()
    for word in verbs:
        group = shown.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"{shown.command_path} has no verbs of its own", shown)
        name, found, _ = group.resolve_command(shown, [word])
        assert found
        shown = click.Context(found, parent=shown, info_name=name)
    click.echo(shown.get_help())
