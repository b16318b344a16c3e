"""vmplug: hand host devices to containers that run inside virtual machines.

    config.json -> oci -> DeviceInfo -> host -> HostDevice + findings -> drivers -> Plug
                -> hypervisor -> GuestAddress;  manager counts and journals;  cli wires

Names are imported when they are first used, so that `import vmplug` costs next to nothing.
"""

from importlib import import_module

_NAMES = {
    "vmplug.manager.manager": "DeviceManager",
    "vmplug.policy.rules": "Policy",
    "vmplug.policy.file": "read_policy",
    "vmplug.journal.records": "Attachment",
    "vmplug.manager.reconcile": "Repair",
    "vmplug.manager.watching.watch": "Watch watch",
    "vmplug.manager.watching.notice": "DeviceEvent EventKind",
    "vmplug.oci.spec": "Bundle parse_config read_bundle",
    "vmplug.oci.info": "DeviceInfo DevType",
    "vmplug.oci.requests": "NetInfo Request RngInfo ShareInfo VfioInfo",
    "vmplug.host.root": "HostRoot",
    "vmplug.host.host_path": "HostPathCache get_host_path",
    "vmplug.host.resolve": "resolve resolve_all",
    "vmplug.host.vhost_user.store": "VhostUserStore",
    "vmplug.host.block.volumes": "find_requests",
    "vmplug.host.block.device": "BlockDevice DiskFile",
    "vmplug.host.device": "CharDevice EntropySource SharedDirectory",
    "vmplug.host.vhost_user.device": "VhostUserSocket",
    "vmplug.host.pci.group": "VfioGroup",
    "vmplug.host.kind": "DeviceType SharedFilesystem",
    "vmplug.host.pci.mdev": "MediatedDevice VFIODeviceType",
    "vmplug.host.pci.function": "PciFunction read_functions",
    "vmplug.host.finding": "Code Finding Severity",
    "vmplug.drivers.plug": (
        "Aio BlockDrive DiskFrontend Cache RNGDevice SharedFS Throttle VFIODevice VFIODevices "
        "VhostUserDevice"
    ),
    "vmplug.drivers.ports": "Hypervisor Step",
    "vmplug.drivers.place": "GuestAddress GuestFunction PlugMode",
    "vmplug.hypervisor.qemu.running": "Qemu",
    "vmplug.hypervisor.fake.monitor": "FakeHypervisor",
    "vmplug.devnum": "DevNum",
    "vmplug.address": "Bdf CcwDevNo PciPath PciSlot ScsiAddress",
    "vmplug.errors": (
        "AttributeReadError BackendError BackendTimeout BindError CannotPlug CommandError "
        "ConnectError DeviceError HostError HypervisorError InUse NoFreePort NoSuchDevice "
        "NotAttached PolicyError ProtocolError SpecError StateError StillAttached StoreError "
        "UnplugRefused UnplugTimeout"
    ),
}
"""Where each public name lives, in order of importance."""

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = ("__version__", *_MODULE_OF)  # noqa: PLE0604  strings, all of them


def __getattr__(name: str) -> object:
    """Import a public name when it is first used. Source: PEP 562."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vmplug' has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
