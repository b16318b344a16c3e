"""Qualified names, and annotations that hold them."""

import pytest

from vmplug import cdi
from vmplug.errors import SpecError


@pytest.mark.parametrize("text", ["vendor.com/class=dev", "v/c=0000:01:00.0", "V_1.x/a.b=1"])
def test_a_qualified_name_is_parsed_and_written_the_same(text: str) -> None:
    name = cdi.QualifiedName.parse(text)
    assert str(name) == text
    assert (name.kind, name.name) == tuple(text.split("="))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/dev/null", "/dev/null: not a CDI device, expected VENDOR/CLASS=NAME"),
        ("", "'': not a CDI device, expected VENDOR/CLASS=NAME"),
        ("class=dev", "class=dev: 'class' is not a kind, expected VENDOR/CLASS"),
        ("/c=d", "/c=d: '/c' is not a kind, expected VENDOR/CLASS"),
        (
            "1v/c=d",
            "1v/c=d: '1v' is not a vendor, expected a letter first, a letter or digit last",
        ),
        ("v/c/e=d", "v/c/e=d: 'c/e' is not a class, expected"),
        ("v/c=", "v/c=: '' is not a name, expected a letter or digit at both ends"),
        ("v/c=d\n", "v/c=d\n: 'd\\n' is not a name"),
        ("v/c=é", "v/c=é: 'é' is not a name"),
    ],
)
def test_what_is_wrong_with_a_name_is_told(text: str, told: str) -> None:
    with pytest.raises(SpecError) as raised:
        cdi.QualifiedName.parse(text)
    assert str(raised.value).startswith(told)


def test_an_annotation_is_made_and_read_again() -> None:
    key, value = cdi.make_annotation("vendor.class", "a/b", ["v/c=1", "v/c=2"])
    assert (key, value) == ("cdi.k8s.io/vendor.class_a_b", "v/c=1,v/c=2")
    others = {"other": "x", "cdi.k8s.io/a": "v/d=3"}
    found = cdi.parse_annotations({key: value, **others})
    assert found == {"cdi.k8s.io/a": ("v/d=3",), key: ("v/c=1", "v/c=2")}


@pytest.mark.parametrize(
    ("plugin", "device_id"),
    [("", "a"), ("a", ""), ("a", "0000:01:00.0"), ("-a", "b"), ("a", "b-"), ("a" * 60, "bcd")],
)
def test_a_key_that_kubernetes_would_refuse_is_not_made(plugin: str, device_id: str) -> None:
    with pytest.raises(SpecError):
        cdi.make_annotation(plugin, device_id, ["v/c=1"])


@pytest.mark.parametrize("value", ["", "v/c=1,", "v/c=1, v/c=2", "dev"])
def test_an_annotation_that_holds_anything_else_is_refused(value: str) -> None:
    with pytest.raises(SpecError, match=r"annotation cdi\.k8s\.io/a: "):
        cdi.parse_annotations({"cdi.k8s.io/a": value})
