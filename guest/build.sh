#!/bin/bash
# Builds the tiny guest that tests and the demo boot: vmlinuz and initrd.img in build/guest/.
#
# The kernel and busybox come out of Debian packages, downloaded and unpacked but never installed.
# Returns at once when both files are newer than guest/init and this script. Everything is built in
# a temporary directory and renamed at the end, so an interrupted build leaves nothing half-done.
set -euo pipefail

readonly KERNEL_METAPACKAGE=linux-image-cloud-amd64
readonly MODULES='virtio_pci virtio_blk virtio_scsi sd_mod'

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly build=${here%/*}/build
readonly output=$build/guest

say() { printf 'guest: %s\n' "$*"; }

fail() {
    printf 'guest: %s\n' "$*" >&2
    exit 1
}

is_fresh() {
    local built source
    for built in "$output/vmlinuz" "$output/initrd.img"; do
        for source in "$here/init" "$here/build.sh"; do
            [[ $built -nt $source ]] || return 1
        done
    done
}

require_tools() {
    local tool
    for tool in apt-cache apt-get cpio dpkg flock gzip; do
        command -v "$tool" >/dev/null || fail "$tool is missing; install the package that has it"
    done
}

# The metapackage depends on the newest kernel, whose name has its ABI version in it.
kernel_package() {
    apt-cache depends --important "$KERNEL_METAPACKAGE" 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p'
}

# Into the current directory. As root, apt would warn that its own user cannot write here.
download() {
    apt-get -qq -o APT::Sandbox::User=root download "$(kernel_package)" busybox-static 2>apt.log
}

# The package lists are renewed when they are empty or name a version that has left the mirror.
fetch_packages() {
    [[ -n $(kernel_package) ]] && download && return
    say 'renewing the package lists'
    apt-get -qq update >apt.log 2>&1 || fail "apt-get update: $(first_error)"
    # Without a network, apt-get update only warns.
    [[ -n $(kernel_package) ]] || fail "apt knows no $KERNEL_METAPACKAGE: $(first_error)"
    download || fail "apt-get download: $(first_error)"
}

first_error() {
    grep -m 1 '^[EW]:' apt.log || echo 'no message of apt says why'
}

# Prints module files below lib/modules/VERSION, each after the ones it depends on. A module.dep
# line is `module: dependency...` with the deepest dependency last.
modules_in_load_order() {
    local tree=$1 module line
    for module in $MODULES; do
        grep -q "/$module\.ko" "$tree/modules.builtin" && continue
        line=$(grep "/$module\.ko[^:]*:" "$tree/modules.dep") || fail "no module $module in $tree"
        tr -d ':' <<<"$line" | tr ' ' '\n' | sed '/^$/d' | tac
    done | awk '!seen[$0]++'
}

make_root() {
    local tree=$1 busybox=$2 root=$3 file
    mkdir -p "$root"/{bin,dev,modules,proc,sys,tmp}
    cp "$busybox" "$root/bin/busybox"
    install -m 755 "$here/init" "$root/init"
    modules_in_load_order "$tree" | while read -r file; do
        cp "$tree/$file" "$root/modules/"
        echo "${file##*/}" >>"$root/modules/order"
    done
}

pack() {
    (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1) >"$2"
}

is_fresh && exit 0
require_tools
mkdir -p "$build"
exec 9>"$build/.guest.lock"
flock 9
is_fresh && exit 0 # another build held the lock

work=$(mktemp -d "$build/.guest.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$work"

say "downloading $KERNEL_METAPACKAGE and busybox-static"
fetch_packages
say 'unpacking'
for package in *.deb; do
    dpkg -x "$package" unpacked || fail "cannot unpack $package"
done
tree=$(echo unpacked/lib/modules/*)
unpacked/bin/busybox depmod -b unpacked "${tree##*/}" || fail "depmod failed for ${tree##*/}"

say "packing kernel ${tree##*/}"
make_root "$tree" unpacked/bin/busybox root
mkdir finished
cp unpacked/boot/vmlinuz-* finished/vmlinuz
pack root finished/initrd.img
rm -rf "$output"
mv -T finished "$output"
say "ready: $output"
