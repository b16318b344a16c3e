"""The tar files that records are: Python's tarfile reads what is written here, and vice versa."""

import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmplug.host.record.tar import (
    BLOCK_BYTES,
    FILE,
    LINK,
    TarError,
    make_header,
    padding,
    read_content,
    read_members,
)

END = bytes(2 * BLOCK_BYTES)
PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n"), min_size=1, max_size=60)
PATH = st.lists(PART.filter(lambda part: part not in {".", ".."}), min_size=1, max_size=8).map(
    "/".join
)
FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


def members_in(data: bytes) -> list[tuple[str, bytes, str, bytes]]:
    file = io.BytesIO(data)
    return [
        (member.name, member.type, member.target, read_content(member, file))
        for member in read_members(file)
    ]


@given(PATH, PATH, st.binary(max_size=2000))
def test_tarfile_reads_what_is_written(name: str, target: str, content: bytes) -> None:
    written = make_header(name, FILE, size_bytes=len(content), keywords={"VMPLUG.x": "y"})
    written += content + padding(len(content)) + make_header("link", LINK, target=target) + END
    with tarfile.open(fileobj=io.BytesIO(written)) as tar:
        file, link = tar.getmembers()
        found = tar.extractfile(file)
        assert found
        assert (file.name, found.read()) == (name, content)
        assert file.pax_headers["VMPLUG.x"] == "y"
        assert (link.name, link.linkname) == ("link", target)
    assert members_in(written) == [(name, FILE, "", content), ("link", LINK, target, b"")]


@pytest.mark.parametrize("form", FORMATS)
@given(PATH, PATH, st.binary(max_size=2000))
def test_what_tarfile_writes_is_read(form: int, name: str, target: str, content: bytes) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as tar:
        file, link = tarfile.TarInfo(name), tarfile.TarInfo("link")
        file.size, link.type, link.linkname = len(content), tarfile.SYMTYPE, target
        tar.addfile(file, io.BytesIO(content))
        tar.addfile(link)
    assert members_in(written.getvalue()) == [
        (name, FILE, "", content),
        ("link", LINK, target, b""),
    ]


@pytest.mark.parametrize("length", range(90, 270))
def test_a_name_of_any_length(length: int) -> None:
    name = ("a" * 50 + "/") * (length // 51) + "b" * (length % 51 or 1)
    with tarfile.open(fileobj=io.BytesIO(make_header(name, FILE) + END)) as tar:
        assert tar.getnames() == [name]
    assert [member[0] for member in members_in(make_header(name, FILE) + END)] == [name]


@given(st.integers(0, BLOCK_BYTES - 1), st.integers(1, 255))
def test_a_header_that_was_changed_is_no_header(at: int, by: int) -> None:
    header = bytearray(make_header("sys/a", FILE, size_bytes=0))
    if 148 <= at < 156:  # its sum; a blank for a zero there says the same
        header[148:156] = b"%06o\0 " % by
    else:
        header[at] = (header[at] + by) % 256
    with pytest.raises(TarError):
        members_in(bytes(header) + END)


@pytest.mark.parametrize("raw", [b"sys/caf\xe9", b"\xff" * 99 + b"/" + b"\xff" * 100])
def test_a_name_that_is_not_utf8_is_kept(raw: bytes) -> None:
    """Also one whose bytes have the largest sum."""
    name = os.fsdecode(raw)
    assert members_in(make_header(name, FILE) + END) == [(name, FILE, "", b"")]
