"""Errors carry their facts as values, for programs."""

import importlib
import pkgutil
import traceback

import vmplug
from vmplug.errors import AttributeReadError, DeviceError, NoSuchDevice, SpecError


def test_the_facts_are_everything_beside_message_and_hint() -> None:
    error = NoSuchDevice("block device 8:0", "none", found="nothing", hint="plug it in")
    assert error.facts == {"wanted": "block device 8:0", "found": "nothing"}
    assert (str(error), error.hint) == ("none", "plug it in")


def test_a_note_of_python_is_no_fact() -> None:
    error = SpecError("$", "wrong")
    error.add_note("seen while reading a bundle")
    assert error.facts == {"where": "$"}


def test_a_traceback_shows_the_hint_before_other_notes() -> None:
    error = SpecError("$", "wrong")
    error.add_note("VM sb2: wrong too")
    error.hint = "write it in another way"
    error.hint = "write it right"
    shown = "".join(traceback.format_exception(error)).splitlines()
    assert shown == [
        "vmplug.errors.SpecError: $: wrong",
        "hint: write it right",
        "VM sb2: wrong too",
    ]
    assert error.notes == ("VM sb2: wrong too",)
    error.hint = None
    assert error.notes == ("VM sb2: wrong too",)
    assert "hint" not in "".join(traceback.format_exception(error))


def test_an_unreadable_file_says_why() -> None:
    assert str(AttributeReadError("/sys/x", 13)) == "cannot read /sys/x: Permission denied"
    assert str(AttributeReadError("/sys/x", why="odd")) == "cannot read /sys/x: odd"
    assert AttributeReadError("/sys/x", 13).facts == {"path": "/sys/x", "errno": 13}


def test_every_error_has_a_stable_word_of_its_own() -> None:
    for module in pkgutil.walk_packages(vmplug.__path__, "vmplug."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = _below(DeviceError)
    assert NoSuchDevice in kinds
    assert len({kind.code for kind in kinds}) == len(kinds)


def _below(kind: type[DeviceError]) -> list[type[DeviceError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _below(child))]
