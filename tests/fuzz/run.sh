#!/bin/sh
# The fuzz targets of this directory: replay runs each over its corpus and
# what was found with it, campaign looks for more with libFuzzer for that many
# seconds in all, afl with AFL++ for that many with each target.
#
#     tests/fuzz/run.sh [replay]
#     tests/fuzz/run.sh campaign SECONDS
#     tests/fuzz/run.sh afl SECONDS
#
# T=name: only targets with this in their name. SEED=number. The last line is
# "fuzz: N passed, N failed, N skipped". What a campaign finds is written to
# build/fuzz/finds and belongs, by a telling name, into tests/fuzz/finds.

cd "$(dirname "$0")/../.." || exit 1
mode=${1:-replay}
seconds=${2:-60}
here=tests/fuzz
dir=build/fuzz
cc=${CC:-cc}
flags="-std=c99 -Wall -Wextra ${CFLAGS:--O1 -g}"
passed=0 failed=0 skipped=0
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
unset OPENAI_API_KEY OPENAI_BASE_URL OPENAI_ORG_ID
mkdir -p $dir/finds $dir/corpus $dir/replay

targets=
for f in "$here"/*.c; do
    t=$(basename "$f" .c)
    [ "$t" = replay ] && continue
    case fuzz_$t in *"${T:-}"*) targets="$targets $t" ;; esac
done

skip() {
    skipped=$((skipped + 1))
    echo "  skipped: $1"
}
pass() {
    passed=$((passed + 1))
    echo "ok $1"
}
fail() { # name, file with what was said
    failed=$((failed + 1))
    echo "not ok $1"
    echo "  FAILED: $1"
    grep -a -E -A12 'broken:|error:|ERROR|undefined reference' "$2" |
        head -n 40 | sed 's/^/    /'
}
finish() {
    echo "fuzz: $passed passed, $failed failed, $skipped skipped"
    [ $failed = 0 ]
    exit
}
works() { # compiler and flags
    echo 'int main(void) { return 0; }' >$dir/probe.c
    "$@" -o $dir/probe $dir/probe.c >/dev/null 2>&1 && $dir/probe
}
# Whether a program is older than what it is made of.
stale() {
    [ ! -x "$1" ] ||
        [ "$(find llmcb.h "$here"/*.[ch] -newer "$1" 2>/dev/null)" ]
}

# ---- replay -----------------------------------------------------------------

prog=$dir/replay/all
replay() { # target
    name=fuzz_$1
    files=$(find $here/corpus/"$1" $here/finds/"$1" -type f 2>/dev/null | sort)
    # shellcheck disable=SC2086
    if $prog "$1" $files >$dir/out 2>&1; then
        pass "$name: $(tail -n 1 $dir/out)"
        return
    fi
    for f in $files; do
        $prog "$1" "$f" >$dir/out 2>&1 || fail "$name: $f" $dir/out
    done
}
if [ "$mode" = replay ]; then
    export SEED="${SEED:-1}"
    echo "seed $SEED"
    asan="-fsanitize=address,undefined -fno-sanitize-recover"
    # shellcheck disable=SC2086
    works $cc $asan || {
        asan=
        skip "fuzz: the sanitizers do not work with $cc"
    }
    if [ "$(cat $dir/replay/flags 2>/dev/null)" != "$cc $flags $asan" ]; then
        rm -f $dir/replay/*
        echo "$cc $flags $asan" >$dir/replay/flags
    fi
    # shellcheck disable=SC2086
    if stale $prog && rm -f $prog && ! $cc $flags $asan -o $prog \
        $here/replay.c ${LDFLAGS:-} -lpthread >$dir/replay/log 2>&1; then
        fail "replay: not built" $dir/replay/log
        finish
    fi
    grep 'warning:' $dir/replay/log
    for t in $targets; do replay "$t"; done
    finish
fi
if [ "$mode" != campaign ] && [ "$mode" != afl ]; then
    sed -n '6,8s/^# *//p' "$0" >&2
    exit 2
fi

# ---- campaigns --------------------------------------------------------------

