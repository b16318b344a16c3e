"""A QEMU of our own with leased devices, which vmplug serves later.

qemu_args.py DIRECTORY DISK... [-- QEMU_ARGUMENT...]: its journal and QMP socket are in DIRECTORY.
"""

import os
import socket
import subprocess
import sys

import vmplug

directory, *words = sys.argv[1:]
split = words.index("--") if "--" in words else len(words)
disks, extra = words[:split], words[split + 1 :]
setup = vmplug.Setup(state_dir=f"{directory}/state")
requests = [
    vmplug.DeviceInfo(
        container_path=f"/dev/{os.path.basename(disk)}",
        dev_type=vmplug.DevType.BLOCK,
        host_path=disk,
    )
    for disk in disks
]
qmp = f"{directory}/qmp.sock"

with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(qmp)
    listener.listen()
    with vmplug.lease([*requests, vmplug.RngInfo()], owner="job-17", setup=setup) as lease:
        command = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64"]
        command += ["-nodefaults", "-display", "none", *extra]
        command += ["-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"]
        command += ["-qmp", "chardev:qmp", *lease.qemu_args("q35", memory="64")]
        inherited = (listener.fileno(), *lease.descriptors)
        vmm = subprocess.Popen(command, pass_fds=inherited)
        lease.give_to(vmm.pid)
        for status in vmplug.list_leases(setup=setup):
            print("leased:", ", ".join(hold.host_path for hold in status.devices))

        vm = vmplug.adopt_vm("job-17", qmp, setup=setup)
        for hold in vm.attachments:
            print("attached:", hold.host_path, "at", hold.guest_address)
        print("leases left:", len(vmplug.list_leases(setup=setup)))

        vmm.kill()
        lease.wait()
vmplug.reconcile_host(setup=setup).require()
print("attachments left:", len(vmplug.list_attachments(setup=setup).attachments))
