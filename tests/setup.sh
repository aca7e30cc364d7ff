#!/bin/sh
# Installs what the tests need and this machine lacks, if that is possible:
# as root, with the system's own package manager. Else says what is missing;
# the tests that need it skip. Says nothing if all is there; never fails.
#
# SETUP=no make test: installs nothing.

PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin

has() {
    command -v "$1" >/dev/null 2>&1
}

# Whether a program with this line compiles.
compiles() {
    tmp=$(mktemp -d) || return 1
    printf '%s\nint main(void) { return 0; }\n' "$1" >"$tmp/a.c"
    shift
    # shellcheck disable=SC2086
    ${CC:-cc} "$@" -o "$tmp/a" "$tmp/a.c" >/dev/null 2>&1
    r=$?
    rm -rf "$tmp"
    return $r
}

# The needs that are not met.
missing() {
    has make || echo make
    c=${CC:-cc}
    has "${c%% *}" || echo cc
    has g++ || echo g++
    compiles '#include <curl/curl.h>' -lcurl || echo curl
    has nginx || echo nginx
    has openssl || echo openssl
    if has pkg-config; then
        pkg-config --exists libuv || echo uv
        pkg-config --exists glib-2.0 || echo glib
    else
        echo pkg-config uv glib
    fi
    if has clang && has clang++; then :; else echo clang; fi
    if [ "$(uname -s)" = Linux ]; then
        has tcc || echo tcc
        has musl-gcc || [ -e /etc/alpine-release ] || echo musl
        if [ "$(uname -m)" = x86_64 ] && has gcc && has apt-get; then
            CC=gcc compiles '#include <stdint.h>' -m32 || echo m32
        fi
    fi
}

# Package of a need, by package manager; none: not to be had there.
package() {
    case $1:$2 in
    apt:make | dnf:make | apk:make | pacman:make) echo make ;;
    apt:cc) echo gcc libc6-dev ;;
    dnf:cc) echo gcc glibc-devel libasan libubsan libtsan ;;
    apk:cc) echo gcc musl-dev ;;
    pacman:cc) echo gcc ;;
    apt:g++ | apk:g++) echo g++ ;;
    dnf:g++) echo gcc-c++ ;;
    pacman:g++) echo gcc ;;
    apt:curl) echo libcurl4-openssl-dev ;;
    dnf:curl) echo libcurl-devel ;;
    apk:curl) echo curl-dev ;;
    pacman:curl) echo curl ;;
    *:nginx) echo nginx ;;
    apt:uv) echo libuv1-dev ;;
    dnf:uv) echo libuv-devel ;;
    apk:uv) echo libuv-dev ;;
    pacman:uv) echo libuv ;;
    apt:glib) echo libglib2.0-dev ;;
    dnf:glib) echo glib2-devel ;;
    apk:glib) echo glib-dev ;;
    pacman:glib) echo glib2 ;;
    apt:pkg-config) echo pkg-config ;;
    *:pkg-config) echo pkgconf ;;
    *:openssl) echo openssl ;;
    *:clang) echo clang ;;
    apt:tcc | dnf:tcc | apk:tcc | pacman:tcc) echo tcc ;;
    apt:musl) echo musl-tools ;;
    dnf:musl) echo musl-gcc ;;
    pacman:musl) echo musl ;;
    apt:m32) echo gcc-multilib ;;
    esac
}

install_apt() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
        --no-install-recommends "$@"
}
install_dnf() { dnf install -y -q "$@"; }
install_apk() { apk add -q "$@"; }
install_pacman() { pacman -S --noconfirm --needed "$@"; }

need=$(missing)
[ "$need" ] || exit 0

manager=
if [ "$(id -u)" = 0 ] && [ "$SETUP" != no ]; then
    for m in apt dnf apk pacman; do
        c=$m
        [ $m = apt ] && c=apt-get
        if has $c; then
            manager=$m
            break
        fi
    done
fi
if [ "$manager" ]; then
    log=$(mktemp)
    # Debian starts a server when it is installed; the tests want only the
    # program.
    policy=
    if [ $manager = apt ] && [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
    fi
    packages=$(for n in $need; do package $manager "$n"; done | xargs)
    echo "setup: installing $packages"
    {
        case $manager in
        apt) apt-get update -q ;;
        pacman) pacman -Sy --noconfirm ;;
        esac
        # One by one if not all at once, so that one unknown name or an
        # outage leaves the others.
        # shellcheck disable=SC2086
        install_$manager $packages ||
            for p in $packages; do install_$manager "$p"; done
    } </dev/null >"$log" 2>&1
    [ "$policy" ] && rm -f "$policy"
    need=$(missing)
    [ "$need" ] && tail -5 "$log"
    rm -f "$log"
fi
# shellcheck disable=SC2086
[ "$need" ] && echo "setup: not on this machine, tests with it skip:" $need
exit 0
