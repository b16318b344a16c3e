"""Which functions does VFIO have open, although no descriptor of a process shows it?

A process may have closed a function that it has mapped, sent it to another one that has not taken
it yet, or given it to io_uring. The file of a group's device says in no descriptor which it is.
"""

from vmplug.address import find_bdf
from vmplug.host.pci.bind import read_driver
from vmplug.host.pci.function import PciFunction
from vmplug.host.pci.vfio import is_vfio_driver
from vmplug.host.root import HostRoot


def is_open(name: str, root: HostRoot) -> bool:
    """Whether somebody has a function open for VFIO; False for a mediated device.

    VFIO enables a function for its first user and disables it after the last. A driver before it
    may have left it enabled; then the driver has no users, where it is a module.
    Source: vfio_pci_core_enable, Linux drivers/vfio/pci/vfio_pci_core.c; measured on 6.1 and 6.12.
    """
    bdf = find_bdf(name)
    if bdf is None:
        return False
    # Only links and what takes no lock: other files wait while the kernel unbinds the function.
    function = PciFunction(bdf=bdf, driver=read_driver(bdf, root))
    if not is_vfio_driver(function, root):
        return False
    if not root.read_int(f"{function.sysfs_path}/enable"):
        return False
    return root.read_int(f"{function.sysfs_path}/driver/module/refcnt") != 0
