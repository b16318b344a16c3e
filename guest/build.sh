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
declare -rA MORE_MODULES=([cloud]='' [full]='9p 9pnet_virtio')

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly build=${here%/*}/build
declare -rA OUTPUTS=([cloud]=$build/guest [full]=$build/guest/full)

say() { printf 'guest: %s\n' "$*"; }

fail() {
    printf 'guest: %s\n' "$*" >&2
    exit 1
}

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

require_tools() {
    local tool
    for tool in apt-cache apt-get cpio dpkg flock; do
        command -v "$tool" >/dev/null || fail "$tool is missing; install the package that has it"
    done
}

# The metapackage depends on the newest kernel, whose name has its ABI version in it.
kernel_package() {
    apt-cache depends --important "$1" 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p'
}

# Into the current directory. As root, apt would warn that its own user cannot write here.
download() {
    apt-get -qq -o APT::Sandbox::User=root download "$(kernel_package "$1")" busybox-static \
        2>apt.log
}

# The package lists are renewed when they are empty or name a version that has left the mirror.
fetch_packages() {
    [[ -n $(kernel_package "$1") ]] && download "$1" && return
    say 'renewing the package lists'
    apt-get -qq update >apt.log 2>&1 || fail "apt-get update: $(first_error)"
    # Without a network, apt-get update only warns.
    [[ -n $(kernel_package "$1") ]] || fail "apt knows no $1: $(first_error)"
    download "$1" || fail "apt-get download: $(first_error)"
}

first_error() {
    grep -m 1 '^[EW]:' apt.log || echo 'no message of apt says why'
}

# Prints the files of modules and of what they depend on, below lib/modules/VERSION. A modules.dep
# line is `module: dependency...`.
files_of_modules() {
    local tree=$1 module line
    shift
    for module; do
        grep -q "/$module\.ko" "$tree/modules.builtin" && continue
        line=$(grep "/$module\.ko[^:]*:" "$tree/modules.dep") || fail "no module $module in $tree"
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
    fetch_packages "${METAPACKAGES[$flavour]}"
    say 'unpacking'
    for package in *.deb; do
        dpkg -x "$package" unpacked || fail "cannot unpack $package"
    done
    tree=$(echo unpacked/lib/modules/*)
    "$busybox" depmod -b unpacked "${tree##*/}" || fail "depmod failed for ${tree##*/}"

    say "packing kernel ${tree##*/}"
    make_root "$flavour" "$tree" "$busybox" root
    mkdir finished
    cp unpacked/boot/vmlinuz-* finished/vmlinuz
    pack root finished/initrd.img
    replace finished "$output"
    say "ready: $output"
}

# The cloud guest is the last: make looks at it alone.
[[ $# -gt 0 ]] || set -- full cloud
for flavour; do
    [[ -n ${OUTPUTS[$flavour]:-} ]] || fail "there is no guest '$flavour': say cloud or full"
done
all_fresh "$@" && exit 0
require_tools
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
