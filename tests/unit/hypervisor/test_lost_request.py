"""A request to unplug that the guest has lost, as one that boots does."""

from vmplug.drivers.ports import UnplugFailure
from vmplug.hypervisor.qemu.unplug_waiter import UnplugWaiter

SOON_S, REASON_TO_WAIT_S = 0.01, 30.0


def waiter() -> UnplugWaiter:
    made = UnplugWaiter(lambda name: name)
    made.ask_again_s = SOON_S
    return made


def test_it_is_asked_again_and_then_leaves() -> None:
    unplug, present, asked = waiter(), {"a", "b"}, list[set[str]]()

    def ask(names: set[str]) -> None:
        asked.append(names)
        present.clear()
        for name in names:
            unplug.receive("DEVICE_DELETED", {"device": name})

    assert unplug.wait({"a", "b"}, lambda: set(present), ask, REASON_TO_WAIT_S) == {}
    assert asked == [{"a", "b"}]


def test_what_the_guest_refuses_is_not_asked_again() -> None:
    unplug, present, asked = waiter(), {"a", "b"}, list[set[str]]()
    unplug.expect("a")
    unplug.receive("DEVICE_UNPLUG_GUEST_ERROR", {"device": "a"})

    def ask(names: set[str]) -> None:
        asked.append(names)
        present.discard("b")

    told = unplug.wait({"a", "b"}, lambda: set(present), ask, REASON_TO_WAIT_S)
    assert told == {"a": UnplugFailure.REFUSED}
    assert asked == [{"b"}]


def test_a_guest_that_stays_silent_is_a_timeout() -> None:
    asked = list[set[str]]()
    told = waiter().wait({"a"}, lambda: {"a"}, asked.append, 3 * SOON_S)
    assert told == {"a": UnplugFailure.TIMEOUT}
    assert len(asked) <= 3
