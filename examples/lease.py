"""A QEMU of our own with a leased disk: lease.py DISK STATE_DIR [QEMU_ARGUMENT]..."""

import json
import subprocess
import sys

import vmplug

disk, state_dir, *extra = sys.argv[1:]
setup = vmplug.Setup(state_dir=state_dir)
request = vmplug.DeviceInfo(
    container_path="/dev/xvda", dev_type=vmplug.DevType.BLOCK, host_path=disk
)

with vmplug.lease([request], owner="job-17", setup=setup) as lease:
    (leased,) = lease.devices
    node = {
        "driver": leased.format,
        "node-name": "d0",
        "file": {"driver": "file", "filename": "/dev/fdset/1"},
    }
    words = ["qemu-system-x86_64", "-nodefaults", "-display", "none", *extra]
    words += ["-add-fd", f"fd={leased.descriptor},set=1", "-blockdev", json.dumps(node)]
    words += ["-device", "virtio-blk-pci,drive=d0", "-qmp", "stdio"]
    vmm = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=lease.descriptors
    )
    lease.give_to(vmm.pid)
    assert vmm.stdin
    assert vmm.stdout
    print("QEMU runs:", "QMP" in json.loads(vmm.stdout.readline()))
    (status,) = vmplug.list_leases(setup=setup)
    print(status.devices[0].host_path, "is", status.state, "by", status.program)
    try:
        vmplug.lease([request], owner="job-18", setup=setup)
    except vmplug.InUse as refusal:
        print("job-18 is refused:", str(refusal).partition(", process")[0])

    vmm.communicate(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
    lease.wait()
print("leases left:", len(vmplug.list_leases(setup=setup)))
