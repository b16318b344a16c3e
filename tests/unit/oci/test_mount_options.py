"""Which mounts are for reading only: what is wrongly writable costs a tenant's data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmplug.oci.mount_options import is_bind, is_read_only

OF_THE_SPECIFICATION = (
    "async atime bind defaults dev diratime dirsync exec iversion lazytime loud noatime nodev "
    "nodiratime noexec noiversion nolazytime norelatime nostrictatime nosuid nosymfollow private "
    "ratime rbind rdev rdiratime relatime remount rexec rnoatime rnodiratime rnoexec rnorelatime "
    "rnostrictatime rnosuid rnosymfollow rprivate rrelatime rrw rshared rslave rstrictatime rsuid "
    "rsymfollow runbindable rw shared silent slave strictatime suid symfollow sync tmpcopyup "
    "unbindable idmap ridmap"
)
"""Every word that a runtime must know, except `ro` and `rro`.

Source: opencontainers/runtime-spec 1.2.1, config.md.
"""


@pytest.mark.parametrize("option", OF_THE_SPECIFICATION.split())
def test_no_other_word_of_the_specification_makes_a_mount_read_only(option: str) -> None:
    assert not is_read_only([option])
    assert not is_read_only(["rbind", option, "rw"])


@pytest.mark.parametrize(
    "options",
    [
        "ro",
        "rro",
        "rbind rprivate rro",
        "rprivate,rro",
        "rbind,ro",
        "rro rw",
        "rw rro",
        "ro rrw",
        "rrw rro",
        "ro rro",
        "readonly",
        "readonly=true rw",
        "ro=recursive",
        "ro=vfs rw",
        "bind-recursive=readonly",
        "RO",
    ],
)
def test_every_word_for_read_only_counts(options: str) -> None:
    assert is_read_only(options.split())


@pytest.mark.parametrize("options", [["ro", "rw"], ["rw", "ro"], ["ro", "bind", "rw", "rrw"]])
def test_of_words_that_contradict_each_other_the_safe_one_counts(options: list[str]) -> None:
    assert is_read_only(options)


def test_a_word_that_nobody_knows_does_not_make_a_mount_writable() -> None:
    assert is_read_only(["rbind", "ro-recursively"])
    assert is_read_only(["ro", "ro-recursively"])
    assert not is_read_only(["rbind", "ro-recursively", "rw"])


@pytest.mark.parametrize("options", ["", "rbind", "readonly=false", "ro=0 rw", "x-any.thing=ro"])
def test_without_a_word_for_it_a_mount_is_writable(options: str) -> None:
    assert not is_read_only(options.split())


@given(st.lists(st.text(max_size=8)), st.sampled_from(["ro", "rro"]), st.data())
def test_nothing_overrules_a_word_for_read_only(
    others: list[str], word: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(others)))
    assert is_read_only([*others[:at], word, *others[at:]])


@pytest.mark.parametrize(
    ("options", "is_one"),
    [
        (["rbind"], True),
        (["ro", "bind"], True),
        (["nosuid,rbind,ro"], True),
        ([" bind "], True),
        ([], False),
        (["ro", "rprivate"], False),
        (["bind-recursive=readonly"], False),
    ],
)
def test_the_options_say_what_is_a_bind_mount(options: list[str], *, is_one: bool) -> None:
    assert is_bind(options) is is_one
