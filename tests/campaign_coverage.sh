#!/bin/sh
# Which lines and branches of llmcb.h the test programs run: one build with
# gcov and without optimising, merged over all programs. It says how much of
# each section is run, and which lines are not.
#
#     tests/campaign_coverage.sh [report]
#
# `report` works from what the last run left. In build/coverage stand then
#
#     sections.txt   the table that is printed
#     lines.txt      the lines that no program runs, by section
#     branches.txt   the branches that no program takes: line, function,
#                    which of how many, the text
#     index.html     the text of the header with all of it
#
# A branch is one way out of a condition as gcc splits it: `a && b` has four,
# a switch one a label. T=name: only programs with this in their name.
# A program that runs and passes is one pass. What is not taken must have a
# reason in coverage.known; one failure if there is any without.

cd "$(dirname "$0")/.." || exit 1
root=$(pwd)
dir=$root/build/coverage
limit=${TEST_TIMEOUT:-300}
# gcov must be that of the compiler.
cc=${GCC:-gcc}
gcov=${GCOV:-gcov}
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
    echo "campaign_coverage: $passed passed, $failed failed, $skipped skipped"
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
for c in "$cc" "$gcov"; do
    if ! has "$c"; then
        skip "coverage: $c is not installed"
        finish
    fi
done

# ---- build and run ---------------------------------------------------------

curl=-DLLMCB_NO_CURL=
if printf '#include <curl/curl.h>\n' | $cc -E - >/dev/null 2>&1; then
    curl=$(pkg-config --cflags --libs libcurl 2>/dev/null || echo -lcurl)
else
    skip "[CURL]: libcurl is not installed"
fi
if [ "$1" != report ]; then
    rm -rf "$dir"
    mkdir -p "$dir"
    for src in tests/test_*.c; do
        n=$(basename "$src" .c)
        case $n in *"$T"*) ;; *) continue ;; esac
        extra=$(sed -n 's|^/\* build: \(.*\) \*/$|\1|p' "$src")
        o=$dir/$n
        mkdir -p "$o"
        # Counters of threads must not lose counts; a line has the same
        # branches whether or not a test counts what is looked for in it;
        # children of a test tell theirs.
        # shellcheck disable=SC2086
        if ! { $cc -g --coverage -fprofile-update=atomic $extra -O0 \
            -fno-builtin-memchr $curl -I. -c -o "$o/$n.o" "$src" &&
            $cc --coverage -Wl,-u,__gcov_dump -o "$o/$n" "$o/$n.o" \
                -lpthread $extra $curl; } >"$o/log" 2>&1; then
            fail "$n: not built"
            grep -E 'error|undefined' "$o/log" | head -n 5
            continue
        fi
        begin=$(date +%s)
        bounded "$limit" "$o/$n" </dev/null >"$o/out" 2>&1
        status=$?
        if [ $status = 124 ] || [ $status = 137 ]; then
            fail "$n: not done in $limit s"
        elif [ $status != 0 ]; then
            fail "$n: status $status"
            grep -a -B 3 '^  FAILED' "$o/out" | head -n 20 | sed 's/^/  /'
        else
            passed=$((passed + 1))
            echo "$(tail -n 1 "$o/out"), $(($(date +%s) - begin)) s"
        fi
    done
fi

# ---- merge -----------------------------------------------------------------

for o in "$dir"/test_*; do
    n=$(basename "$o")
    if [ ! -e "$o/$n.gcda" ]; then
        [ -d "$o" ] && [ -e "$o/$n.gcno" ] && fail "$n: left no counts"
        continue
    fi
    # From where the compiler stood, or it does not find the sources.
    $gcov -b -c -t -o "$o" "$n.o" 2>"$o/gcov.log" | awk '
        /^ *-: *0:Source:/ { on = /[:\/]llmcb\.h$/ }
        on' >"$o/llmcb.h.gcov"
    [ -s "$o/llmcb.h.gcov" ] || fail "$n: gcov says nothing of llmcb.h"
