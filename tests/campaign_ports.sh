#!/bin/sh
# The test suite on other machines, C libraries and compilers: 32 bits,
# big-endian under qemu, musl, tcc, every gcc and clang that is installed,
# hardened and optimised builds, a program in every standard, and all warnings
# of the oldest gcc and the newest clang. No sanitizer; make check has those.
#
#     tests/campaign_ports.sh [cell]
#
# With an argument only the cells with this in their name: s390x, powerpc,
# i686, musl, tcc, clang, gcc, hardened, trapv, O3, program, warnings. A cell is
# one kind of build; each test of each program in it is one pass, failure or
# skip. The cross compilers are not installed, since Debian's remove
# gcc-multilib: they are unpacked into build/cross, as any user, with
# apt-get download. SETUP=no: nothing is fetched.
#
# PORT_TESTS="base json": only these programs, also where others are left out
# because another cell with much the same has them. PORT_TIMEOUT: seconds for
# one program, and four times that for one under qemu.

cd "$(dirname "$0")/.." || exit 1
root=$(pwd)
dir=build/ports
cross=$root/build/cross
only=$1
limit=${PORT_TIMEOUT:-300}
tests=${PORT_TESTS:-base json sse http wire call chat run tree agent task}
fewer=${PORT_TESTS:-base json sse http wire call chat task}
rm -rf $dir
mkdir -p $dir
results=$dir/results
: >$results
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY \
    ALL_PROXY NO_PROXY OPENAI_API_KEY OPENAI_BASE_URL OPENAI_ORG_ID MAKEFLAGS

has() {
    command -v "$1" >/dev/null 2>&1
}
wanted() { # cell
    case $1 in *"$only"*) return 0 ;; esac
    return 1
}
say() { # line
    echo "$1" | tee -a $results
}
bounded() { # seconds, command
    if has timeout; then
        timeout -k 5 "$@"
    else
        shift
        "$@"
    fi
}

# ---- cross compilers -------------------------------------------------------

# Tells in $why why there is none. Debian and Ubuntu on x86_64 only.
why=
fetch_cross() {
    [ -e "$cross/done" ] && return 0
    if [ "$SETUP" = no ]; then
        why="not there, and SETUP=no"
        return 1
    elif ! has apt-get || ! has dpkg || [ "$(uname -m)" != x86_64 ]; then
        why="cross compilers come from apt on x86_64"
        return 1
    fi
    rm -rf "$cross"
    mkdir -p "$cross/root"
    # What an installation would bring, less the runtimes of sanitizers and
    # of C++, which no test needs.
    list=$(apt-get install -s --no-install-recommends qemu-user-static \
        gcc-s390x-linux-gnu gcc-powerpc-linux-gnu libc6-dev-s390x-cross \
        libc6-dev-powerpc-cross 2>/dev/null |
        sed -n 's/^Inst \([^ ]*\).*/\1/p' |
        grep -v -E 'asan|ubsan|gomp|libitm|stdc|cross-base|gnu-base')
    # shellcheck disable=SC2086
    if [ ! "$list" ] || ! (cd "$cross" && apt-get download -q $list) \
        >$dir/fetch.log 2>&1; then
        why="apt-get has no cross compilers, see $dir/fetch.log"
        return 1
    fi
    for p in "$cross"/*.deb; do
        dpkg -x "$p" "$cross/root" || {
            why="cannot unpack $p"
            return 1
        }
    done
    rm -f "$cross"/*.deb
    touch "$cross/done"
}

# Sets $cc and $run to a compiler and an emulator that make programs of this
# machine and run them.
find_cross() { # gcc's name, qemu's name
    for cc in "$1-linux-gnu-gcc" "$cross/$1-gcc"; do
        for run in "qemu-$2-static" "qemu-$2" \
            "$cross/root/usr/bin/qemu-$2-static"; do
            if has "$cc" && has "$run"; then return 0; fi
        done
    done
    fetch_cross || return 1
    cc=$cross/$1-gcc run=$cross/root/usr/bin/qemu-$2-static
    # It finds its parts and the headers from where it stands itself.
    cat >"$cc" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$cross/root/usr/lib/x86_64-linux-gnu"
export PATH="$cross/root/usr/bin:\$PATH"
exec $1-linux-gnu-gcc "\$@"
END
    chmod +x "$cc"
}

# ---- cells -----------------------------------------------------------------

# A compiler without constructors registers no test by itself.
write_main() { # test, file, compiler and flags
    t=$1 out=$2
    shift 2
    {
        echo '#define main test_main_of_its_own'
        echo "#include \"tests/test_$t.c\""
        echo '#undef main'
        echo 'int main(int argc, char **argv)'
        echo '{'
        "$@" -E -DLLMCB_NO_CURL= -I. "tests/test_$t.c" |
            sed -n 's/.*void \(test_register_[a-z0-9_]*\)(void).*/    \1();/p'
        echo '    return test_main(argc, argv);'
        echo '}'
    } >"$out"
}

