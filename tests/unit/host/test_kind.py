"""Identities: values whose text is what the journal keeps."""

import pytest

from vmplug.devnum import DevNum
from vmplug.host.kind import Identity, IdentityKind

UUID = "f79944e4-5a3d-11e8-99ce-479cbab002e4"


@pytest.mark.parametrize(
    ("text", "identity", "devnum", "path"),
    [
        ("block:7:0", Identity.of_block(DevNum(7, 0)), DevNum(7, 0), None),
        ("char:1:3", Identity(IdentityKind.CHAR, "1:3"), DevNum(1, 3), None),
        ("fifo:/dev/pipe", Identity(IdentityKind.FIFO, "/dev/pipe"), None, "/dev/pipe"),
        ("file:/srv/a:b", Identity(IdentityKind.FILE, "/srv/a:b"), None, "/srv/a:b"),
        ("rng:/dev/hwrng", Identity(IdentityKind.RNG, "/dev/hwrng"), None, "/dev/hwrng"),
        ("share:work:/srv", Identity.of_share("work", "/srv"), None, "/srv"),
        ("share:a:b:/c:/d", Identity.of_share("a:b", "/c:/d"), None, "/c:/d"),
        ("socket:/run/vu", Identity(IdentityKind.SOCKET, "/run/vu"), None, "/run/vu"),
        ("socket:[4711]", Identity(IdentityKind.SOCKET, "[4711]"), None, None),
        ("vfio:0000:3b:00.1", Identity.of_vfio("0000:3b:00.1"), None, None),
        (f"vfio:{UUID}", Identity.of_vfio(UUID), None, None),
        ("vfio:12", Identity.of_vfio(12), None, None),
    ],
)
def test_an_identity_is_read_as_it_is_written(
    text: str, identity: Identity, devnum: DevNum | None, path: str | None
) -> None:
    assert Identity.parse(text) == identity
    assert str(identity) == f"{identity}" == text
    assert (identity.devnum, identity.path) == (devnum, path)


@pytest.mark.parametrize(
    "text", ["", ":", "block", "block:", "block:7", "char:a:b", "disk:7:0", "BLOCK:7:0", "7:0"]
)
def test_other_text_is_not_an_identity(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not"):
        Identity.parse(text)


def test_two_kinds_with_one_key_are_two_devices() -> None:
    assert Identity.parse("file:/a") != Identity.parse("socket:/a")
