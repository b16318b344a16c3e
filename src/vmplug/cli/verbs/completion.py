"""`vmplug completion`."""

import click
from click.shell_completion import get_completion_class

from vmplug.cli import complete  # noqa: F401  it has the class for bash


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    vmplug completion bash > /etc/bash_completion.d/vmplug
    vmplug completion fish > ~/.config/fish/completions/vmplug.fish
    """
    kind = get_completion_class(shell)
    assert kind
    click.echo(kind(ctx.find_root().command, {}, "vmplug", "_VMPLUG_COMPLETE").source())
