"""What `vmplug reconcile` did not finish is an error, after all of it was reported."""

import pytest

from vmplug.errors import ConnectError, UnplugTimeout
from vmplug.manager.reconcile import Repair, RepairOutcome
from vmplug.vms.reconcile import HostRepairs, RepairFailure, VmRepair


def repairs(*outcomes: RepairOutcome, failures: tuple[RepairFailure, ...] = ()) -> HostRepairs:
    done = (
        VmRepair(vm="sb1", repair=Repair(f"d{number}", f"/{number}.img", outcome, "why"))
        for number, outcome in enumerate(outcomes)
    )
    return HostRepairs(
        repairs=tuple(done), returned=(), failures=failures, salvage=None, kept_logs=()
    )


def test_what_is_still_detaching_is_an_error() -> None:
    still = RepairOutcome.STILL_DETACHING
    with pytest.raises(UnplugTimeout) as caught:
        repairs(RepairOutcome.FINISHED, still, still).require()
    assert caught.value.message == "still detaching: /1.img in VM sb1, /2.img in VM sb1"
    assert caught.value.ids == ("d1", "d2")


def test_every_other_outcome_is_none() -> None:
    others = [one for one in RepairOutcome if one is not RepairOutcome.STILL_DETACHING]
    done = repairs(*others)
    assert done.require() is done


def test_a_vm_that_could_not_be_asked_comes_first() -> None:
    failure = RepairFailure(vm="sb2", error=ConnectError("/s", "no answer"))
    with pytest.raises(ConnectError) as caught:
        repairs(RepairOutcome.STILL_DETACHING, failures=(failure,)).require()
    assert "still detaching: /0.img in VM sb1" in caught.value.__notes__
