#!/bin/bash
# Builds the tiny guests that tests and the demo boot, each a vmlinuz and an initrd.img.
#
#   guest/build.sh          both
#   guest/build.sh cloud    build/guest/: Debian's cloud kernel, which boots fast
#   guest/build.sh full     build/guest/full/: Debian's other kernel, which has 9p
#
# The kernel and busybox come out of Debian packages, downloaded and unpacked but never installed.
# Returns at once when all files are newer than guest/init and this script. Everything is built in
# a temporary directory and renamed at the end, so an interrupted build leaves nothing half-done.
set -euo pipefail

declare -rA METAPACKAGES=([cloud]=linux-image-cloud-amd64 [full]=linux-image-amd64)

# Loaded at boot; each costs time. The others wait for modprobe, or for the kernel, which loads
# file systems and what they need by itself.
readonly BOOT_MODULES='virtio_pci virtio_blk virtio_scsi sd_mod'
readonly MODULES="$BOOT_MODULES virtio_mmio virtio_net virtio-rng nfit nd_pmem virtiofs ext4
    crc32c_generic"
# ext4 asks for this one by no name that modules.dep has; newer kernels have it in a library.
readonly MAY_LACK=crc32c_generic
declare -rA MORE_MODULES=([cloud]='' [full]='9p 9pnet_virtio')

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly build=${here%/*}/build
readonly what=guest
declare -rA OUTPUTS=([cloud]=$build/guest [full]=$build/guest/full)
# shellcheck source=tools/debian-packages.sh
. "$here/../tools/debian-packages.sh"

is_fresh() {
    local output=${OUTPUTS[$1]} built source
    for built in "$output/vmlinuz" "$output/initrd.img"; do
        for source in "$here/init" "$here/build.sh"; do
            [[ $built -nt $source ]] || return 1
        done
    done
}

all_fresh() {
    local flavour
    for flavour; do
        is_fresh "$flavour" || return 1
    done
}

# Of a flavour. Fails when apt knows no such kernel.
packages_of() {
    local release
    release=$(release_of "${METAPACKAGES[$1]}")
    [[ -n $release ]] || return 1
    image_packages "$release"
    echo busybox-static
}

# Prints the files of modules and of what they depend on, below lib/modules/VERSION. A modules.dep
# line is `module: dependency...`.
files_of_modules() {
    local tree=$1 module line
    shift
    for module; do
        grep -q "/$module\.ko" "$tree/modules.builtin" && continue
        if ! line=$(grep "/$module\.ko[^:]*:" "$tree/modules.dep"); then
            [[ $module = "$MAY_LACK" ]] && continue
            fail "no module $module in $tree"
        fi
        tr -d ':' <<<"$line" | tr ' ' '\n' | sed '/^$/d'
    done | sort -u
}

make_root() {
    local flavour=$1 tree=$2 busybox=$3 root=$4 modules file
    modules=$root/lib/modules/${tree##*/}
    mkdir -p "$root"/{bin,dev,mnt,proc,sys,tmp} "$modules"
    ln -s bin "$root/sbin" # the kernel calls /sbin/modprobe
    cp "$busybox" "$root/bin/busybox"
    install -m 755 "$here/init" "$root/init"
    # shellcheck disable=SC2086  # lists of words
    files_of_modules "$tree" $MODULES ${MORE_MODULES[$flavour]} | while read -r file; do
        install -D -m 644 "$tree/$file" "$modules/$file"
    done
    cp "$tree/modules.builtin" "$modules/"
    "$busybox" depmod -b "$root" "${tree##*/}" || fail "depmod failed for $root"
    rm -f "$modules/modules.symbols"
    echo "$BOOT_MODULES" >"$root/lib/modules/boot"
}

# Not compressed: QEMU loads it faster than an emulated CPU unpacks it.
pack() {
    (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0) >"$2"
}

# The initrd goes first and comes last: while it is there, the kernel beside it is its own.
replace() {
    local finished=$1 output=$2
    mkdir -p "$output"
    rm -f "$output/initrd.img"
    mv "$finished/vmlinuz" "$output/vmlinuz"
    mv "$finished/initrd.img" "$output/initrd.img"
}

# In the current directory.
build_guest() {
    local flavour=$1 output=${OUTPUTS[$1]} package tree busybox=unpacked/bin/busybox
    say "downloading ${METAPACKAGES[$flavour]} and busybox-static"
    fetch packages_of "$flavour"
    say 'unpacking'
    for package in *.deb; do
        unpack unpacked "$package"
    done
    tree=$(echo unpacked/lib/modules/*)
    "$busybox" depmod -b unpacked "${tree##*/}" || fail "depmod failed for ${tree##*/}"

    say "packing kernel ${tree##*/}"
    make_root "$flavour" "$tree" "$busybox" root
    mkdir finished
    # In boot/, or since Debian 14 beside its modules.
    cp "$(find unpacked -name 'vmlinuz*' -type f)" finished/vmlinuz
    pack root finished/initrd.img
    replace finished "$output"
    say "ready: $output"
}

# The cloud guest is the last: make looks at it alone.
[[ $# -gt 0 ]] || set -- full cloud
for flavour; do
    [[ -n ${OUTPUTS[$flavour]:-} ]] || fail "there is no guest '$flavour': choose cloud or full"
done
all_fresh "$@" && exit 0
require_tools apt-cache apt-get cpio dpkg flock
mkdir -p "$build"
exec 9>"$build/.guest.lock"
flock 9 # another build may hold it, and may have built what is wanted

work=$(mktemp -d "$build/.guest.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for flavour; do
    is_fresh "$flavour" && continue
    mkdir "$work/$flavour"
    cd "$work/$flavour"
    build_guest "$flavour"
done
