#!/bin/sh
# make test and make check: builds all test programs, runs them and the
# scripted checks, and adds up. The last line is "N passed, N failed,
# N skipped"; the exit status says whether nothing failed.
#
#     tests/run.sh test | check
#
# Each program prints "NAME: N passed, N failed, N skipped" at its end. One
# that does not, ends with a status although nothing failed (a leak, a race)
# or is not done after TEST_TIMEOUT seconds counts as one failure more.

cd "$(dirname "$0")/.." || exit 1
mode=${1:-test}
export CC="${CC:-cc}"
make=${MAKE:-make}
limit=${TEST_TIMEOUT:-170}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin
# Nothing of the caller's may change what the tests see.
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY \
    ALL_PROXY NO_PROXY OPENAI_API_KEY OPENAI_BASE_URL OPENAI_ORG_ID MAKEFLAGS
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=1}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-exitcode=66}"

tests/setup.sh

dir=build/run
rm -rf $dir build/tls-*
mkdir -p $dir
log=$dir/notes # skips and failures of this script itself
: >$log

# ---- which sanitizers work here --------------------------------------------

# TSan of older compilers cannot run where the kernel randomises much.
probe() { # name, flags
    echo 'int main(void) { return 0; }' >$dir/probe.c
    # shellcheck disable=SC2086
    $CC $2 -o "$dir/probe_$1" $dir/probe.c 2>/dev/null || return 1
    for wrap in "" "setarch -R"; do
        if $wrap "$dir/probe_$1" 2>/dev/null; then
            eval "wrap_$1=\$wrap"
            return 0
        fi
    done
    return 1
}
wrap_asan='' wrap_tsan=''
asan="-fsanitize=address,undefined -fno-sanitize-recover"
tsan="-fsanitize=thread"
if ! probe asan "$asan"; then
    asan=
    echo "  skipped: AddressSanitizer: does not work with $CC" >>$log
fi
tests=
for f in tests/test_*.c; do
    n=$(basename "$f" .c)
    [ "$mode" = test ] && [ ! "$T" ] &&
        case " $LATE " in *" $n "*) continue ;; esac
    case $n in *"$T"*) [ -f "$f" ] && tests="$tests $n" ;; esac
done
tsans=
if probe tsan "$tsan"; then
    for n in $tests; do
        late=$LATE_TSAN
        [ "$mode" = check ] || [ "$T" ] && late=
        case " $NO_TSAN $late " in
        *" $n "*) ;;
        *) tsans="$tsans $n" ;;
        esac
    done
else
    echo "  skipped: ThreadSanitizer: does not work with $CC" >>$log
fi

# ---- build -----------------------------------------------------------------

targets=
for n in $tests; do targets="$targets build/tests/$n"; done
for n in $tsans; do targets="$targets build/tsan/$n"; done
[ "$T" ] || targets="$targets build/tests/serve"
# A program that another compiler or other flags have built is not this one.
if [ "$(cat build/flags 2>/dev/null)" != "$CC|$CFLAGS|$asan" ]; then
    rm -rf build/tests build/tsan
    echo "$CC|$CFLAGS|$asan" >build/flags
fi
# shellcheck disable=SC2086
if ! $make -k -j "$jobs" $targets "ASAN=$asan" >$dir/make.log 2>&1; then
    grep -E -A3 'error|undefined reference' $dir/make.log | head -n 60
fi
# Warnings of the programs are shown, but fail nothing here.
grep -E 'warning:' $dir/make.log | sort -u | head -n 20

# Programs that are run count when they are not there; this is not run.
[ "$T" ] || [ -x build/tests/serve ] ||
    echo "  FAILED: build/tests/serve: not built" | tee -a $log

# ---- run -------------------------------------------------------------------

