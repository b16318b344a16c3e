#!/bin/bash
# Builds what the lab VM runs on, below build/lab:
#
#   6.1/      Debian 12's kernel
#   6.12/     Debian 13's kernel, which Debian 12 has as its newer one; with VFIO built again to have
#             iommufd and character devices of its own, which Debian leaves out
#   busybox   its first programs
#   nested/   a guest that has booted, to be restored in a VM in the lab
#
#   lab/build.sh [VERSION]...    these kernels alone; by default all that this Debian has
#
# Beside each kernel are two samples of mediated devices and a network card that the kernel plays.
#
# Everything comes out of Debian packages, downloaded and unpacked but never installed. Returns at
# once when all of it is there, built by this very script. Each part is built in a temporary
# directory and renamed at the end, so an interrupted build leaves nothing half-done. Downloads are
# kept until then, so the next one need not fetch them again.
set -euo pipefail

readonly KNOWN='6.1 6.12'

readonly SAMPLES='mtty mdpy'

# What is built again for 6.12, below drivers/vfio.
readonly VFIO_MODULES='vfio vfio_iommu_type1 pci/vfio-pci-core pci/vfio-pci mdev/mdev'

# Directories of modules that no VM has a use for, half of them all.
readonly UNUSED='sound drivers/gpu drivers/iio drivers/media drivers/net/wireless drivers/staging
    drivers/usb'

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly project=${here%/*}
readonly build=$project/build/lab
readonly downloads=$build/downloads

readonly what=lab
# shellcheck source=tools/debian-packages.sh
. "$here/../tools/debian-packages.sh"

recipe() { cat "$here/build.sh" "$project/tools/debian-packages.sh" "$here/vmlinux.py" | sha256sum; }

# Whether all that the lab uses of a kernel is there.
is_complete() {
    local tree=$build/$1 file
    [[ -s $tree/vmlinux && $(cat "$tree/recipe" 2>/dev/null) = "$(recipe)" ]] || return 1
    for file in modules.dep.bin $(module_files "$1"); do
        compgen -G "$tree/lib/modules/*/$file" >/dev/null || return 1
    done
}

# Those that are built here, below lib/modules/RELEASE.
module_files() {
    local module
    for module in $SAMPLES netdevsim; do
        echo "extra/$module.ko"
    done
    [[ $1 != 6.1 ]] || return 0
    echo extra/iommufd.ko
    for module in $VFIO_MODULES; do
        echo "kernel/drivers/vfio/$module.ko"
    done
}

all_complete() {
    local version
    [[ -x $build/busybox ]] || return 1
    for version in $wanted; do
        is_complete "$version" || return 1
    done
}

# The release of a version's kernel: Debian's own one, or a newer one that it has too.
release_of_version() {
    local metapackage release
    for metapackage in linux-image-amd64 "linux-image-$1-amd64"; do
        release=$(release_of "$metapackage")
        [[ $release != "$1".* ]] || {
            echo "$release"
            return
        }
    done
    return 1
}

# The kernel, and what its modules are built of and with.
packages_of() {
    local version=$1 release kbuild
    release=$(release_of_version "$version") || return 1
    kbuild=linux-kbuild-${release%-amd64}
    [[ $version != 6.1 ]] || kbuild=linux-kbuild-6.1
    image_packages "$release"
    echo "linux-headers-$release linux-headers-${release%-amd64}-common $kbuild"
    echo "linux-source-$version"
}

# The versions that this Debian has.
versions() {
    local version
    for version in $KNOWN; do
        release_of_version "$version" >/dev/null && echo "$version"
    done
    return 0
}

# Prints the path of a package in the current directory, where an older one may be too.
file_of() {
    local version file
    version=$(apt-cache show --no-all-versions "$1" | sed -n 's/^Version: //p')
    for file in "$PWD/$1_${version//:/%3a}"_*.deb; do
        [[ -s $file ]] || fail "apt-get has not downloaded $file"
        echo "$file"
    done
}

unpack_kernel() {
    local package directory
    local -a unused=()
    for directory in $UNUSED; do
        unused+=("--exclude=*/kernel/$directory")
    done
    for package; do
        unpack kernel "$package" "${unused[@]}" --exclude='./usr/share'
    done
    python3 "$here/vmlinux.py" kernel/boot/vmlinuz-* kernel/vmlinux ||
        fail "cannot unpack the kernel of $*"
    rm -r kernel/boot
}

