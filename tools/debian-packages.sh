# shellcheck shell=bash
# Functions that get files out of Debian packages, which are downloaded and unpacked but never
# installed: for guest/build.sh and lab/build.sh, which say `what` they build.

# shellcheck disable=SC2154  # what
say() { printf '%s: %s\n' "$what" "$*"; }

fail() {
    printf '%s: %s\n' "$what" "$*" >&2
    exit 1
}

require_tools() {
    local tool
    for tool; do
        command -v "$tool" >/dev/null ||
            fail "$tool is missing; on Debian, as root, run: tools/install-packages test"
    done
}

# `6.1.0-56-amd64`: a metapackage depends on the newest kernel, whose name has its release in it.
release_of() {
    apt-cache depends --important "$1" 2>/dev/null |
        sed -n 's/^ *Depends: linux-image-\([0-9].*\)/\1/p'
}

# The kernel of a release, and its modules, which newer Debians have in packages of their own.
image_packages() {
    echo "linux-image-$1"
    apt-cache depends --important "linux-image-$1" 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-\)/\1/p' | grep -F -e "-$1" || true
}

# Into the current directory. As root, apt would warn that its own user cannot write here.
download() { apt-get -qq -o APT::Sandbox::User=root download "$@" 2>apt.log; }

try_fetch() {
    local packages
    # shellcheck disable=SC2086  # a list of words
    packages=$("$@") && download $packages
}

# Into the current directory: the packages that a command prints. The package lists are renewed when
# they are empty or name a version that has left the mirror.
fetch() {
    try_fetch "$@" && return
    say 'renewing the package lists'
    apt-get -qq update >apt.log 2>&1 || fail "apt-get update: $(first_error)"
    # Without a network, apt-get update only warns.
    "$@" >/dev/null || fail "apt does not know the packages: $(first_error)"
    try_fetch "$@" || fail "apt-get download: $(first_error)"
}

first_error() { grep -m 1 '^[EW]:' apt.log || echo 'no message of apt says why'; }

# `unpack DIRECTORY PACKAGE [OPTION OF TAR]...`. Debian 13 moved what was in /bin and /lib below
# /usr: here it is in bin/ and lib/ whatever the release.
unpack() {
    local directory=$1 package=$2
    shift 2
    mkdir -p "$directory"
    dpkg --fsys-tarfile "$package" |
        tar -x -C "$directory" --transform='flags=rh;s,^\./usr/\(bin\|lib\)/,./\1/,' "$@" ||
        fail "cannot unpack $package"
}
