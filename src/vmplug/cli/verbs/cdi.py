"""`vmplug cdi`: devices by name; list, show, validate, inject and write."""

import click

from vmplug.cdi.inject import apply
from vmplug.cdi.registry import DEFAULT_DIRECTORIES
from vmplug.cli.cdi.read import find_devices, read_config, read_files, read_named
from vmplug.cli.cdi.render import (
    device_json,
    device_lines,
    files_json,
    print_devices,
    print_files,
    print_unusable,
    registry_json,
)
from vmplug.cli.group import VerbGroup
from vmplug.cli.options import (
    AnsweringPath,
    completes,
    host_option,
    json_option,
    open_root,
    policy_option,
    store_option,
)
from vmplug.cli.render.output import print_document, print_json
from vmplug.cli.render.tree import print_sections

_INVALID, _LEFT_OUT = 3, 4

_spec_dir_option = click.option(
    "--spec-dir",
    "spec_dirs",
    multiple=True,
    type=AnsweringPath(),
    metavar="DIR",
    help="Read the specs of this directory, not of "
    f"{' and '.join(DEFAULT_DIRECTORIES)}; may be passed several times, lowest priority first.",
)


@click.group("cdi", cls=VerbGroup)
def command() -> None:
    """Which devices have names for containers, and what does a name stand for?

    The Container Device Interface: files in /etc/cdi and /var/run/cdi define devices by names as
    vendor.com/class=name. `write` makes such files; the others only read. See docs/cdi.md.

    \b
    vmplug cdi list
    vmplug cdi show vendor.com/gpu=gpu0
    vmplug cdi validate ./vendor.yaml
    vmplug cdi inject bundle/ vendor.com/gpu=gpu0
    vmplug cdi write --dry-run
    """


@command.command("list")
@_spec_dir_option
@json_option
def list_(as_json: bool, spec_dirs: tuple[str, ...]) -> None:
    """Which devices do the specs of this host define?

    What cannot be used is reported on stderr: files with a mistake, and devices that two files of
    one directory define. They change nothing for the others, nor the exit status.

    \b
    vmplug cdi list
    vmplug cdi list --spec-dir ./cdi --json
    """
    registry = read_named(spec_dirs)
    if as_json:
        print_json(registry_json(registry))
        return
    print_devices(registry)
    print_unusable(registry)


@command.command("show")
@click.argument(
    "names",
    nargs=-1,
    required=True,
    metavar="NAME...",
    shell_complete=completes("cdi_device"),
)
@_spec_dir_option
@json_option
def show(as_json: bool, spec_dirs: tuple[str, ...], names: tuple[str, ...]) -> None:
    """What does a name stand for, and which file defines it?

    Shows all that the device does to a container, with the numbers that its nodes have on this
    host. The exit status is 4 for a name that no usable file defines.

    \b
    vmplug cdi show vendor.com/gpu=gpu0
    vmplug cdi show vendor.com/gpu=gpu0 vendor.com/gpu=gpu1 --json
    """
    registry = read_named(spec_dirs)
    found = find_devices(registry, names)
    if as_json:
        print_json({"devices": [device_json(each, registry) for each in found]})
    else:
        print_sections([device_lines(each, registry) for each in found])


@command.command("validate")
@click.argument("paths", nargs=-1, type=AnsweringPath(), metavar="[FILE|DIR]...")
@_spec_dir_option
@json_option
@click.pass_context
def validate(
    ctx: click.Context, /, *, as_json: bool, spec_dirs: tuple[str, ...], paths: tuple[str, ...]
) -> None:
    """Are the specs valid? Prints every mistake with file, field and what is right.

    Without a FILE or DIR, validates those of the directories that engines read. FILE may be - for
    standard input. The exit status is 3 if a file breaks a rule, or if two files of one directory
    define one device.

    \b
    vmplug cdi validate
    vmplug cdi validate ./vendor.yaml ./cdi
    vmplug cdi validate - --json < vendor.json
    """
    checked = read_files(paths, spec_dirs)
    if as_json:
        print_json(files_json(checked))
    else:
        print_files(checked)
    if not checked.are_valid:
        ctx.exit(_INVALID)


@command.command("inject")
@click.argument("bundle", type=AnsweringPath())
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completes("cdi_device"))
@_spec_dir_option
@json_option
def inject(as_json: bool, spec_dirs: tuple[str, ...], names: tuple[str, ...], bundle: str) -> None:
    """What does an engine make of the container's config.json, for these devices?

    Prints the config.json with the devices, all of them or none; the file itself stays as it is.
    Without a NAME, it injects the devices that the annotations cdi.k8s.io/* of the container name.
    BUNDLE is an OCI bundle directory, a config.json, or - for standard input. With --json, the
    answer has it as "config".

    The exit status is 4 for a name that no usable file defines, 3 for a node that is missing.

    \b
    vmplug cdi inject bundle/ vendor.com/gpu=gpu0 > config.json
    crictl inspect ID | jq .info.runtimeSpec | vmplug cdi inject - vendor.com/gpu=gpu0
    """
    config = read_config(bundle)
    found = find_devices(read_named(spec_dirs), names, config)
    injected = apply(config, found)
    if as_json:
        print_json({"devices": [each.name for each in found], "config": injected})
    else:
        print_document(injected)


@command.command("write")
@click.option(
    "--directory",
    type=AnsweringPath(),
    metavar="DIR",
    help=f"Write to this directory; default: {DEFAULT_DIRECTORIES[-1]}.",
)
@click.option("--watch", is_flag=True, help="Keep the files true until Ctrl-C or SIGTERM.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and change nothing.")
@policy_option
@store_option
@host_option
@json_option
@click.pass_context
def write(
    ctx: click.Context,
    /,
    *,
    as_json: bool,
    root: str,
    vhost_user_store: str | None,
    policy: str | None,
    dry_run: bool,
    watch: bool,
    directory: str | None,
) -> None:
    """Give names to what the policy lets this host hand over.

    Writes a file for each kind: vmplug.org/vfio-VENDOR-CLASS and vmplug.org/mdev-TYPE, whose
    devices are vfioN or the number of the IOMMU group; vmplug.org/disk, by the names in
    /dev/disk/by-id; and vmplug.org/vhost-user-blk and vhost-user-scsi, the nodes of the store.
    What the policy allows only read-only is written so. A device in use keeps its name: `vmplug
    check` asks about that.

    Files of kinds that have gone are removed. A file that vmplug did not write, or that somebody
    has edited since, is left alone. The exit status is 4 if something that the policy allows could
    get no name.

    \b
    vmplug cdi write --dry-run
    vmplug cdi write --policy ./policy.toml --directory ./cdi --json
    vmplug cdi write --watch --vhost-user-store /run/vhost-user
    """
    if dry_run and watch:
        raise click.UsageError("--dry-run changes nothing, and --watch keeps changing: pass one")
    host = open_root(root)
    if not host.is_live and (watch or directory is None):
        raise click.UsageError("with --root, pass --directory, and no --watch: it is another host")
    from vmplug.cli.cdi import write as writing  # noqa: PLC0415  300 ms that the others do without

    where = DEFAULT_DIRECTORIES[-1] if directory is None else directory
    read_setup = writing.setup_reader(host, policy=policy, vhost_user_store=vhost_user_store)
    if watch:
        writing.keep_printing(where, read_setup, as_json=as_json)
    else:
        is_whole = writing.write_once(where, read_setup(), dry_run=dry_run, as_json=as_json)
        ctx.exit(0 if is_whole else _LEFT_OUT)
