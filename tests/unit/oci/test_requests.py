"""NetInfo, ShareInfo, RngInfo: what may be asked for, and what its name is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmplug.errors import SpecError
from vmplug.oci.requests import TAG_BYTES_MAX, NetInfo, Request, RngInfo, ShareInfo

KINDS = ("net", "share", "rng")


def make(kind: str, label: str = "a", path: str = "/p") -> NetInfo | ShareInfo | RngInfo:
    match kind:
        case "net":
            return NetInfo(label=label, socket_path=path)
        case "share":
            return ShareInfo(tag=label, source=path)
        case _:
            return RngInfo(label=label, source=path)


@pytest.mark.parametrize(
    ("request_", "name", "wanted", "read_only"),
    [
        (make("net", "eth0", "/run/e"), "net:eth0", "vhost-user network /run/e", False),
        (make("share", "work", "/srv"), "share:work", "share of /srv", False),
        (make("rng", "r", "/dev/hwrng"), "rng:r", "random numbers from /dev/hwrng", True),
        (RngInfo(), "rng:rng0", "random numbers from /dev/urandom", True),
    ],
)
def test_a_request_has_a_name_and_says_what_it_wants(
    request_: Request, name: str, wanted: str, *, read_only: bool
) -> None:
    assert (request_.name, request_.description) == (name, wanted)
    assert request_.read_only is read_only


def test_nothing_is_optional_but_options() -> None:
    for kind in KINDS:
        assert make(kind).driver_options == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["eth0", "a b", "ä", "a:b", "..", "fd:3", "-"])
def test_a_name_is_any_printable_text_without_a_slash(kind: str, label: str) -> None:
    assert make(kind, label).name == f"{kind}:{label}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["", "a/b", "/", "a\n", "\0", "\u2028", "\udcff", "\x1b[m"])
def test_any_other_name_is_refused_and_shown_harmless(kind: str, label: str) -> None:
    with pytest.raises(SpecError, match="printable text without '/'") as caught:
        make(kind, label)
    assert caught.value.where == f"{kind} {label!r}"
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["", "p", "./p", "~/p", "/a\0b", "fd:", "fd:x", "fd:-1", "FD:3"])
def test_a_source_is_an_absolute_path(kind: str, path: str) -> None:
    with pytest.raises(SpecError, match="is not an absolute path") as caught:
        make(kind, path=path)
    assert caught.value.where == f"{kind}:a"
    assert repr(path) in caught.value.message


@pytest.mark.parametrize("tag", ["x" * TAG_BYTES_MAX, "é" * (TAG_BYTES_MAX // 2)])
def test_the_longest_tag_is_taken_and_the_next_refused(tag: str) -> None:
    assert make("share", tag).name == f"share:{tag}"
    with pytest.raises(SpecError, match="at most 36 bytes") as caught:
        make("share", tag + "y")
    assert caught.value.where == f"share:{tag}y"
    assert make("net", tag + "y").name == f"net:{tag}y"
    assert make("rng", tag + "y").name == f"rng:{tag}y"


@given(st.integers(0, 10**9 - 1))
def test_a_share_may_name_an_open_descriptor(number: int) -> None:
    assert ShareInfo(tag="a", source=f"fd:{number}").descriptor == number


@pytest.mark.parametrize("source", ["/fd:3", "/srv", "/"])
def test_a_path_is_not_a_descriptor(source: str) -> None:
    assert ShareInfo(tag="a", source=source).descriptor is None


@pytest.mark.parametrize(
    "source", ["fd:٣", "fd:3 ", "fd:+3", "fd:0x3", f"fd:{10**9}", "fd:" + "9" * 5000]
)
def test_a_number_that_no_process_can_have_open_is_not_a_descriptor(source: str) -> None:
    with pytest.raises(SpecError) as caught:
        ShareInfo(tag="a", source=source)
    assert caught.value.where == "share:a"


@pytest.mark.parametrize("kind", ["net", "rng"])
def test_only_a_share_may_name_a_descriptor(kind: str) -> None:
    with pytest.raises(SpecError, match="'fd:3' is not an absolute path"):
        make(kind, path="fd:3")


@given(st.sampled_from(KINDS), st.text(), st.text())
def test_any_text_makes_a_request_or_is_refused(kind: str, label: str, path: str) -> None:
    error = made = None
    try:
        made = make(kind, label, path)
    except SpecError as caught:
        error = caught
    assert made is None or (made.name == f"{kind}:{label}" and "\0" not in path)
    assert error is None or error.where.startswith(kind)


def test_requests_can_be_members_of_a_set_whatever_their_options() -> None:
    one = ShareInfo(tag="a", source="/a", driver_options={"cache": "auto"})
    assert len({one, ShareInfo(tag="a", source="/a"), ShareInfo(tag="b", source="/a")}) == 3