seed=${SEED:-$(date +%s)}
unset SEED # a find must do the same in a replay
echo "seed $seed"
n=0
for t in $targets; do n=$((n + 1)); done
[ $n = 0 ] && finish
fuzzer="-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined"
clang=${CLANG:-clang} afl=afl-clang-fast each=$seconds
echo 'int LLVMFuzzerTestOneInput(const char *s, unsigned long n);
int LLVMFuzzerTestOneInput(const char *s, unsigned long n)
{ return !s && n; }' >$dir/probe.c
if [ "$mode" = campaign ]; then
    # shellcheck disable=SC2086
    if ! $clang $fuzzer -o $dir/probe $dir/probe.c >/dev/null 2>&1; then
        skip "libFuzzer: there is no clang, or it has no fuzzer runtime"
        finish
    fi
    each=$((seconds / n))
elif ! command -v $afl >/dev/null 2>&1 || ! command -v afl-fuzz >/dev/null ||
    ! $afl -fsanitize=fuzzer -o $dir/probe $dir/probe.c >/dev/null 2>&1; then
    skip "AFL++: afl-clang-fast or afl-fuzz is not installed"
    finish
fi
[ "$each" -gt 0 ] || each=1

libfuzzer() { # target
    name="fuzz_$1, libFuzzer"
    prog=$dir/libfuzzer_$1
    # shellcheck disable=SC2086
    if stale "$prog" && ! $clang $flags $fuzzer -DFUZZ_ENGINE -o "$prog" \
        "$here/$1.c" -lpthread >$dir/out 2>&1; then
        fail "$name: not built" $dir/out
        return
    fi
    mkdir -p $dir/corpus/"$1" $here/corpus/"$1"
    "$prog" -seed="$seed" -max_total_time="$each" -timeout=10 \
        -rss_limit_mb=3000 -artifact_prefix="$dir/finds/$1-" \
        ${dict:+-dict="$dict"} -print_final_stats=1 $dir/corpus/"$1" \
        "$here/corpus/$1" >$dir/out 2>&1 &&
        pass "$name: $(awk '/executed_units/ { n = $2 }
            /exec_per_sec/ { print n " inputs, " $2 " a second" }' $dir/out)" &&
        return
    grep -a 'Test unit written' $dir/out
    fail "$name" $dir/out
}
# It may neither change where the kernel writes cores nor the clock of the
# processor, and need not.
aflpp() { # target
    name="fuzz_$1, AFL++"
    prog=$dir/afl_$1
    # shellcheck disable=SC2086
    if stale "$prog" && ! AFL_USE_ASAN=1 AFL_USE_UBSAN=1 $afl $flags \
        -fsanitize=fuzzer -DFUZZ_ENGINE -o "$prog" "$here/$1.c" -lpthread \
        >$dir/out 2>&1; then
        fail "$name: not built" $dir/out
        return
    fi
    rm -rf $dir/afl/"$1" $dir/afl_in
    mkdir -p $dir/afl $dir/afl_in
    find $here/corpus/"$1" $here/finds/"$1" -type f -exec cp {} $dir/afl_in \; \
        2>/dev/null
    env -u ASAN_OPTIONS -u UBSAN_OPTIONS AFL_NO_UI=1 AFL_SKIP_CPUFREQ=1 \
        AFL_NO_AFFINITY=1 AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES=1 \
        afl-fuzz -s "$seed" -V "$each" -t 5000 -m none ${dict:+-x "$dict"} \
        -i $dir/afl_in -o $dir/afl/"$1" -- "$prog" >$dir/out 2>&1
    stats=$dir/afl/$1/default/fuzzer_stats
    inputs=$(sed -n 's/^execs_done *: *//p' "$stats" 2>/dev/null)
    found=$(find $dir/afl/"$1" -path '*crashes/id*' -o -path '*hangs/id*')
    if [ "${inputs:-0}" = 0 ]; then
        fail "$name: did not run" $dir/out
        grep -a -A4 'PROGRAM ABORT' $dir/out | sed 's/^/    /'
    elif grep -a -q 'results in a [ct]' $dir/out; then
        fail "$name: broken by its corpus, see a replay" $dir/out
    elif [ "$found" ]; then
        for f in $found; do
            kind=${f%/id*}
            copy=$dir/finds/$1-${kind##*/}-$(cksum <"$f" | tr -d ' ')
            cp "$f" "$copy"
            echo "    $copy"
        done
        fail "$name: $(echo "$found" | wc -l) crashes and hangs" $dir/out
    else
        pass "$name: $inputs inputs, $(sed -n \
            's/^execs_per_sec *: *//p' "$stats") a second"
    fi
}
for t in $targets; do
    dict=
    [ -f "$here/$t.dict" ] && dict=$here/$t.dict
    if [ "$mode" = afl ]; then aflpp "$t"; else libfuzzer "$t"; fi
done
finish
