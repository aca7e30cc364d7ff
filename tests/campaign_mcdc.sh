#!/bin/sh
# Which conditions of llmcb.h decide something in a test: modified condition /
# decision coverage with clang 18 or later. A decision is a && or || of several
# conditions; one of them is shown when two evaluations differ in it alone, as
# far as the others are looked at, and in what is decided. A condition that
# stands by itself is no decision, and is counted with the branches: true and
# false of each condition, as clang splits them.
#
#     tests/campaign_mcdc.sh [report]
#
# `report` works from what the last run left. In build/mcdc stand then
#
#     sections.txt   the table that is printed
#     missed.txt     conditions that are not shown: line, which of how many,
#                    function, text
#     branches.txt   conditions that are only ever true or only ever false
#
# Counts are added over all programs before anything is judged. CLANG=, T=name:
# as in the other scripts. A program that runs and passes is one pass.

cd "$(dirname "$0")/.." || exit 1
root=$(pwd)
dir=$root/build/mcdc
limit=${TEST_TIMEOUT:-300}
passed=0 failed=0 skipped=0
PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY \
    ALL_PROXY NO_PROXY OPENAI_API_KEY OPENAI_BASE_URL OPENAI_ORG_ID MAKEFLAGS

has() {
    command -v "$1" >/dev/null 2>&1
}
fail() {
    failed=$((failed + 1))
    echo "  FAILED: $*"
}
skip() {
    skipped=$((skipped + 1))
    echo "  skipped: $*"
}
finish() {
    echo "campaign_mcdc: $passed passed, $failed failed, $skipped skipped"
    [ "$failed" = 0 ]
    exit
}
bounded() { # seconds, command
    if has timeout; then
        timeout -k 5 "$@"
    else
        shift
        "$@"
    fi
}

# ---- which compiler --------------------------------------------------------

flags="-O0 -g -fprofile-instr-generate -fcoverage-mapping -fcoverage-mcdc"
flags="$flags -fprofile-update=atomic"
mkdir -p "$dir"
# It must compile, link and leave counts that its own tools read.
works() { # clang
    tail=${1#"${1%%-[0-9]*}"} # -19
    profdata=llvm-profdata$tail cov=llvm-cov$tail
    has "$1" && has "$profdata" && has "$cov" || return 1
    echo 'int main(int n, char **v) { return !v || n > 9; }' >"$dir/probe.c"
    # shellcheck disable=SC2086
    "$1" $flags -o "$dir/probe" "$dir/probe.c" 2>/dev/null &&
        LLVM_PROFILE_FILE=$dir/probe.profraw "$dir/probe" &&
        "$profdata" merge -o "$dir/probe.prof" "$dir/probe.profraw" \
            2>/dev/null &&
        "$cov" show "$dir/probe" -instr-profile="$dir/probe.prof" \
            -show-mcdc 2>/dev/null | grep -q 'MC/DC'
}
cc=
for c in ${CLANG:-clang clang-22 clang-21 clang-20 clang-19 clang-18}; do
    if works "$c"; then
        cc=$c
        break
    fi
done
if [ ! "$cc" ]; then
    skip "MC/DC: no clang of 18 or later with llvm-profdata, llvm-cov" \
        "and its runtime library"
    finish
fi
curl=-DLLMCB_NO_CURL=
if printf '#include <curl/curl.h>\n' | $cc -E - >/dev/null 2>&1; then
    curl=$(pkg-config --cflags --libs libcurl 2>/dev/null || echo -lcurl)
else
    skip "[CURL]: libcurl is not installed"
fi

# ---- build and run ---------------------------------------------------------

# From the standard input: a static function has the name of its source in the
# counts, and they are added only where the names agree.
if [ "$1" != report ]; then
    rm -rf "$dir"
    mkdir -p "$dir"
    for src in tests/test_*.c; do
        n=$(basename "$src" .c)
        case $n in *"$T"*) ;; *) continue ;; esac
        extra=$(sed -n 's|^/\* build: \(.*\) \*/$|\1|p' "$src")
        # shellcheck disable=SC2086
        if ! (cd tests && $cc $flags $extra -O0 $curl -I.. -x c - \
            -o "$dir/$n" -lpthread) <"$src" >"$dir/$n.log" 2>&1; then
            fail "$n: not built"
            grep -E 'error|undefined' "$dir/$n.log" | head -n 5
            continue
        fi
        begin=$(date +%s)
        # its children add theirs
        LLVM_PROFILE_FILE=$dir/$n-%m.profraw \
            bounded "$limit" "$dir/$n" </dev/null >"$dir/$n.out" 2>&1
        status=$?
        if [ $status = 124 ] || [ $status = 137 ]; then
            fail "$n: not done in $limit s"
        elif [ $status != 0 ]; then
            fail "$n: status $status"
            grep -a -B 3 '^  FAILED' "$dir/$n.out" | head -n 20 |
                sed 's/^/  /'
        else
            passed=$((passed + 1))
            echo "$(tail -n 1 "$dir/$n.out"), $(($(date +%s) - begin)) s"
        fi
    done
fi

# ---- add and judge ---------------------------------------------------------

set -- "$dir"/test_*.profraw
if ! [ -e "$1" ] || ! "$profdata" merge -o "$dir/all.prof" "$@"; then
    fail "there is nothing to add"
    finish
