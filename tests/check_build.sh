#!/bin/sh
# The warning matrix: the header alone and its implementation, with every
# compiler, standard and switch that it promises, all warnings on and errors.
#
#     tests/check_build.sh [all]
#
# Without `all` each switch is tried with one compiler of a kind and each
# standard with the default switches; with it, all with all, and gcc makes
# code each time. One cell is one pass, failure or skip.

cd "$(dirname "$0")/.." || exit 1
dir=build/check_build
all=$1
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
rm -rf $dir
mkdir -p $dir

both="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow
-Wcast-qual -Wundef -Wvla -Werror"
conly="-Wstrict-prototypes -Wmissing-prototypes"

# Sources are written with the switches inside, as programs have them.
# $1 file, $2 switch; the implementation goes first, as the header says.
write_source() {
    {
        echo '#define LLMCB_IMPLEMENTATION'
        case $2 in
        default) ;;
        all_no)
            for no in CURL SOCKETS EPOLL STDIO AGENT KIT; do
                echo "#define LLMCB_NO_$no"
            done
            ;;
        LLMCB_ASSERT)
            echo '#define _POSIX_C_SOURCE 200809L'
            echo '#include <assert.h>'
            echo '#define LLMCB_ASSERT(x) assert(x)'
            ;;
        LLMCB_MALLOC)
            # Own names and own headers, so that a place that calls the C
            # library's functions by name, or relies on the order of
            # includes, does not go unseen.
            echo '#include <stddef.h>'
            echo '#ifdef __cplusplus'
            echo 'extern "C" {'
            echo '#endif'
            echo 'void *my_malloc(size_t size);'
            echo 'void *my_realloc(void *ptr, size_t size);'
            echo 'void my_free(void *ptr);'
            echo '#ifdef __cplusplus'
            echo '}'
            echo '#endif'
            echo '#define LLMCB_MALLOC(n) my_malloc(n)'
            echo '#define LLMCB_REALLOC(p, n) my_realloc(p, n)'
            echo '#define LLMCB_FREE(p) my_free(p)'
            ;;
        *) echo "#define $2" ;;
        esac
        echo '#include "llmcb.h"'
    } >"$1"
}

switches="default LLMCB_STATIC LLMCB_NO_CURL LLMCB_NO_SOCKETS LLMCB_NO_EPOLL
LLMCB_NO_STDIO LLMCB_NO_AGENT LLMCB_NO_KIT LLMCB_ALLOW_INSECURE_TLS
LLMCB_ASSERT LLMCB_MALLOC all_no"
for s in $switches; do
    write_source "$dir/$s.c" "$s"
    cp "$dir/$s.c" "$dir/$s.cpp"
    # The header alone: the same without the first line.
    for e in c cpp; do
        sed 1d "$dir/$s.c" >"$dir/$s.header.$e"
        echo 'extern int not_empty;' >>"$dir/$s.header.$e"
    done
done
# A program for the compilers that also link.
cat >$dir/main.c <<'END'
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
static llmcb_step step(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000));
    LLMCB_END(t);
}
int main(void)
{
    llmcb_loop_desc desc = { 0 };
    llmcb_loop *loop;
    llmcb_chat_desc chat_desc = { 0 };
    llmcb_chat *chat;
    llmcb_op *op;
    int bad;
    desc.virtual_clock = true;
    loop = llmcb_loop_new(&desc);
    chat_desc.extra = "[1"; /* tcc once read this for ever */
    chat = llmcb_chat_new(loop, &chat_desc);
    if (llmcb_chat_error(chat)->code != LLMCB_EINVAL) return 2;
    llmcb_chat_free(chat);
    op = llmcb_task_start(loop, step, 0, NULL);
    bad = llmcb_op_wait(op) != LLMCB_OK;
    llmcb_op_free(op);
    return llmcb_loop_free(loop) != LLMCB_OK || bad;
}
END

has() {
    command -v "$1" >/dev/null 2>&1
}

# One line a cell: name, a bar, command; or "skip", a bar, why.
cells=$dir/cells
: >$cells
nocurl=
if ! printf '#include <curl/curl.h>\n' | ${CC:-cc} -E - >/dev/null 2>&1; then
    nocurl=-DLLMCB_NO_CURL
    echo "everything with libcurl|skip|libcurl is not installed" >>$cells
