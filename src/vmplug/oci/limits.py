"""Limits of a request: a tenant wrote it, and root reads it.

Each limit is above what an engine writes and below what would keep the host busy. A request beyond
a limit raises SpecError with the limit and what was found.
"""

from vmplug.errors import SpecError

CONFIG_BYTES_MAX = 16 << 20
"""The longest config.json: as much as containerd accepts in one message.

Source: containerd defaults/defaults.go, DefaultMaxRecvMsgSize.
"""

NESTING_MAX = 64
"""The deepest JSON; the OCI specification's own goes 8 deep (linux.seccomp.syscalls.args)."""

DEVICES_MAX = 16384
"""Entries of linux.devices; a privileged container has one for each node of its host's /dev."""

RULES_MAX = 16384
"""Entries of linux.resources.devices; engines write one for each device."""

MOUNTS_MAX = 16384
"""Entries of mounts; the kernel lets a namespace have 100 000. Source: Linux fs.mount-max."""

MOUNT_OPTIONS_MAX = 256
"""Options of one mount; mount(8) and fuse together know about a hundred."""

ANNOTATION_BYTES_MAX = 256 << 10
"""One annotation's value: a Kubernetes object may have as much in all its annotations.

Source: Kubernetes apimachinery/pkg/api/validation, TotalAnnotationSizeLimitB.
"""

ANNOTATION_KEY_BYTES_MAX = 4096 + 64
"""One annotation's name: `org.vmplug.options.` and a path."""

REQUESTS_MAX = 1024
"""Annotations that request a device; a VM has no places for more."""

OPTIONS_MAX = 64
"""Members of one annotation; no driver knows half as many options."""

OPTION_BYTES_MAX = 4096
"""An option's text; the longest are paths."""

REQUEST_S = 300.0
"""How long vmplug works on one request, unless the policy sets it: a thousand devices take a
tenth of that."""

PATH_BYTES_MAX = 4095
"""A path. Source: Linux include/uapi/linux/limits.h, PATH_MAX, which counts the NUL."""

NAME_BYTES_MAX = 255
"""One name of a path; also the name of a network, a share, an owner.

Source: Linux include/uapi/linux/limits.h, NAME_MAX.
"""


def check_count(where: str, what: str, found: int, most: int) -> None:
    """SpecError when there are more than `most`."""
    if found > most:
        raise SpecError(where, f"{found} {what}; at most {most} are allowed")


def check_text(where: str, text: str, most: int) -> None:
    """SpecError when the text has more than `most` bytes."""
    length = len(text.encode("utf-8", "surrogatepass"))
    if length > most:
        raise SpecError(where, f"{text[:40]!r}... has {length} bytes; at most {most} are allowed")


def check_path(where: str, path: str) -> None:
    """SpecError for what is too long to be a path on Linux, or has a name too long in it."""
    check_text(where, path, PATH_BYTES_MAX)
    if len(path) * 3 > NAME_BYTES_MAX:  # most are far shorter
        for name in path.split("/"):
            check_text(where, name, NAME_BYTES_MAX)