done
set -- "$dir"/test_*/llmcb.h.gcov
[ -e "$1" ] || {
    fail "there is nothing to merge"
    finish
}

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
    if ($0 ~ /^}/) { section[FNR] = sec; of[FNR] = fun; fun = ""; next }
    section[FNR] = sec
    of[FNR] = fun
    last = FNR
    next
}
# gcov: "count:line:text", and "branch I taken N" after the line.
/^ *[^:]+: *[0-9]+:/ {
    i = index($0, ":")
    count = substr($0, 1, i - 1)
    gsub(/[ *]/, "", count)
    rest = substr($0, i + 1)
    line = substr(rest, 1, index(rest, ":") - 1) + 0
    if (count == "-" || !line) next
    lines[line] = 1
    ran = count ~ /^[0-9]/
    if (ran) run[line] = 1
    next
}
/^branch +[0-9]+/ {
    key = line SUBSEP $2 # calls have numbers of the same row
    # A test that counts what is looked for has other branches in lines that
    # it does not run.
    if (ran)
        is[key] = 1
    else
        idle[key] = 1
    if ($2 + 1 > ways[line] + 0) ways[line] = $2 + 1
    if ($3 == "taken" && $4 + 0 > 0) taken[key] = 1
}
function percent(a, b) { return b ? sprintf("%5.1f", 100 * a / b) : "  -  " }
END {
    for (i = 1; i <= last; i++) {
        s = section[i]
        if (i in lines) { n[s]++; if (i in run) hit[s]++ }
        of_all = at = 0
        for (b = 0; b < ways[i] && !(i in run); b++)
            if ((i, b) in idle) is[i, b] = 1
        for (b = 0; b < ways[i]; b++) of_all += (i, b) in is
        for (b = 0; b < ways[i]; b++) {
            if (!((i, b) in is)) continue
            at++
            nb[s]++
            if ((i, b) in taken) hb[s]++
            else {
                missed[i] = missed[i] " " at
                t = text[i]
                sub(/^ +/, "", t)
                where = (i in run) ? "" : " (line not run)"
                printf "%d [%s] %s: %d of %d%s: %s\n", i, s, of[i], at, \
                    of_all, where, t > (dir "/branches.txt")
            }
        }
    }
    out = dir "/sections.txt"
    printf "%-9s %15s %21s\n", "section", "lines run", "branches taken" > out
    for (k = 1; k <= n_order; k++) {
        s = order[k]
        if (!n[s]) continue
        printf "%-9s %5d of %5d %s%% %5d of %5d %s%%\n", "[" s "]", hit[s], \
            n[s], percent(hit[s] + 0, n[s] + 0), hb[s], nb[s], \
            percent(hb[s] + 0, nb[s] + 0) > out
        a += hit[s]; b1 += n[s]; c += hb[s]; d += nb[s]
    }
    printf "%-9s %5d of %5d %s%% %5d of %5d %s%%\n", "all", a, b1, \
        percent(a, b1), c, d, percent(c, d) > out
    out = dir "/index.html"
    print "<!doctype html><meta charset=utf-8><title>llmcb.h</title><style>" \
        "body{font:13px monospace;white-space:pre}a{color:inherit}" \
        ".n{background:#fbb}.p{background:#fe9}.r{background:#dfd}" \
        "</style>" > out
    printf "%d of %d lines, %d of %d branches. " \
        "<span class=n>not run</span> <span class=p>some branches not " \
        "taken</span>\n", a, b1, c, d > out
    for (k = 1; k <= n_order; k++) {
        s = order[k]
        if (n[s]) printf "<a href=#%s>[%s]</a> %d of %d lines, %d of %d " \
            "branches\n", s, s, hit[s], n[s], hb[s], nb[s] > out
    }
    for (i = 1; i <= last; i++) {
        t = text[i]
        gsub(/&/, "\\&amp;", t)
        gsub(/</, "\\&lt;", t)
        style = note = ""
        if (i in lines) style = !(i in run) ? "n" : missed[i] ? "p" : "r"
        if (style == "p") note = "  // not taken: " missed[i]
        name = text[i] ~ /^\/\* ==== \[/ && n[section[i]] ? \
            "<a id=" section[i] "></a>" : ""
        printf "%s%6d <span class=%s>%s</span>%s\n", name, i, \
            style ? style : "-", t, note > out
    }
    out = dir "/lines.txt"
    printf "" > out
    for (k = 1; k <= n_order; k++) {
        s = order[k]
        if (n[s] == hit[s]) continue
        printf "[%s]\n", s > out
        for (i = 1; i <= last; i++) {
            if (section[i] != s || !(i in lines) || (i in run)) continue
            t = text[i]
            sub(/^ +/, "", t)
            printf "  %d %s: %s\n", i, of[i], t > out
        }
    }
}' llmcb.h "$@"

echo "lines that no program runs:"
cat "$dir/lines.txt"
cat "$dir/sections.txt"

# ---- what is not taken, by its reason --------------------------------------

known=tests/coverage.known
if [ ! -e "$known" ]; then
    skip "reasons: there is no $known"
    finish
elif [ -n "$T" ] || [ "$curl" = -DLLMCB_NO_CURL= ]; then
    skip "reasons: they are those of all programs, with libcurl"
    finish
fi
awk -F '\t' '
NR == FNR {
    if (/^#/ || $3 !~ /^(memory|caller|system|race|chance|open)$/ || !$4) next
    fun[++n] = $1
    text[n] = $2
    class[n] = $3
    next
}
{
    match($0, /[a-z0-9_]*: [0-9]+ of [0-9]+/)
    name = substr($0, RSTART, RLENGTH)
    sub(/:.*/, "", name)
    line = substr($0, RSTART + RLENGTH)
    for (k = 1; k <= n; k++)
        if (!used[k] && fun[k] == name && index(line, text[k])) break
    if (k <= n) {
        used[k] = 1
        count[class[k]]++
    } else {
        print "  unnamed: " $0
        unnamed++
    }
}
END {
    for (k = 1; k <= n; k++)
        if (!used[k] && class[k] != "chance")
            print "  stale: " fun[k] ": " text[k]
    printf "not taken: %d", FNR
    k = split("caller memory system race chance open", order, " ")
    for (i = 1; i <= k; i++)
        if (count[order[i]]) printf ", %s %d", order[i], count[order[i]]
    printf ", unnamed %d\n", unnamed
    exit unnamed > 0
}' "$known" "$dir/branches.txt" ||
    fail "branches that are not taken have no reason in $known"
finish
