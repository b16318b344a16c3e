#!/bin/bash
# Hand a device of the host to a guest, let the guest use it, and take it back: `demo.sh KIND`.
# Needs root. Uses its own journal and leaves nothing behind. `demo.sh --check KIND` only says whether
# it could begin, before anything is installed for it.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly KINDS='disk vfio nvdimm vhost-user-blk vhost-user-scsi vhost-user-net virtio-fs virtio-9p rng virtio-mmio virtio-blk-ccw generic cdi'

# `fail SENTENCE HINT`
fail() {
    printf 'demo: %s\nhint: %s\n' "$@" >&2
    exit 2
}

check_only=
if [[ ${1-} = --check ]]; then
    check_only=yes
    shift
fi
kind=${1-disk}
[[ " $KINDS " = *" $kind "* ]] || fail "there is no KIND=$kind" "choose one of: $KINDS"
[[ $(id -u) = 0 ]] || fail 'only root can make the devices for the demo' 'sudo make demo'
[[ -z $check_only ]] || exit 0
# This host needs its PCI devices: the lab VM has some for the demo.
if [[ $kind = vfio && -z ${LAB_VM-} ]]; then
    echo 'In the lab VM, an emulated machine with an IOMMU and devices of its own:'
    exec .venv/bin/python -m lab --timeout 600 -- "$PWD/examples/demo.sh" vfio
fi

work=$(mktemp -d /tmp/vmplug-demo-XXXXXX)
export VMPLUG_STATE_DIR=$work/state
loop=
backend=

clean_up() {
    vmplug vm stop demo --timeout 0 >/dev/null 2>&1 || true
    [ -z "$backend" ] || kill "$backend" 2>/dev/null || true
    [ -z "$loop" ] || losetup --detach "$loop"
    rm -rf "$work"
}
trap clean_up EXIT

say() {
    printf '\n%s\n' "$*"
}

show() {
    printf '\n\033[1m$ %s\033[0m\n' "$*" | if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9]*m//g'; fi
    "$@"
}

# Run what must be refused.
refused() {
    show "$@" && return 1
    echo '(refused)'
}

in_guest() {
    printf '   guest# %s\n' "$1"
    "$PWD/.venv/bin/python" guest/console.py "$work/guest.sock" "$1"
}

# An image of SIZE that begins with a sentence: `make_image SIZE TEXT`.
make_image() {
    truncate --size="$1" "$work/disk.img"
    printf %s "$2" | dd of="$work/disk.img" conv=notrunc status=none
}

# Put a config.json for container ctr1 together: `make_bundle DEVICES ANNOTATIONS`, both as JSON.
make_bundle() {
    mkdir "$work/ctr1"
    cat >"$work/ctr1/config.json" <<JSON
{
  "ociVersion": "1.0.2",
  "annotations": {${2-}},
  "linux": {"devices": [${1-}]}
}
JSON
    say 'A container asks:'
    grep -E '"(annotations|linux)"' "$work/ctr1/config.json" | grep -vE '[{][}]|\[\]'
}

# `start_vm [OPTION]...`: with the tiny guest, which answers on its second serial port. Without
# no_timer_check its kernel may panic where the host is busy: QEMU without KVM is late with ticks.
start_vm() {
    show vmplug vm start demo --accel tcg --memory 256 --kernel build/guest/vmlinuz \
        --initrd build/guest/initrd.img --append 'console=ttyS0 quiet no_timer_check' "$@" \
        -- -chardev "socket,id=guest,path=$work/guest.sock,server=on,wait=off" \
        -serial chardev:guest
}

# A vhost-user store with one number in it: `make_store NUMBER`, whose socket is in $socket then.
make_store() {
    mkdir -p "$work"/store/block/{devices,sockets}
    mknod "$work/store/block/devices/disk0" b "${1%:*}" "${1#*:}"
    socket=$work/store/block/sockets/disk0
}

wait_for_socket() {
    local tries
    for ((tries = 0; tries < 2400; tries++)); do
        [ ! -S "$1" ] || return 0
        kill -0 "$backend" || return 1
        sleep 0.05
    done
    return 1
}

# `detach_all [OPTION]...`
detach_all() {
    show vmplug list
    show vmplug detach --owner ctr1 "$@"
}

demo_disk() {
    make_image 64M 'written on the host.'
    loop=$(losetup --find --show "$work/disk.img")
    local number
    number=$(cat "/sys/block/${loop#/dev/}/dev")
    make_bundle "{\"path\": \"/dev/xvda\", \"type\": \"b\", \"major\": ${number%:*}, \"minor\": ${number#*:}}"
    show vmplug info "$work/ctr1"
    show vmplug check "$work/ctr1"
    start_vm
    show vmplug plan "$work/ctr1" --vm demo
    show vmplug attach "$work/ctr1" --vm demo
    say 'The guest reads what the host wrote, and writes:'
    in_guest 'wait_for_disks 1 3000'
    in_guest 'head -c 20 /dev/vda; echo'
    in_guest 'printf "written in the guest" >/dev/vda; sync'
    say 'The host reads:'
    head -c 20 "$loop"
    echo
    refused vmplug check "$work/ctr1"
    detach_all
}

