"""Mount options: is it a bind mount, and is that for reading only?

Engines write the words of the runtime specification; a guest can damage what is wrongly writable,
so every doubt means read-only: two words that contradict each other, and a word that is unknown.
Source: opencontainers/runtime-spec config.md, Linux mount options; runc
libcontainer/specconv/spec_linux.go; crun src/libcrun/mount_flags.perf; mount(8), ro=recursive.
"""

from collections.abc import Iterable

_READ_ONLY = frozenset({"ro", "rro", "readonly", "read-only"})
"""`rro` is for the mounts below it too. The long words are those of podman(1) and docker(1)."""
_WRITABLE = frozenset({"rw", "rrw"})

_FLAGS = (
    "async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime "
    "nodev nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid "
    "nosymfollow private relatime remount shared silent slave strictatime suid symfollow sync "
    "unbindable"
)
_RECURSIVE = (
    "atime bind dev diratime exec noatime nodev nodiratime noexec norelatime nostrictatime nosuid "
    "nosymfollow private relatime shared slave strictatime suid symfollow unbindable"
)
_KNOWN = frozenset(
    {
        *_FLAGS.split(),
        *(f"r{word}" for word in _RECURSIVE.split()),
        *("acl", "noacl", "copy-symlink", "idmap", "ridmap", "tmpcopyup", "copyup", "nocopyup"),
        *("copy", "nocopy", "src-nofollow", "dest-nofollow", "U", "Z", "z"),
    }
)
_KNOWN_KEYS = ("x-", "idmap=", "ridmap=", "mode=", "uid=", "gid=", "size=", "context=")


def is_read_only(options: Iterable[str]) -> bool:
    """Whether a mount with these options, in any order, must not be written to.

    A word for writing counts only where no word says read-only. A word that nobody knows may mean
    read-only, unless another says that the mount is for writing.
    """
    words = _words(options)
    if any(_says_read_only(word) for word in words):
        return True
    return not words & _WRITABLE and any(not _is_harmless(word) for word in words)


def is_bind(options: Iterable[str]) -> bool:
    """Whether they make it a bind mount: its type says nothing then, whatever it is."""
    return not _words(options).isdisjoint(_BIND)


_BIND = frozenset({"bind", "rbind"})


def _words(options: Iterable[str]) -> set[str]:
    return {word.strip() for option in options for word in option.split(",")} - {""}


def _says_read_only(word: str) -> bool:
    """`ro`, and with a value that is not a plain no: `ro=recursive`, `bind-recursive=readonly`."""
    key, _, value = word.lower().partition("=")
    if key == "bind-recursive":
        return value in _READ_ONLY
    return key in _READ_ONLY and value not in {"false", "0", "no", "off"}


def _is_harmless(word: str) -> bool:
    """Whether it is known to say nothing about writing."""
    key = word.partition("=")[0].lower()
    return word in _KNOWN or key in _READ_ONLY or word.startswith(_KNOWN_KEYS)
