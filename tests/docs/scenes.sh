# What blocks of commands and code are run on, each in a root where nothing was done before.
# shellcheck shell=bash
#
# A scene is a function of this name. `instead OLD NEW` says what stands for a name of the page here.
set -euo pipefail

instead() { printf '%s\t%s\n' "$1" "$2" >>"$EDITS"; }

image() {
    mkdir -p "$(dirname "$1")"
    truncate --size "${2-8M}" "$1"
}

# A loop device, which stands for all these numbers: `loop_device NUMBER...`. bundle/ asks for the first.
loop_device() {
    local file node number
    file=$(mktemp /srv/loop-XXXXXX.img)
    image "$file"
    node=$(losetup --find --show "$file")
    echo "$node" >>"$LOOPS"
    number=$(cat "/sys/block/${node#/dev/}/dev")
    instead /dev/sdb "$node"
    for old; do
        instead "$old" "$number"
    done
    [ -e bundle ] || bundle "{\"path\": \"/dev/xvda\", \"type\": \"b\", \"major\": ${number%:*}, \"minor\": ${number#*:}}"
}

bundle() {
    mkdir -p bundle
    echo "{\"ociVersion\": \"1.0.2\", \"linux\": {\"devices\": [$1]}}" >bundle/config.json
}

# A VM that has room and never runs: `paused_vm NAME [OPTION]...`.
paused_vm() {
    vmplug vm start "$@" --accel tcg --memory 64 -- -S
}

guest_files() {
    cp "$PROJECT/build/guest/vmlinuz" "$PROJECT/build/guest/initrd.img" .
}

attach_scsi() {
    vmplug attach --vm sb1 --owner "$1" --device "file:$2${3+:$3}" -o block-driver=virtio-scsi
}

first_id() {
    vmplug list --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["attachments"][0]["id"])'
}

nothing() { :; }

# VM sb1 has booted, bundle/ asks for a loop device, and there is an image.
running_vm() {
    guest_files
    loop_device
    vmplug vm start sb1 --accel tcg --memory 256 --kernel vmlinuz --initrd initrd.img \
        --append 'console=ttyS0 quiet' -- -chardev socket,id=guest,path=/run/guest,server=on,wait=off \
        -serial chardev:guest
    python3 "$PROJECT/guest/console.py" /run/guest true
    image /srv/a.img
    instead 'detach_owner("ctr1")' 'detach_owner("ctr1", timeout_s=300)'
}

# sb1 had an image and has ended.
ended_vm() {
    image /images/a.img
    paused_vm sb1 --device file:/images/a.img:/dev/xvda --owner ctr1
    end sb1
}

end() {
    local pid
    pid=$(vmplug vm list --json | python3 -c \
        'import json, sys; print(json.load(sys.stdin)["vms"][0]["pid"])')
    kill -KILL "$pid"
    timeout 60 tail --pid "$pid" --follow /dev/null
}

# A QEMU that others started listens at /run/sb1/qmp.sock.
another_qemu() {
    mkdir /run/sb1
    instead sb3 sb1
    qemu-system-x86_64 -accel tcg -m 64 -nodefaults -display none -S -daemonize \
        -machine q35 -device virtio-scsi-pci,id=scsi0 -device pcie-root-port,id=p0,chassis=1 \
        -device pcie-root-port,id=p1,chassis=2 -device pcie-root-port,id=p2,chassis=3 -device pcie-root-port,id=p3,chassis=4 \
        -qmp unix:/run/sb1/qmp.sock,server=on,wait=off
}

# It has a disk of the journal in the usual place.
another_journal() {
    another_qemu
    image /images/a.img
    vmplug vm adopt sb1 --qmp /run/sb1/qmp.sock
    vmplug attach --vm sb1 --owner ctr1 --device file:/images/a.img
}

sql() {
    python3 -c 'import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])' \
        /run/vmplug/journal.db "$1"
}

newer_journal() {
    paused_vm sb1
    sql 'PRAGMA user_version = 12'
}

damaged_journal() {
    image /images/a.img
    paused_vm sb1
    vmplug attach --vm sb1 --owner ctr1 --device file:/images/a.img
    sql "PRAGMA ignore_check_constraints = 1; UPDATE device SET state = 'flying'"
}

kata_sandbox() {
    python3 -m tests.docs.kata
    instead /run/vc/vm/5a1f/extra-monitor.sock /run/sb1/qmp.sock
}

# VM sb1 has three disks, of which one is deleted.
watched() {
    mkdir -p /srv/store/block/devices /srv/store/block/sockets
    mknod /srv/store/block/devices/d0 b 241 0
    image /srv/v.img
    qemu-storage-daemon --daemonize --pidfile /run/d0.pid \
        --blockdev driver=file,node-name=disk,filename=/srv/v.img --export \
        type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path=/srv/store/block/sockets/d0
    paused_vm sb1
    for disk in a b; do
        image /srv/$disk.img
        vmplug attach --vm sb1 --owner c1 --device file:/srv/$disk.img:/dev/$disk
    done
    vmplug attach --vm sb1 --owner c1 --device b:241:0:/dev/v --vhost-user-store /srv/store
    rm /srv/a.img
}

