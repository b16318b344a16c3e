#!/bin/bash
# Builds what the lab VM runs on, below build/lab:
#
#   busybox       its first programs
#   6.1/          Debian's kernel, unpacked, with the sample mediated devices built beside it
#   6.12/         Debian's newer kernel, with VFIO rebuilt so that it has iommufd and cdevs, which
#                 Debian leaves out of it
#
# Everything comes out of Debian packages, downloaded and unpacked but never installed. Returns at
# once when all of it is there. Each part is built in a temporary directory and renamed at the end,
# so an interrupted build leaves nothing half-done.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly build=${here%/*}/build/lab
readonly VERSIONS='6.1 6.12'
declare -rA METAPACKAGES=([6.1]=linux-image-amd64 [6.12]=linux-image-6.12-amd64)
readonly SAMPLES='mtty mdpy'

say() { printf 'lab: %s\n' "$*"; }

fail() {
    printf 'lab: %s\n' "$*" >&2
    exit 1
}

require_tools() {
    local tool
    for tool in apt-cache apt-get bc cpio dpkg flock gcc make python3 strip xz zstd; do
        command -v "$tool" >/dev/null || fail "$tool is missing: run tools/install-packages test"
    done
}

# What `is_complete` looks for is all that the lab uses of a kernel.
is_complete() {
    local tree=$build/$1 file
    for file in vmlinux ready; do
        [[ $tree/$file -nt $here/build.sh ]] || return 1
    done
    compgen -G "$tree/lib/modules/*/modules.dep" >/dev/null &&
        compgen -G "$tree/lib/modules/*/extra/mtty.ko" >/dev/null
}

all_complete() {
    local version
    [[ -x $build/busybox ]] || return 1
    for version in $VERSIONS; do
        is_complete "$version" || return 1
    done
}

# `6.1.0-56-amd64`: the metapackage depends on the newest kernel.
abi_of() {
    apt-cache depends --important "${METAPACKAGES[$1]}" 2>/dev/null |
        sed -n 's/^ *Depends: linux-image-\([0-9].*\)/\1/p' | head -n 1
}

# Into the current directory.
download() {
    apt-get -qq -o APT::Sandbox::User=root download "$@" 2>apt.log ||
        fail "apt-get download: $(grep -m 1 '^[EW]:' apt.log || echo 'no message of apt says why')"
}

# An older kernel leaves the mirror when a newer one comes.
renew_lists() {
    say 'renewing the package lists'
    apt-get -qq update >apt.log 2>&1 || fail "apt-get update: $(head -n 1 apt.log)"
}

# The packages that a kernel's modules are built with: headers, build tools, sources.
packages_of() {
    local version=$1 abi=$2 flavour=${2%-amd64}
    echo "linux-image-$abi linux-headers-$abi linux-headers-$flavour-common linux-source-$version"
    case $version in
        6.1) echo linux-kbuild-6.1 ;;
        *) echo "linux-kbuild-$flavour" ;;
    esac
}

unpack() {
    local into=$1 package
    shift
    for package; do
        dpkg -x "$package" "$into" || fail "cannot unpack $package"
    done
}

# Of a source package no more than the directories that are built.
unpack_sources() {
    local version=$1
    shift
    dpkg --fsys-tarfile linux-source-"$version"_*.deb |
        tar -xO "./usr/src/linux-source-$version.tar.xz" | xz -dc |
        tar -x "${@/#/linux-source-$version/}"
}

make_modules() {
    local abi=$1 directory=$2
    make -s -j"$(nproc)" -C "headers/usr/src/linux-headers-$abi" M="$PWD/$directory" \
        CONFIG_DEBUG_INFO_BTF_MODULES= modules >make.log 2>&1 ||
        fail "make in $directory: $(grep -m 1 -i error make.log)"
}