demo_cdi() {
    make_image 64M 'a disk that has a name.'
    loop=$(losetup --find --show "$work/disk.img")
    mkdir "$work/cdi"
    cat >"$work/cdi/disk.yaml" <<YAML
cdiVersion: 0.5.0
kind: vmplug.example/disk
devices:
- name: data
  containerEdits:
    deviceNodes: [{path: /dev/xvda, hostPath: $loop, permissions: r}]
YAML
    cat >"$work/policy.toml" <<TOML
[cdi]
directories = ["$work/cdi"]

[[rule]]
name = "disks that have names"
cdi-kinds = ["vmplug.example/disk"]
TOML
    export VMPLUG_POLICY=$work/policy.toml
    say 'The operator gives a disk a name, and allows what has such names:'
    cat "$work/cdi/disk.yaml" "$work/policy.toml"
    make_bundle '' '"cdi.k8s.io/vmplug_disk": "vmplug.example/disk=data"'
    show vmplug info "$work/ctr1"
    show vmplug check "$work/ctr1"
    refused vmplug check "$loop"
    start_vm
    show vmplug attach "$work/ctr1" --vm demo
    in_guest 'wait_for_disks 1 3000'
    in_guest 'head -c 23 /dev/vda; echo'
    in_guest 'cat /sys/block/vda/ro'
    detach_all
}

demo_vfio() {
    readonly bdf=0000:01:00.0 # lab/topology.py has it
    show vmplug host "$bdf"
    refused vmplug check --device "vfio:$bdf"
    show vmplug bind "$bdf"
    show vmplug check --device "vfio:$bdf"
    say 'A guest that booted earlier continues:'
    mkdir "$work/guest"
    .venv/bin/python -m tests.lab.nested --run "$work/guest" &
    backend=$!
    wait_for_socket "$work/guest/qmp"
    show vmplug vm adopt demo --qmp "$work/guest/qmp"
    show vmplug attach --vm demo --owner ctr1 --device "vfio:$bdf"
    say 'It reads what is on the disk of the NVMe controller:'
    ln -s guest/console "$work/guest.sock"
    in_guest 'until [ -b /dev/nvme0n1 ]; do usleep 100000; done'
    in_guest 'head -c 8 /dev/nvme0n1; echo'
    detach_all --timeout 120
    show vmplug unbind "$bdf"
    show vmplug host "$bdf"
}

demo_nvdimm() {
    make_image 64M 'persistent memory of the host.'
    start_vm
    in_guest 'modprobe nfit; modprobe nd_pmem'
    show vmplug attach --vm demo --owner ctr1 --device "file:$work/disk.img:/dev/pmem" \
        -o block-driver=nvdimm
    say 'The guest maps it as memory:'
    in_guest 'until [ -b /dev/pmem0 ]; do usleep 10000; done'
    in_guest 'head -c 30 /dev/pmem0; echo'
    in_guest 'printf "written in the guest" >/dev/pmem0; sync'
    say 'The host reads:'
    head -c 20 "$work/disk.img"
    echo
    say 'QEMU cannot take an NVDIMM out again: it stays in the VM, and in the list, until the VM ends.'
    detach_all
    show vmplug list
}

demo_vhost-user-blk() {
    make_image 64M 'behind a storage daemon.'
    make_store 241:0
    qemu-storage-daemon --blockdev "driver=file,node-name=disk,filename=$work/disk.img" --export \
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path=$socket" &
    backend=$!
    wait_for_socket "$socket"
    make_bundle '{"path": "/dev/xvda", "type": "b", "major": 241, "minor": 0}'
    show vmplug resolve "$work/ctr1" --vhost-user-store "$work/store"
    show vmplug check "$work/ctr1" --vhost-user-store "$work/store"
    start_vm
    show vmplug attach "$work/ctr1" --vm demo --vhost-user-store "$work/store"
    in_guest 'wait_for_disks 1 3000'
    in_guest 'head -c 24 /dev/vda; echo'
    detach_all
}