cell() { # name, emulator or "", compiler and flags
    name=$1 emulator=$2
    shift 2
    wanted "$name" || return
    seconds=$limit
    [ "$emulator" ] && seconds=$((4 * limit))
    at=$dir/$(echo "$name" | tr -c 'A-Za-z0-9\n' _)
    mkdir -p "$at"
    begin=$(date +%s) p=0 f=0 s=0
    for t in $tests; do
        src=tests/test_$t.c
        case $1 in
        *tcc)
            src=$at/$t.c
            write_main "$t" "$src" "$@"
            ;;
        esac
        extra=$(sed -n 's|^/\* build: \(.*\) \*/$|\1|p' "tests/test_$t.c")
        # The empty value is what the tests give it themselves.
        # shellcheck disable=SC2086
        if ! "$@" -DLLMCB_NO_CURL= -I. -o "$at/$t" "$src" \
            -lpthread $extra >"$at/$t.log" 2>&1; then
            say "  FAILED: $name: test_$t: not built"
            grep -E 'error|undefined' "$at/$t.log" | head -n 5 | sed 's/^/    /'
            f=$((f + 1))
            continue
        fi
        # shellcheck disable=SC2086
        bounded "$seconds" $emulator "$at/$t" </dev/null >"$at/$t.out" 2>&1
        status=$?
        sum=$(grep -a -E '^[^ ]+: [0-9]+ passed, [0-9]+ failed, [0-9]+ sk' \
            "$at/$t.out" | tail -n 1)
        a=0 b=0 c=0
        if [ "$sum" ]; then
            nums=$(echo "${sum#*: }" | tr -cd '0-9 \n' | tr -s ' ')
            nums=${nums% } b=${nums#* }
            a=${nums%% *} b=${b%% *} c=${nums##* }
        fi
        p=$((p + a)) s=$((s + c))
        if [ "$status" = 124 ] || [ "$status" = 137 ]; then
            say "  FAILED: $name: test_$t: not done in $seconds s"
            b=$((b + 1))
        elif [ ! "$sum" ] || { [ $status != 0 ] && [ "$b" = 0 ]; }; then
            say "  FAILED: $name: test_$t: status $status"
            tail -n 3 "$at/$t.out" | sed 's/^/    /'
            b=$((b + 1))
        elif [ "$((a + b))" = 0 ]; then
            say "  FAILED: $name: test_$t: no test ran"
            b=1
        fi
        f=$((f + b))
        grep -a -B 3 '^  FAILED' "$at/$t.out" | grep -v '^--' |
            sed -e "s/^  FAILED: /&$name: test_$t: /" \
                -e '/^  FAILED/!s/^/  /' | tee -a $results
        grep -a '^  skipped' "$at/$t.out" |
            sed "s/^  skipped: /&$name: test_$t: /" | tee -a $results
        rm -f "$at/$t"
    done
    say "$name: $p passed, $f failed, $s skipped, $(($(date +%s) - begin)) s"
}
skip() { # cell, why
    wanted "$1" || return
    say "  skipped: $1: $2"
    say "$1: 0 passed, 0 failed, 1 skipped"
}

# Signals, threads and timers are qemu's there; what is looked for is byte
# order, the width of types and alignment.
for m in s390x:s390x powerpc:ppc; do
    n=${m%:*}
    wanted "$n" || continue
    if find_cross "$n" "${m#*:}"; then
        cell "$n" "$run" "$cc" -O1 -g -static
    else
        skip "$n" "$why"
    fi
done

echo 'int main(void) { return 0; }' >$dir/empty.c
works() { # compiler and flags
    "$@" -o $dir/empty $dir/empty.c >/dev/null 2>&1 && $dir/empty
}
if works gcc -m32; then
    cell i686 "" gcc -m32 -O1 -g
    # Without SSE the x87 registers hold more than a double does.
    cell "i686 x87 O2" "" gcc -m32 -mfpmath=387 -O2 -g
else
    skip i686 "gcc-multilib is not installed"
fi
if has musl-gcc; then
    cell musl "" musl-gcc -O1 -g -static
else
    skip musl "musl-gcc is not installed"
fi
if has tcc; then
    cell tcc "" tcc -g
else
    skip tcc "tcc is not installed"
fi
# The newest of each kind runs all, the others what is quickly compiled.
clangs='' gccs='' clang='' oldgcc=''
for v in 30 29 28 27 26 25 24 23 22 21 20 19 18 17 16 15 14 13 12 11 10 9; do
    has clang-$v && clangs="$clangs clang-$v"
    if has gcc-$v; then gccs="$gccs gcc-$v" oldgcc=gcc-$v; fi
done
[ "$clangs" ] || ! has clang || clangs=clang
[ "$gccs" ] || ! has gcc || gccs=gcc
all=$tests
for clang in $clangs; do
    cell "$clang O2" "" "$clang" -O2 -g
    tests=$fewer
done
tests=$all
# shellcheck disable=SC2086
set -- $clangs
clang=$1
[ "$clang" ] || skip clang "clang is not installed"
for c in $gccs; do
    cell "$c O2" "" "$c" -O2 -g
    tests=$fewer
done
tests=$all
[ "$gccs" ] || skip gcc "gcc is not installed"

# What distributions build with, and what stops a program that reads what was
# never written, or whose signed numbers run over.
harden="-fstack-protector-strong -fstack-clash-protection -D_GLIBCXX_ASSERTIONS"
harden="$harden -fPIE -pie -Wl,-z,relro,-z,now"
if works gcc -O2 -ftrivial-auto-var-init=pattern; then
    harden="$harden -ftrivial-auto-var-init=pattern"
fi
# shellcheck disable=SC2086
cell "hardened 3" "" gcc -O2 -g $harden -D_FORTIFY_SOURCE=3
tests=$fewer
# shellcheck disable=SC2086
cell "hardened 2" "" gcc -O2 -g $harden -D_FORTIFY_SOURCE=2
cell "trapv gcc" "" gcc -O1 -g -ftrapv
[ "$clang" ] && cell "trapv $clang" "" "$clang" -O1 -g -ftrapv \
    -ftrivial-auto-var-init=pattern
tests=$all
cell "O3" "" gcc -O3 -g

# ---- a program in every standard -------------------------------------------

# An answer is played from memory: the loop, the threads, the dispatch, the
# parsers and the coroutines in one. Same text for C and C++.
cat >$dir/main.c <<'END'
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <string.h>

static const char answer[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    "Connection: close\r\n\r\n"
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hel\"}}]}\n\n"
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"lo\"}}]}\n\n"
    "data: {\"choices\":[{\"index\":0,\"delta\":{},"
    "\"finish_reason\":\"stop\"}]}\n\n"
    "data: [DONE]\n\n";
static char text[64];
static int ended;

static int on_token(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    strcat(text, ev->token->text.ptr);
    return 0;
}
static llmcb_step on_end(llmcb_task *t, llmcb_handler *h,
                         const llmcb_event *ev)
{
    (void)h;
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    ended += ev->kind == LLMCB_LLM_END;
    LLMCB_END(t);
}
int main(void)
{
    llmcb_loop_desc ld = { 0 };
    llmcb_replay_desc rd = { 0 };
    llmcb_chat_desc cd = { 0 };
    llmcb_recording r = { 0 };
    llmcb_handler h = { 0 }, *hs[1];
    llmcb_message m;
    llmcb_loop *loop;
    llmcb_chat *chat;
    llmcb_op *op;
    int bad;

    ld.virtual_clock = true;
    loop = llmcb_loop_new(&ld);
    r.bytes = answer;
    r.len = sizeof answer - 1;
    r.end = LLMCB_REPLAY_CLOSE;
    rd.recordings = &r;
    rd.n_recordings = 1;
    h.sync.on_llm_new_token = on_token;
    h.async.on_llm_end = on_end;
    hs[0] = &h;
    cd.transport = llmcb_replay_new(loop, &rd);
    cd.api_key = "none";
    cd.streaming = true;
    cd.callbacks = hs;
    cd.n_callbacks = 1;
    chat = llmcb_chat_new(loop, &cd);
    memset(&m, 0, sizeof m); /* { 0 } is no enum in C++ */
    m.role = LLMCB_USER;
    m.content = "Say hello";
    op = llmcb_chat_generate(chat, &m, 1, NULL);
    bad = llmcb_op_wait(op) != LLMCB_OK;
    if (bad) puts(llmcb_op_error(op)->message);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    bad |= llmcb_loop_free(loop) != LLMCB_OK;
    bad |= strcmp(text, "Hello") != 0 || ended != 1;
    printf("%s %d\n", text, ended);
    return bad;
}
END
cp $dir/main.c $dir/main.cpp
program() { # file, compiler and flags
    e=$1
    shift
    name="program: $*"
    wanted "$name" || return
    if ! has "$1"; then
        say "  skipped: $name: $1 is not installed"
        say "$name: 0 passed, 0 failed, 1 skipped"
    elif "$@" -DLLMCB_NO_CURL -I. -o $dir/program "$dir/main.$e" -lpthread \
        >$dir/program.log 2>&1 && bounded 60 $dir/program >>$dir/program.log
    then
        say "$name: 1 passed, 0 failed, 0 skipped"
    else
        say "  FAILED: $name"
        head -n 5 $dir/program.log | sed 's/^/    /'
        say "$name: 0 passed, 1 failed, 0 skipped"
    fi
}
for std in c99 gnu99 c11 gnu11 c17 c2x gnu2x; do
    for c in $gccs $clangs; do program c "$c" -std=$std; done
done
for std in c++11 c++14 c++17 c++20 gnu++20; do
    for c in $gccs; do program cpp "g++${c#gcc}" -std=$std; done
    for c in $clangs; do program cpp "clang++${c#clang}" -std=$std; done
done
has tcc && program c tcc
has musl-gcc && program c musl-gcc -std=c99
# shellcheck disable=SC2086
program cpp g++ -std=c++20 -O2 $harden -D_FORTIFY_SOURCE=3

# ---- all warnings ----------------------------------------------------------

# tests/check_build.sh with other compilers behind the names that it uses.
if wanted warnings; then
    mkdir -p $dir/bin
    for c in "gcc $oldgcc" "g++ g++${oldgcc#gcc}" "clang $clang" \
        "clang++ clang++${clang#clang}"; do
        at=$(command -v "${c#* }") && ln -sf "$at" "$dir/bin/${c%% *}"
    done
    name="warnings: $oldgcc, $clang"
    PATH=$root/$dir/bin:$PATH sh tests/check_build.sh >$dir/warnings.log 2>&1
    sed -n "s/^  FAILED: /&$name: /p;s/^  skipped: /&$name: /p" \
        $dir/warnings.log | tee -a $results
    sum=$(sed -n 's/^check_build: //p' $dir/warnings.log)
    say "$name: ${sum:-0 passed, 1 failed, 0 skipped}"
fi

# ---- add up ----------------------------------------------------------------

sum=$(sed -n 's/.*: \([0-9]* passed, [0-9]* failed, [0-9]* skip\).*/\1/p' \
    $results | awk '{ p += $1; f += $3; s += $5 }
    END { printf "%d passed, %d failed, %d skipped", p, f, s }')
echo "campaign_ports: $sum"
case $sum in *" 0 failed"*) ;; *) exit 1 ;; esac
