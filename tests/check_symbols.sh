#!/bin/sh
# What the header leaves in a program: its symbols, its data, its macros;
# that it can be included twice and in several files; and its layout.

cd "$(dirname "$0")/.." || exit 1
dir=build/check_symbols
rm -rf $dir
mkdir -p $dir
cc=${CC:-cc}
passed=0
failed=0
skipped=0

# A check passes when it says nothing.
check() { # name, what is wrong
    if [ "$2" ]; then
        failed=$((failed + 1))
        echo "  FAILED: $1"
        echo "$2" | head -n 12 | sed 's/^/    /'
    else
        passed=$((passed + 1))
    fi
}
skip() {
    skipped=$((skipped + 1))
    echo "  skipped: $1: $2"
}
finish() {
    echo "check_symbols: $passed passed, $failed failed, $skipped skipped"
    [ $failed = 0 ]
    exit
}

check "at most 80 columns, no tab, nothing but ASCII, no blank at the end" \
    "$(awk 'length($0) > 80 { print "line " NR ": " length($0) " columns" }
            /\t/ { print "line " NR ": a tab" }
            / $/ { print "line " NR ": a blank at the end" }' llmcb.h
       LC_ALL=C grep -n '[^ -~	]' llmcb.h)"

# ---- macros of the declarations ------------------------------------------

macros() { # standard, source on standard input
    $cc -std="$1" -I. -dM -E -x c - 2>&1 | sed 's/^#define //' |
        sed 's/[ (].*//' | sort -u
}
for std in c99 gnu11; do
    printf '#include <%s.h>\n' stdbool stddef stdint stdio |
        macros $std >$dir/before
    echo '#include "llmcb.h"' | macros $std >$dir/after
    check "only LLMCB_ macros from the header, $std" \
        "$(comm -13 $dir/before $dir/after | grep -v '^LLMCB_')"
    printf '#include <%s.h>\n' stdbool stddef stdint |
        macros $std >$dir/before
    printf '#define LLMCB_NO_STDIO\n#include "llmcb.h"\n' |
        macros $std >$dir/after
    check "the same and no <stdio.h> with LLMCB_NO_STDIO, $std" \
        "$(comm -13 $dir/before $dir/after | grep -v '^LLMCB_')"
done

# ---- the implementation ---------------------------------------------------

have_curl=
libs=-lpthread
if printf '#include <curl/curl.h>\n' | $cc -E - >/dev/null 2>&1; then
    have_curl=yes
    libs="-lpthread -lcurl"
else
    libs="-DLLMCB_NO_CURL -lpthread"
    skip "symbols with libcurl" "libcurl is not installed"
fi

echo '#define LLMCB_IMPLEMENTATION
#include "llmcb.h"' >$dir/impl.c
compile() { # object, source, flags
    o=$1 c=$2
    shift 2
    # Without -fno-pie tables of pointers would be in a writable section.
    $cc -std=c99 -fno-pie -I. "$@" -c -o "$dir/$o.o" "$dir/$c.c" 2>&1
}

# The names of the public functions, from the declarations.
echo '#include "llmcb.h"' | $cc -I. -E -P -x c - 2>/dev/null |
    grep -o 'llmcb_[a-z0-9_]*(' | tr -d '(' | sort -u >$dir/declared
check "declarations were found" "$([ -s $dir/declared ] || echo none)"

for flags in ${have_curl:+-DX_DEFAULT} -DLLMCB_NO_CURL -DLLMCB_NO_EPOLL; do
    case $flags in
    -DX_DEFAULT) name=default ;;
    *) name=${flags#-D} ;;
    esac
    [ "$have_curl" ] || flags="$flags -DLLMCB_NO_CURL"
    # shellcheck disable=SC2086
    errors=$(compile "$name" impl $flags)
    check "the implementation compiles, $name" "$errors"
    [ -f "$dir/$name.o" ] || continue
    nm -g --defined-only "$dir/$name.o" | awk '{ print $NF }' | sort \
        >"$dir/$name.exported"
    check "only llmcb_ names are exported, $name" \
        "$(grep -v '^llmcb_' "$dir/$name.exported")"
    check "every declared function is defined, $name" \
        "$(comm -23 $dir/declared "$dir/$name.exported")"
    check "nothing is exported that is not declared, $name" \
        "$(comm -13 $dir/declared "$dir/$name.exported")"
    check "no writable data, $name" \
        "$(nm "$dir/$name.o" | awk '$2 ~ /^[BbDdCGgSs]$/ { print }'
           size "$dir/$name.o" | awk 'NR == 2 && $2 + $3 > 0 {
               print $2 " bytes of data, " $3 " of bss" }')"
done

# ---- programs ---------------------------------------------------------------

build() { # program, sources; says what went wrong
    p=$1
    shift
    # shellcheck disable=SC2086
    $cc -std=c99 -Wall -Wextra -I. -o $dir/$p "$@" $libs 2>&1 || echo failed
    [ -x $dir/$p ] && { $dir/$p || echo "$p ended with $?"; }
}
use='    llmcb_loop *loop = llmcb_loop_new(NULL);
    if (!loop || llmcb_loop_free(loop) != LLMCB_OK) return 1;
    return llmcb_version()[0] == 0;'

printf '#include "llmcb.h"
#include "llmcb.h"
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include "llmcb.h"
int main(void)
{\n%s\n}\n' "$use" >$dir/twice.c
check "included twice, then the implementation, then twice" \
    "$(build twice -D_POSIX_C_SOURCE=200809L $dir/twice.c)"

printf '#include "llmcb.h"
int other(void);
int other(void)
{\n%s\n}\n' "$use" >$dir/other.c
printf '#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
int other(void);
int main(void)
{
    if (other()) return 1;
%s\n}\n' "$use" >$dir/main.c
check "two files, one with the implementation" \
    "$(build two $dir/main.c $dir/other.c)"

for f in main other; do
    { echo '#define LLMCB_STATIC'; echo '#define LLMCB_IMPLEMENTATION'
      grep -v LLMCB_IMPLEMENTATION $dir/$f.c; } >$dir/static_$f.c
done
check "two static copies in one program" \
    "$(build static $dir/static_main.c $dir/static_other.c)"
errors=$(compile static static_other -DLLMCB_NO_CURL)
check "a static copy exports nothing" \
    "$errors$(nm -g --defined-only $dir/static.o 2>&1 | grep -v ' other$')"

# <stdio.h> before it and nothing asked for: glibc then hides POSIX, and with
# -pthread all of it that came after 1995.
printf '#include <stdio.h>
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"\n' >$dir/late.c
for switch in -UNO -pthread; do
    check "too late for POSIX it says so first, $switch" \
        "$($cc -std=c99 -I. -DLLMCB_NO_CURL $switch -c -o $dir/late.o $dir/late.c 2>&1 |
            grep 'error[: ]' | head -n 1 | grep -v 'llmcb.h needs POSIX')"
done

printf '#define LLMCB_API __attribute__((visibility("hidden"))) extern
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
int main(void)
{\n%s\n}\n' "$use" >$dir/hidden.c
check "LLMCB_API of the program" "$(build hidden $dir/hidden.c)"

finish