demo_vhost-user-scsi() {
    make_image 64M 'a disk of a SCSI backend.'
    make_store 242:0
    .venv/bin/python -m tests.support.vhost_user scsi "$socket" "$work/disk.img" >/dev/null &
    backend=$!
    wait_for_socket "$socket"
    make_bundle '{"path": "/dev/sdx", "type": "b", "major": 242, "minor": 0}'
    show vmplug check "$work/ctr1" --vhost-user-store "$work/store"
    start_vm
    show vmplug attach "$work/ctr1" --vm demo --vhost-user-store "$work/store"
    in_guest 'wait_for_disks 1 3000'
    in_guest 'head -c 25 /dev/sda; echo'
    detach_all
}

demo_vhost-user-net() {
    .venv/bin/python -m tests.support.vhost_user net "$work/net.sock" --subnet 192.0.2.0/24 >/dev/null &
    backend=$!
    wait_for_socket "$work/net.sock"
    make_bundle '' "\"org.vmplug.net.eth0\": \"{\\\"socket\\\": \\\"$work/net.sock\\\", \\\"mac\\\": \\\"52:54:00:12:34:56\\\"}\""
    show vmplug check "$work/ctr1"
    start_vm
    show vmplug attach "$work/ctr1" --vm demo
    in_guest 'modprobe virtio_net; until [ -e /sys/class/net/eth0 ]; do usleep 10000; done'
    in_guest 'ip link set eth0 up; ip address add 192.0.2.2/24 dev eth0; ping -c 3 192.0.2.1'
    detach_all
}

share_a_directory() {
    mkdir "$work/shared"
    echo 'a file of the host' >"$work/shared/from-host"
    make_bundle '' "\"org.vmplug.share.work\": \"{\\\"source\\\": \\\"$work/shared\\\", \\\"filesystem\\\": \\\"$1\\\"}\""
    show vmplug check "$work/ctr1"
}

use_the_directory() {
    in_guest "mkdir -p /mnt/work; mount -t $1 work /mnt/work"
    in_guest 'cat /mnt/work/from-host; echo a file of the guest >/mnt/work/from-guest; umount /mnt/work'
    say 'The host reads:'
    cat "$work/shared/from-guest"
    detach_all
}

demo_virtio-fs() {
    share_a_directory virtio-fs
    start_vm
    show vmplug attach "$work/ctr1" --vm demo
    in_guest 'modprobe virtiofs'
    use_the_directory virtiofs
}

demo_virtio-9p() {
    share_a_directory virtio-9p
    say 'QEMU takes a 9p share only at its start.'
    start_vm --kernel build/guest/full/vmlinuz --initrd build/guest/full/initrd.img \
        --bundle "$work/ctr1"
    use_the_directory '9p -o trans=virtio,version=9p2000.L'
}

demo_rng() {
    make_bundle '' '"org.vmplug.rng.rng0": "{\"source\": \"/dev/urandom\", \"max-bytes\": 4096}"'
    show vmplug check "$work/ctr1"
    start_vm
    show vmplug attach "$work/ctr1" --vm demo
    in_guest 'modprobe virtio-rng; cat /sys/class/misc/hw_random/rng_available'
    in_guest 'head -c 16 /dev/hwrng | hexdump -C'
    detach_all
}

demo_virtio-mmio() {
    make_image 64M 'a disk of a microvm.'
    say 'A microvm has no PCI: it takes devices only before it starts.'
    show vmplug vm start demo --machine microvm --accel tcg --memory 256 \
        --kernel build/guest/vmlinuz --initrd build/guest/initrd.img \
        --append 'ctl=ttyS0 modules=virtio_mmio quiet loglevel=0 tsc_early_khz=2500000 no_timer_check' \
        --device "file:$work/disk.img:/dev/xvda" --owner ctr1 \
        -- -chardev "socket,id=guest,path=$work/guest.sock,server=on,wait=off" \
        -serial chardev:guest
    in_guest 'wait_for_disks 1 3000'
    in_guest 'head -c 20 /dev/vda; echo'
    refused vmplug attach --vm demo --owner ctr2 --device rng
}

demo_virtio-blk-ccw() {
    command -v qemu-system-s390x >/dev/null || tools/install-packages test
    make_image 64M 'a disk of a mainframe.'
    say 'An s390x machine, paused: no guest is needed to plug and unplug.'
    show vmplug vm start demo --machine s390-ccw-virtio --accel tcg --memory 256 -- -S
    show vmplug plan --vm demo --device "file:$work/disk.img:/dev/xvda"
    show vmplug attach --vm demo --owner ctr1 --device "file:$work/disk.img:/dev/xvda"
    detach_all
}

demo_generic() {
    make_bundle '{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}, {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}'
    show vmplug resolve "$work/ctr1" || true
    start_vm
    show vmplug attach --vm demo --owner ctr1 --device c:1:3:/dev/null
    detach_all
}

"demo_$kind"
show vmplug vm stop demo --timeout 0
clean_up
trap - EXIT
say 'Nothing is left: no VM, no process, no loop device, no journal.'
