"""May it be handed over? Asked before there is a VM, or about one."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from vmplug.host.device import HostDevice
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.group import VfioGroup
from vmplug.host.use.claim import Claim
from vmplug.journal import has_journal
from vmplug.journal.journal import Journal
from vmplug.manager.examine import CheckContext, CheckedRequest, examine
from vmplug.manager.setup import DEFAULT_SETUP, Setup
from vmplug.oci.requests import Request

if TYPE_CHECKING:
    from vmplug.manager.binding.vf_tokens import Tokens
    from vmplug.policy.gate import PolicyCheck


def check_requests(
    requests: Sequence[Request],
    *,
    vm: str | None = None,
    owner: str | None = None,
    allow: Iterable[Code] = (),
    managed: bool = False,
    setup: Setup = DEFAULT_SETUP,
) -> list[CheckedRequest]:
    """Return what each request is on the host, and everything that attaching would refuse it for.

    Nothing is changed. With `vm` that includes whether this VM has a place for each; without it
    the policy is not asked which VM it is. A host where vmplug never ran has no journal, and none
    is made. Raises StateError for an unknown VM, ConnectError.
    """
    if vm:
        from vmplug.vms.connect import connect_vm  # noqa: PLC0415  17 ms that most checks save

        with connect_vm(vm, setup=setup) as devices:
            return devices.check_places(requests, owner=owner, allow=allow, managed=managed)
    gate = _gate(setup, owner)
    with _known(setup, gate) as known:
        return examine(
            requests,
            setup.host,
            vhost_user_store=setup.vhost_user_store,
            known=known,
            allowed=allow,
            managed=managed,
        )


def _gate(setup: Setup, owner: str | None) -> "PolicyCheck | None":
    if setup.policy is None:
        return None
    from vmplug.policy.gate import PolicyCheck  # noqa: PLC0415  2 ms, as there is one

    return PolicyCheck(policy=setup.policy, owner=owner)


@contextmanager
def _known(setup: Setup, gate: "PolicyCheck | None") -> Iterator[CheckContext]:
    """What VMs hold, and their processes, inside the `with`, and the policy."""
    if not has_journal(setup.state_dir):
        yield CheckContext(gate=gate, find_more=partial(_check_tokens, setup, None))
        return
    with Journal.open(setup.state_dir) as journal:

        def find_claims(device: HostDevice) -> Sequence[Claim]:
            return journal.find_claims(None, device.identity, device.related_identities)

        yield CheckContext(
            gate=gate,
            find_claims=find_claims,
            find_more=partial(_check_tokens, setup, journal.vf_tokens),
            vms=journal.vm_processes(setup.host),
        )


def _check_tokens(setup: Setup, tokens: "Tokens | None", device: HostDevice) -> Iterable[Finding]:
    if not isinstance(device, VfioGroup):
        return ()
    from vmplug.manager.binding.vf_tokens import check_tokens  # noqa: PLC0415  3 ms

    return check_tokens(device, tokens, None, setup.host)
