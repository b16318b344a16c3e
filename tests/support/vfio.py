"""What `check` says of an IOMMU group: the words that tests of VFIO share."""

from tests.support.checking import WRITING
from tests.support.pci_tree import PciTree
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Code, Finding
from vmplug.host.pci.vfio import find_named_group
from vmplug.host.use.claim import Claim


def findings(tree: PciTree, name: str, claims: tuple[Claim, ...] = ()) -> dict[Code, Finding]:
    """The findings of a group by their codes; no code comes twice."""
    group = find_named_group(name, tree.root)
    usage = read_usage(tree.root)
    found = check_device(group, WRITING, usage=usage, claims=claims, root=tree.root)
    assert all(finding.hint and finding.message for finding in found)
    assert len({(finding.code, finding.message) for finding in found}) == len(found)
    return {finding.code: finding for finding in found}