fi
for out in "$dir"/test_*.out; do
    o=${out%.out}
    "$cov" show "$o" -instr-profile="$dir/all.prof" -show-mcdc \
        -show-branches=count "$root/llmcb.h" >"$o.show" 2>"$o.show.log"
    [ -s "$o.show" ] || fail "$(basename "$o"): nothing is said of llmcb.h"
done
# What clang gives up: a condition with another decision inside it.
cat "$dir"/test_*.log | grep 'unsupported MC/DC' |
    sed -n 's/^[^ ]*llmcb\.h:\([0-9]*\):.*/\1/p' | sort -n -u \
    >"$dir/given_up.txt"

awk -v dir="$dir" '
BEGIN { sec = "HEAD" }
# The header itself: sections and functions.
FILENAME == "llmcb.h" {
    text[FNR] = $0
    if (match($0, /^\/\* ==== \[[A-Z]+\]/)) {
        sec = substr($0, 10, RLENGTH - 10)
        if (!(sec in seen)) { seen[sec] = 1; order[++n_order] = sec }
    }
    if (match($0, /llmcbi?_[a-z0-9_]+\(/) && $0 ~ /^[a-zA-Z]/ && !/;$/)
        fun = substr($0, RSTART, RLENGTH - 1)
    section[FNR] = sec
    of[FNR] = fun
    if ($0 ~ /^}/) fun = ""
    last = FNR
    next
}
function place(s) { # "... (12:34) ..."
    match(s, /\([0-9]+:[0-9]+\)/)
    return substr(s, RSTART + 1, RLENGTH - 2)
}
/\|  Branch \(/ {
    at = place($0)
    if (!(at in branch)) { branch[at] = 1; branches[++n_branches] = at }
    if ($0 !~ /True: 0[,\]]/) yes[at] = 1
    if ($0 !~ /False: 0[,\]]/) no[at] = 1
    if (/Folded/) yes[at] = no[at] = 1
    next
}
/\|---> MC\/DC Decision Region/ {
    at = $0
    sub(/.*Region /, "", at)
    if (!(at in decision)) { decision[at] = 1; decisions[++n_decisions] = at }
    next
}
/\|     Condition C[0-9]+ -->/ {
    match($0, /C[0-9]+/)
    k = substr($0, RSTART + 1, RLENGTH - 1) + 0
    where[at, k] = place($0)
    if (k > conditions[at] + 0) conditions[at] = k
    next
}
/\|  C[0-9]+-Pair:/ {
    match($0, /C[0-9]+/)
    k = substr($0, RSTART + 1, RLENGTH - 1) + 0
    if (/constant folded/) folded[at, k] = 1
    else if (!/not covered/) shown[at, k] = 1
    next
}
function line_of(s) { return substr(s, 1, index(s, ":") - 1) + 0 }
function percent(a, b) { return b ? sprintf("%5.1f", 100 * a / b) : "  -  " }
function told(line, what, out,   t) {
    t = text[line]
    sub(/^ +/, "", t)
    printf "%d [%s] %s: %s: %s\n", line, section[line], of[line], what, t \
        | ("sort -n >" out)
}
END {
    for (i = 1; i <= n_branches; i++) {
        at = branches[i]
        s = section[line_of(at)]
        nb[s] += 2
        hb[s] += (at in yes) + (at in no)
        if (!(at in yes) || !(at in no))
            told(line_of(at), "column " substr(at, index(at, ":") + 1) \
                (at in yes ? " always true" : at in no ? " always false" : \
                " not reached"), dir "/branches.txt")
    }
    for (i = 1; i <= n_decisions; i++) {
        at = decisions[i]
        line = line_of(place(at))
        s = section[line]
        n = m = 0
        for (k = 1; k <= conditions[at]; k++) {
            if ((at, k) in folded && !((at, k) in shown)) continue
            n++
            if ((at, k) in shown) m++
            else told(line_of(where[at, k]), "condition " k " of " \
                conditions[at] " at column " substr(where[at, k], \
                index(where[at, k], ":") + 1), dir "/missed.txt")
        }
        if (!n) continue
        nd[s]++; hd[s] += n == m
        nc[s] += n; hc[s] += m
    }
    out = dir "/sections.txt"
    printf "%-9s %21s %21s %21s\n", "section", "branches taken", \
        "decisions all shown", "conditions shown" > out
    for (k = 1; k <= n_order; k++) {
        s = order[k]
        if (!nb[s]) continue
        printf "%-9s %5d of %5d %s%% %5d of %5d %s%% %5d of %5d %s%%\n", \
            "[" s "]", hb[s], nb[s], percent(hb[s], nb[s]), hd[s], nd[s], \
            percent(hd[s], nd[s]), hc[s], nc[s], percent(hc[s], nc[s]) > out
        a += hb[s]; b += nb[s]; c += hd[s]; d += nd[s]; e += hc[s]; f += nc[s]
    }
    printf "%-9s %5d of %5d %s%% %5d of %5d %s%% %5d of %5d %s%%\n", "all", \
        a, b, percent(a, b), c, d, percent(c, d), e, f, percent(e, f) > out
}' llmcb.h "$dir"/test_*.show

cat "$dir/sections.txt"
echo "$(wc -l <"$dir/given_up.txt") decisions have others inside them, which" \
    "$cc does not judge (build/mcdc/given_up.txt)"
finish
