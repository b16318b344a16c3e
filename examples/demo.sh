#!/bin/bash
# Boot a guest, plug a loop device into it as a bundle asks, let the guest read it, take it out.
# Needs root. Uses its own journal and leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d /tmp/vmplug-demo-XXXXXX)
export VMPLUG_STATE_DIR=$work/state
loop=

clean_up() {
    vmplug vm stop demo --timeout 0 >/dev/null 2>&1 || true
    [ -z "$loop" ] || losetup --detach "$loop"
    rm -rf "$work"
}
trap clean_up EXIT

show() {
    printf '\n\033[1m$ %s\033[0m\n' "$*" | if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9]*m//g'; fi
    "$@"
}

ask_guest() {
    python3 guest/console.py "$work/guest.sock" "$1"
}

# A disk of the host: 64 MiB that begin with a sentence.
truncate --size=64M "$work/disk.img"
printf 'written on the host.' | dd of="$work/disk.img" conv=notrunc status=none
loop=$(losetup --find --show "$work/disk.img")
number=$(cat "/sys/block/${loop#/dev/}/dev")

# A container that asks for it.
mkdir "$work/ctr1"
cat >"$work/ctr1/config.json" <<EOF
{
  "ociVersion": "1.0.2",
  "linux": {
    "devices": [
      {"path": "/dev/xvda", "type": "b", "major": ${number%:*}, "minor": ${number#*:}}
    ]
  }
}
EOF

echo "A container asks for block device $number, which is $loop on this host."
show vmplug info "$work/ctr1"
show vmplug check "$work/ctr1"
show vmplug vm start demo --accel tcg --memory 256 \
    --kernel build/guest/vmlinuz --initrd build/guest/initrd.img --append "console=ttyS0 quiet" \
    -- -chardev "socket,id=guest,path=$work/guest.sock,server=on,wait=off" -serial chardev:guest
show vmplug plan "$work/ctr1" --vm demo
show vmplug attach "$work/ctr1" --vm demo

printf '\nThe guest sees it there, and reads what the host wrote:\n'
ask_guest 'wait_for_disks 1 3000'
ask_guest 'head -c 20 /dev/vda; echo'
printf '\nThe guest writes, and the host reads:\n'
ask_guest 'printf "written in the guest" >/dev/vda; sync'
head -c 20 "$loop"
echo

show vmplug list
show vmplug check "$work/ctr1" || echo "(refused: a VM has it)"
show vmplug detach --owner ctr1
printf '\nThe guest has %s disks left.\n' "$(ask_guest 'ls /sys/block | grep -c vd || true')"
show vmplug vm stop demo --timeout 0
clean_up
trap - EXIT
printf '\nNothing is left: no VM, no loop device, no journal.\n'