# The headers name their own directory as if they were installed, and link to where packages put them.
unpack_headers() {
    local package makefile
    for package; do
        dpkg -x "$package" headers || fail "cannot unpack $package"
    done
    for makefile in headers/usr/src/*/Makefile; do
        sed -i "s#^include /usr/src/#include $PWD/headers/usr/src/#" "$makefile"
    done
}

# Of the sources no more than what is built.
unpack_source() {
    local version=$1 package=$2
    shift 2
    dpkg --fsys-tarfile "$package" | tar -xO "./usr/src/linux-source-$version.tar.xz" | xz -dc |
        tar -x --one-top-level=source --strip-components=1 "${@/#/linux-source-$version/}" ||
        fail "cannot unpack $package"
}

# `make_modules RELEASE DIRECTORY [VARIABLE=VALUE]...`
make_modules() {
    local release=$1 directory=$2
    shift 2
    make -s -j"$(nproc)" -C "headers/usr/src/linux-headers-$release" M="$PWD/$directory" \
        CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules >make.log 2>&1 ||
        fail "make in $directory: $(grep -m 1 -i error make.log || tail -n 1 make.log)"
}

# `copy_samples DIRECTORY`: their sources, to be built there.
copy_samples() {
    cp -r source/samples/vfio-mdev "$1"
    echo "obj-m := ${SAMPLES// /.o }.o" >"$1/Makefile"
}

# `install_samples RELEASE DIRECTORY`
install_samples() {
    local extra=kernel/lib/modules/$1/extra module
    mkdir -p "$extra"
    for module in $SAMPLES; do
        strip --strip-debug -o "$extra/$module.ko" "$2/$module.ko"
    done
}

build_samples() {
    copy_samples samples
    make_modules "$1" samples
    install_samples "$1" samples
}

# A network card that the kernel plays, with virtual functions; Debian has none.
build_netdevsim() {
    local release=$1
    cp -r source/drivers/net/netdevsim netdevsim
    make_modules "$release" netdevsim CONFIG_NETDEVSIM=m
    strip --strip-debug -o "kernel/lib/modules/$release/extra/netdevsim.ko" \
        netdevsim/netdevsim.ko
}

# VFIO's own sources, with the options that Debian leaves out. What iommufd needs of the kernel's
# interval trees is built with such an option only, and becomes a part of iommufd. The samples are
# built with them: modules that were made for Debian's VFIO do not load with another one.
build_vfio() {
    local release=$1 modules=kernel/lib/modules/$1 module
    mkdir vfio
    cp -r source/drivers/iommu/iommufd source/drivers/vfio vfio/
    cp source/drivers/iommu/*.h vfio/
    {
        printf '#include <linux/%s.h>\n' interval_tree module
        sed '1,/#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER/d; /^#endif/,$d; /EXPORT_SYMBOL/d' \
            source/lib/interval_tree.c
    } >vfio/iommufd/span_iter.c
    copy_samples vfio/samples
    write_vfio_makefiles
    make_modules "$release" vfio
    install_samples "$release" vfio/samples
    for module in $VFIO_MODULES; do
        rm -f "$modules/kernel/drivers/vfio/$module.ko".*
        strip --strip-debug -o "$modules/kernel/drivers/vfio/$module.ko" "vfio/vfio/$module.ko"
    done
    strip --strip-debug -o "$modules/extra/iommufd.ko" vfio/iommufd/iommufd.ko
}

write_vfio_makefiles() {
    cat >vfio/Makefile <<'END'
subdir-ccflags-y := -DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_IOMMUFD_DRIVER=1
subdir-ccflags-y += -DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1
obj-m := iommufd/ vfio/ samples/
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
    cat >vfio/vfio/mdev/Makefile <<'END'
mdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o
obj-m := mdev.o
END
}

# In the current directory, of packages in another one.
build_kernel() {
    local version=$1 fetched=$2 release name package
    local -a sources=(samples/vfio-mdev drivers/net/netdevsim)
    local -A files
    [[ $version = 6.1 ]] || sources+=(drivers/vfio drivers/iommu lib/interval_tree.c)
    release=$(release_of_version "$version")
    for package in $(packages_of "$version"); do
        name=${package#linux-}
        files[${name%%-*}]+=" $(cd "$fetched" && file_of "$package")"
    done

    say "unpacking Linux $release"
    # shellcheck disable=SC2086  # lists of words
    {
        unpack_kernel ${files[image]} ${files[binary]-} ${files[modules]-} ${files[base]-}
        unpack_headers ${files[headers]} ${files[kbuild]}
        unpack_source "$version" ${files[source]} "${sources[@]}"
    }
    say "building modules for Linux $release"
    case $version in
        6.1) build_samples "$release" ;;
        *) build_vfio "$release" ;;
    esac
    build_netdevsim "$release"
    depmod --basedir "$PWD/kernel" "$release" || fail "depmod failed for $release"
    recipe >kernel/recipe
    rm -rf "${build:?}/$version"
    mv kernel "$build/$version"
}

# In the current directory.
build_busybox() {
    [[ ! -x $build/busybox ]] || return 0
    unpack busybox "$(cd "$downloads" && file_of busybox-static)"
    mv busybox/bin/busybox "$build/busybox"
}

# All downloads come first: what needs a network fails before anything takes time.
build_all() {
    local version
    say 'downloading kernels and their sources'
    mkdir -p "$downloads"
    cd "$downloads"
    [[ -x $build/busybox ]] || fetch echo busybox-static
    for version in $wanted; do
        is_complete "$version" || fetch packages_of "$version"
    done
    cd "$work"
    build_busybox
    for version in $wanted; do
        is_complete "$version" && continue
        mkdir "$work/$version"
        cd "$work/$version"
        build_kernel "$version" "$downloads"
        say "ready: $build/$version"
    done
    rm -rf "$downloads"
}

# Its Python module knows whether it must be made again.
build_nested() {
    "$project/guest/build.sh" cloud
    (cd "$project" && python3 -m tests.lab.nested "$build/nested")
}

require_tools apt-cache apt-get depmod dpkg flock gcc make python3 strip xz zstd
wanted=${*:-$(versions)}
[[ -n $wanted ]] || {
    apt-get -qq update || true
    wanted=$(versions)
}
[[ -n $wanted ]] || fail "this Debian has none of the kernels $KNOWN: its lab is not supported yet"
if ! all_complete; then
    mkdir -p "$build"
    exec 9>"$build/.lock"
    flock 9 # another build may hold it, and may have built what is wanted
    work=$(mktemp -d "$build/.building.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    all_complete || build_all
fi
build_nested