fi
n=0
cell() { # compiler standard switch [more flags]
    c=$1 std=$2 s=$3
    shift 3
    name="$c -std=$std $s${1:+ $1}"
    if ! has "$c"; then
        echo "$name|skip|$c is not installed" >>$cells
    else
        case $s in LLMCB_NO_CURL | all_no) ;; *) set -- "$@" $nocurl ;; esac
        e=c w="$both $conly"
        case $c in *++) e=cpp w=$both ;; esac
        w=$(echo "$w" | tr '\n' ' ')
        n=$((n + 1))
        # Declarations alone are of no use there, and gcc says so of each.
        h=
        [ "$s" = LLMCB_STATIC ] && h=-Wno-unused-function
        # clang says all it has to say without making code, gcc most of it
        out="-c -o $dir/$n.o"
        case $1$c$all:$std:$s in
        clang*) out=-fsyntax-only ;;
        g*:c99:default | g*:c++11:default | g*:c99:all_no) ;;
        gcc:* | g++:*) out=-fsyntax-only ;;
        esac
        echo "$name|$c -std=$std $w $* -I. $out $dir/$s.$e &&" \
            "$c -std=$std $w $h $* -I. -fsyntax-only $dir/$s.header.$e" >>$cells
    fi
}
program() { # compiler flags
    if has "$1"; then
        n=$((n + 1))
        echo "$1 $2, linked and run|$1 $2 -I. -o $dir/$n.exe $dir/main.c" \
            "-lpthread && timeout 20 $dir/$n.exe" >>$cells
    else
        echo "$1 $2|skip|$1 is not installed" >>$cells
    fi
}

if [ "$all" ]; then
    for s in $switches; do
        for std in c99 c11 gnu11 c17 c2x; do
            cell gcc $std $s
            cell clang $std $s
        done
        for std in c++11 c++17; do
            cell g++ $std $s
            cell clang++ $std $s
        done
    done
else
    for s in $switches; do
        cell gcc c99 $s
        cell clang c11 $s
        cell g++ c++11 $s
    done
    for std in c11 c17 c2x gnu11; do cell gcc $std default; done
    for std in c99 c17 c2x gnu11; do cell clang $std default; done
    for c in g++ clang++; do cell $c c++17 default; done
    cell clang++ c++11 default
fi
# Some warnings need the optimiser.
cell gcc c99 default -O2
if [ "$all" ]; then
    cell gcc c99 LLMCB_STATIC -O2
    cell gcc gnu17 default -Os
fi
# The header has its own code for the address sanitizer.
cell gcc c99 default -fsanitize=address
cell clang c99 default -O2
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    if has gcc && printf '#include <stdint.h>\n' |
        gcc -m32 -c -x c -o $dir/m32.o - 2>/dev/null; then
        cell gcc c99 LLMCB_NO_CURL -m32
        cell gcc c99 all_no -m32
        # Another gcc than the default one may lack its part of multilib.
        if echo 'int main(void) { return 0; }' |
            gcc -m32 -x c -o $dir/m32 - 2>/dev/null; then
            program gcc "-m32 -DLLMCB_NO_CURL"
        else
            echo "gcc -m32, linked|skip|gcc-multilib has not all" >>$cells
        fi
    else
        echo "gcc -m32|skip|gcc-multilib is not installed" >>$cells
    fi
fi
program tcc "-Wall -DLLMCB_NO_CURL"
program musl-gcc "-std=c99 -Wall -Wextra -Werror -static -DLLMCB_NO_CURL"

# Each cell by itself, in parallel: what it says goes to a file of its own.
cat >$dir/one.sh <<'END'
line=$(sed -n "$1p" "$2/cells")
cmd=${line#*|}
case $cmd in
"skip|"*) echo "  skipped: ${line%%|*}: ${cmd#skip|}" ;;
*)
    if sh -c "$cmd" >"$2/$1.log" 2>&1; then
        echo passed
    else
        echo "  FAILED: ${line%%|*}"
        head -n 12 "$2/$1.log" | sed 's/^/    /'
    fi
    ;;
esac >"$2/$1.result"
END
total=$(wc -l <$cells)
i=1
while [ $i -le "$total" ]; do
    echo $i
    i=$((i + 1))
done | xargs -P "$jobs" -I N sh $dir/one.sh N $dir

i=1
while [ $i -le "$total" ]; do
    cat $dir/$i.result
    i=$((i + 1))
done >$dir/results
grep -v '^passed$' $dir/results
count() {
    grep -c "$1" $dir/results
}
failed=$(count '^  FAILED')
echo "check_build: $(count '^passed$') passed, $failed failed," \
    "$(count '^  skipped') skipped"
[ "$failed" = 0 ]
