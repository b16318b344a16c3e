"""The whole life of two VMs: two_vms.py KERNEL INITRD DISK STATE_DIR [QEMU_ARGUMENT]..."""

import os
import signal
import sys
from contextlib import suppress

import vmplug

kernel, initrd, disk, state_dir, *extra = sys.argv[1:]
setup = vmplug.Setup(state_dir=state_dir)
request = vmplug.DeviceInfo(
    container_path="/dev/xvda", dev_type=vmplug.DevType.BLOCK, host_path=disk
)
machine = {"kernel": kernel, "initrd": initrd, "append": "console=ttyS0", "accel": "tcg"}
one, two = (vmplug.VmSpec(name=name, extra=tuple(extra), **machine) for name in ("one", "two"))

# VM one has the disk from its start. VM two is refused it while one runs.
started = vmplug.start_vm(one, [request], owner="ctr1", setup=setup)
vmplug.start_vm(two, setup=setup)
print("one sees the disk at PCI", started.attachments[0].guest_address)
with vmplug.connect_vm("two", setup=setup) as devices:
    try:
        devices.attach(request, owner="ctr2")
    except vmplug.InUse as refusal:
        print("two is refused:", refusal)

    # VM one dies. A reconcile frees its disk.
    os.kill(started.pid, signal.SIGKILL)
    while vmplug.list_vms(setup=setup)[0].state != "gone":
        pass
    for done in vmplug.reconcile_host(setup=setup).repairs:
        print(done.vm, done.repair.host_path, done.repair.outcome, "because", done.repair.reason)
    print("two sees the disk at PCI", devices.attach(request, owner="ctr2").guest_address)

while vmplug.list_attachments(setup=setup).attachments:
    with suppress(vmplug.UnplugTimeout):  # a guest that boots does not answer yet
        vmplug.detach_owner("ctr2", timeout_s=6, setup=setup)
print(vmplug.stop_vm("two", timeout_s=1, setup=setup).name, "is stopped")