# The backend of /dev/v has ended.
backend_gone() {
    watched
    local pid
    pid=$(cat /run/d0.pid)
    kill "$pid"
    timeout 60 tail --pid "$pid" --follow /dev/null
    instead timeout_s=60 timeout_s=1
}

# Of `vmplug` alone, and then of verbs. VM sb1 boots: without a port to serve it would power off.
help_to_begin_with() {
    guest_files
    loop_device
    instead 'vmplug vm start' 'vmplug vm start --accel tcg --append ctl=ttyS0'
    instead 'vmplug detach' 'vmplug detach --timeout 300'
}

help_about_the_host() {
    loop_device 8:16
    image /srv/images/a.qcow2
    mkdir -p /run/vhost-user/block/devices /run/vhost-user/block/sockets
    mkdir -p /etc/bash_completion.d ~/.config/fish/completions
    mknod /run/vhost-user/block/devices/d0 b 241 0
    python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/run/vhost-user/block/sockets/d0")'
}

# VM sb1 is paused, and has two disks.
help_about_devices() {
    cdi_disk
    loop_device
    loop_device 7:0
    mkdir -p /images /srv/work
    qemu-img create -q -f qcow2 /images/a.qcow2 8M
    image /srv/a.img
    image /srv/b.img
    paused_vm sb1
    attach_scsi ctr1 /srv/a.img
    instead 0123456789abcdef "$(first_id)"
    attach_scsi ctr1 /srv/b.img
}

help_about_repair() {
    image /images/a.img
    paused_vm sb1 --device file:/images/a.img --owner ctr1
}

# A lease that is held until the root ends.
another_lease() {
    image /images/b.img
    vmplug lease --owner job-17 --device file:/images/b.img -- sleep infinity </dev/null &>/dev/null &
    until vmplug lease list | grep --quiet held; do sleep 0.1; done
}

# Specs of CDI for engines, and others in the working directory.
cdi_specs() {
    bundle '{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}'
    mkdir -p /etc/cdi cdi
    cat >/etc/cdi/disk.yaml <<EOF
cdiVersion: 0.5.0
kind: vendor.com/disk
containerEdits: {env: [DISKS=all]}
devices:
- name: data
  containerEdits:
    env: [DISK=data]
    deviceNodes: [{path: /dev/data, hostPath: /dev/zero, permissions: r}]
EOF
    sed 's/=data]/]/' /etc/cdi/disk.yaml >disk.yaml
    cat >/etc/cdi/vendor.json <<EOF
{"cdiVersion": "0.5.0", "kind": "vendor.com/gpu", "devices": [
    {"name": "gpu0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}},
    {"name": "gpu1", "containerEdits": {"deviceNodes": [{"path": "/dev/full"}]}}]}
EOF
    cp /etc/cdi/vendor.json vendor.json
    cp /etc/cdi/vendor.json vendor.yaml
    named_disk
}

# A loop device that udev knows by a name, and a policy for it.
named_disk() {
    loop_device 8:0
    local number
    number=$(sed -n 's/^8:0\t//p' "$EDITS")
    instead /dev/sda "/dev/$(basename "$(readlink "/sys/dev/block/$number")")"
    mkdir -p /run/udev/data /etc/vmplug
    printf 'S:disk/by-id/%s\n' wwn-0x5000c500a1b2c3d4 >"/run/udev/data/b$number"
    cat >policy.toml <<EOF
[[rule]]
name = "disks, for reading"
kinds = ["block"]
read-only = true
EOF
    cp policy.toml /etc/vmplug/policy.toml
}

# vendor.com/disk=data is a new disk.
cdi_disk() {
    mkdir -p /etc/cdi
    image /srv/data.img
    losetup --find --show /srv/data.img >>"$LOOPS"
    cat >/etc/cdi/data.json <<EOF
{"cdiVersion": "0.5.0", "kind": "vendor.com/disk", "devices": [{"name": "data", "containerEdits": {
    "deviceNodes": [{"path": "/dev/data", "hostPath": "$(tail -n 1 "$LOOPS")"}]}}]}
EOF
}

cdi_plug() {
    paused_vm sb1
    cdi_disk
}

help_about_leases() {
    image /images/a.img
    another_lease
    loop_device
    instead 'q35 ...' 'q35 -version'
}

help_about_starting() {
    guest_files
    mkdir -p /srv/work
    image debian.raw
    bundle '{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}'
    instead 'vmplug vm start' 'vmplug vm start --accel tcg'
}

clean_up() {
    while read -r node; do
        losetup --detach "$node"
    done <"$LOOPS"
}