# One line each: name, seconds that it may take, command. So many run at a
# time; what takes long begins early.
all=
plan() {
    case $1 in *"$T"*) echo "$@" >>$dir/plan ;; esac
}
: >$dir/plan
if [ "$mode" = check ]; then
    printf '#define LLMCB_IMPLEMENTATION\n#include "llmcb.h"\n' \
        >$dir/impl.c
    curl=
    printf '#include <curl/curl.h>\n' | $CC -E - >/dev/null 2>&1 ||
        curl=-DLLMCB_NO_CURL
    # With -Xclang -analyzer-output=text it also tells how it comes there.
    plan clang-analyzer 900 sh $dir/analyse.sh clang --analyze \
        -Xclang -analyzer-werror -Xclang -analyzer-opt-analyze-headers -I. \
        $curl -o $dir/impl.plist $dir/impl.c
    plan gcc-analyzer 900 sh $dir/analyse.sh gcc -fanalyzer -Werror -I. \
        $curl -c -o $dir/impl.o $dir/impl.c
    all=all
fi
plan check_build 600 sh tests/check_build.sh $all
plan test_examples 600 sh tests/test_examples.sh
# shellcheck disable=SC2086
for n in $tsans; do plan "$n-tsan" "$limit" $wrap_tsan "build/tsan/$n"; done
# shellcheck disable=SC2086
for n in $tests; do plan "$n" "$limit" $wrap_asan "build/tests/$n"; done
plan fuzz 600 sh tests/fuzz/run.sh
plan check_stack 600 sh tests/check_stack.sh $all
for f in tests/test_*.sh tests/check_*.sh; do
    n=$(basename "$f" .sh)
    grep -q "^$n " $dir/plan || plan "$n" 600 sh "$f"
done

# An analyser is one pass, failure or skip.
cat >$dir/analyse.sh <<'END'
if ! command -v "$1" >/dev/null 2>&1; then
    echo "  skipped: $1: is not installed"
    echo "analyser: 0 passed, 0 failed, 1 skipped"
elif "$@"; then
    echo "analyser: 1 passed, 0 failed, 0 skipped"
else
    echo "  FAILED: $*"
    echo "analyser: 0 passed, 1 failed, 0 skipped"
    exit 1
fi
END
cat >$dir/one.sh <<'END'
name=$1
limit=$2
shift 2
start=$(date +%s)
if command -v timeout >/dev/null 2>&1; then
    timeout -k 5 "$limit" "$@"
else
    "$@"
fi </dev/null >build/run/$name.out 2>&1
echo $? >build/run/$name.status
echo $(($(date +%s) - start)) >build/run/$name.seconds
END
[ ! -s $dir/plan ] ||
    JOBS=1 xargs -P "$jobs" -L 1 sh $dir/one.sh <$dir/plan
names=$(cut -d ' ' -f 1 $dir/plan)

# ---- add up ----------------------------------------------------------------

passed=0
failed=$(grep -c '^  FAILED' $log)
skipped=$(grep -c '^  skipped' $log)
for n in $names; do
    out=$dir/$n.out
    status=$(cat "$dir/$n.status" 2>/dev/null || echo 1)
    sum=$(grep -a -E \
        '^[^ ]+: [0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$out" |
        tail -n 1)
    f=0
    if [ "$sum" ]; then
        # shellcheck disable=SC2046
        set -- $(echo "${sum#*: }" | tr -cd '0-9 \n')
        passed=$((passed + $1)) f=$2 skipped=$((skipped + $3))
    fi
    why=
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        why="not done in time"
    elif [ ! "$sum" ]; then
        why="no result, status $status"
    elif [ "$status" != 0 ] && [ "$f" = 0 ]; then
        why="ended with status $status"
    fi
    [ "$why" ] && f=$((f + 1))
    failed=$((failed + f))
    if [ "$f" != 0 ]; then
        echo "---- $n"
        if [ "$(wc -l <"$out")" -gt 120 ]; then
            head -n 80 "$out"
            echo "  ... all of it: $out"
            tail -n 20 "$out"
        else
            cat "$out"
        fi
        [ "$why" ] && echo "  FAILED: $n: $why"
    else
        seconds=$(cat "$dir/$n.seconds" 2>/dev/null || echo 0)
        echo "$n: ${sum#*: }, $seconds s"
    fi
    grep -a '^  skipped: ' "$out" >>$log
done
if grep -q '^  skipped' $log; then
    echo "skipped:"
    sed -n 's/^  skipped: /  /p' $log | sort | uniq -c |
        sed 's/^ *\([0-9]*\) /  \1 x /'
fi
if [ "$SKIPS" = fail ]; then
    failed=$((failed + skipped))
    skipped=0
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