# The headers name their own directory as if they were installed.
prepare_headers() {
    local makefile
    unpack headers linux-headers-*.deb linux-kbuild-*.deb
    for makefile in headers/usr/src/*/Makefile; do
        sed -i "s#^include /usr/src/#include $PWD/headers/usr/src/#" "$makefile"
    done
}

build_samples() {
    local version=$1 abi=$2 sample
    cp -r "linux-source-$version/samples/vfio-mdev" samples
    # shellcheck disable=SC2086  # a list of words
    printf 'obj-m :=%s\n' "$(printf ' %s.o' $SAMPLES)" >samples/Makefile
    make_modules "$abi" samples
    mkdir -p "kernel/lib/modules/$abi/extra"
    for sample in $SAMPLES; do
        strip -g -o "kernel/lib/modules/$abi/extra/$sample.ko" "samples/$sample.ko"
    done
}

# VFIO with iommufd and cdevs: the same sources with the options that Debian leaves out. Span
# iteration of interval trees is a part of the kernel then, and comes along in iommufd.
build_iommufd() {
    local version=$1 abi=$2 source=linux-source-$1 modules=kernel/lib/modules/$2 module
    mkdir -p vfio/iommufd
    cp "$source"/drivers/iommu/*.h vfio/
    cp "$source"/drivers/iommu/iommufd/*.[ch] vfio/iommufd/
    cp -r "$source/drivers/vfio" vfio/vfio
    {
        printf '#include <linux/interval_tree.h>\n#include <linux/module.h>\n'
        sed '1,/#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER/d;/^#endif/,$d;/EXPORT_SYMBOL/d' \
            "$source/lib/interval_tree.c"
    } >vfio/iommufd/span_iter.c
    cat >vfio/Makefile <<'END'
subdir-ccflags-y := -DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_VFIO_DEVICE_CDEV=1
subdir-ccflags-y += -DCONFIG_IOMMUFD_DRIVER=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1
obj-m := iommufd/ vfio/
END
    cat >vfio/iommufd/Makefile <<'END'
iommufd-y := device.o fault.o hw_pagetable.o io_pagetable.o ioas.o main.o pages.o
iommufd-y += vfio_compat.o span_iter.o iova_bitmap.o
obj-m := iommufd.o
END
    cat >vfio/vfio/Makefile <<'END'
vfio-y := vfio_main.o device_cdev.o group.o iommufd.o container.o virqfd.o
obj-m := vfio.o vfio_iommu_type1.o pci/ mdev/
END
    cat >vfio/vfio/pci/Makefile <<'END'
vfio-pci-core-y := vfio_pci_core.o vfio_pci_intrs.o vfio_pci_rdwr.o vfio_pci_config.o
vfio-pci-y := vfio_pci.o vfio_pci_igd.o
obj-m := vfio-pci-core.o vfio-pci.o
END
    printf 'mdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o\nobj-m := mdev.o\n' \
        >vfio/vfio/mdev/Makefile
    make_modules "$abi" vfio
    for module in vfio vfio_iommu_type1 pci/vfio-pci-core pci/vfio-pci mdev/mdev; do
        rm "$modules/kernel/drivers/vfio/$module.ko.xz"
        strip -g -o "$modules/kernel/drivers/vfio/$module.ko" "vfio/vfio/$module.ko"
    done
    strip -g -o "$modules/extra/iommufd.ko" vfio/iommufd/iommufd.ko
}

# In the current directory.
build_kernel() {
    local version=$1 abi
    abi=$(abi_of "$version")
    say "downloading Linux $version ($abi) and its sources"
    # shellcheck disable=SC2046  # a list of words
    download $(packages_of "$version" "$abi")
    say "unpacking Linux $version"
    unpack kernel linux-image-*.deb
    (cd "$here/.." && python3 -m lab.kernel "$OLDPWD"/kernel/boot/vmlinuz-* "$OLDPWD/kernel/vmlinux")
    prepare_headers
    case $version in
        6.1) unpack_sources "$version" samples/vfio-mdev ;;
        *)
            unpack_sources "$version" samples/vfio-mdev drivers/vfio drivers/iommu \
                lib/interval_tree.c
            ;;
    esac
    say "building modules for Linux $version"
    build_samples "$version" "$abi"
    [[ $version = 6.1 ]] || build_iommufd "$version" "$abi"
    "$build/busybox" depmod -b "$PWD/kernel" "$abi" || fail "depmod failed for $abi"
    rm -rf kernel/boot kernel/usr
    touch kernel/vmlinux kernel/ready
    rm -rf "${build:?}/$version"
    mv kernel "$build/$version"
}

build_busybox() {
    [[ -x $build/busybox ]] && return
    download busybox-static
    unpack busybox busybox-static_*.deb
    mv busybox/bin/busybox "$build/busybox"
}

all_complete && exit 0
require_tools
mkdir -p "$build"
exec 9>"$build/.lock"
flock 9 # another build may hold it, and may have built what is wanted
all_complete && exit 0

work=$(mktemp -d "$build/.building.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$work"
renew_lists
build_busybox
for version in $VERSIONS; do
    is_complete "$version" && continue
    mkdir "$work/$version"
    cd "$work/$version"
    build_kernel "$version"
    rm -rf "${work:?}/$version"
    say "ready: $build/$version"
done
