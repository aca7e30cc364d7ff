#!/bin/sh
# What llmcb.h needs of a stack: no variable-length array and no alloca, no
# function of more than 1 KiB, no recursion but what is listed below. It
# compiles the implementation and reads what gcc says of it.
#
#     tests/check_stack.sh [all | list]
#
# `all` looks at more builds, `list` prints the ten largest functions of each,
# too. Calls through pointers are not seen: a handler that calls back is the
# program's.

cd "$(dirname "$0")/.." || exit 1
dir=build/check_stack
limit=${STACK_LIMIT:-1024}
cc=${GCC:-gcc}
rm -rf $dir
mkdir -p $dir

# Functions that may be larger: name bytes.
#   llmcbi_poller_wait: the events of one turn, epoll_wait's own format; it
#   calls nothing else.
cat >$dir/large <<'END'
llmcbi_poller_wait 1700
END
# Cycles of calls that end by themselves, with all their functions.
#   A task that is woken frees the operation that it owns, which may be
#   under way. Nothing but that task ever waits for it, and it has left
#   before: once round, no more.
cat >$dir/cycles <<'END'
llmcb_op_free llmcbi_task_disarm llmcbi_task_told llmcbi_task_wake
END

if ! command -v "$cc" >/dev/null 2>&1 ||
    ! echo 'int x;' | $cc -fcallgraph-info=su -c -x c -o $dir/x.o - \
        2>/dev/null; then
    echo "  skipped: stack: $cc has no -fcallgraph-info"
    echo "check_stack: 0 passed, 0 failed, 1 skipped"
    exit 0
fi
passed=0 failed=0
curl=
printf '#include <curl/curl.h>\n' | $cc -E - >/dev/null 2>&1 ||
    curl=-DLLMCB_NO_CURL
printf '#define LLMCB_IMPLEMENTATION\n#include "llmcb.h"\n' >$dir/impl.c

result() { # name, file with what is wrong
    if [ -s "$2" ]; then
        failed=$((failed + 1))
        echo "  FAILED: $1"
        sed 's/^/    /' "$2"
    else
        passed=$((passed + 1))
    fi
}

# Without optimising, calls and functions are those of the text.
n=0
for flags in "-O0" "-Os" ${1:+"-O2" "-Os -DLLMCB_NO_EPOLL"}; do
    n=$((n + 1))
    # The warnings of old and new names for one thing.
    # shellcheck disable=SC2086
    if ! $cc -std=c99 $flags $curl -Wvla -Walloca -Werror -I. \
        -fcallgraph-info=su -fstack-usage -c -o $dir/$n.o $dir/impl.c \
        >$dir/$n.log 2>&1; then
        grep -E 'error' $dir/$n.log | head -n 8 >$dir/$n.bad
        result "$flags: compiles without arrays of variable length" $dir/$n.bad
        continue
    fi
    # "dynamic,bounded" are arguments of calls, a few words.
    awk -F '\t' '$3 == "dynamic" {
        print $1 ": its stack grows with what it is given"
    }' $dir/$n.su >$dir/$n.bad
    result "$flags: bounded" $dir/$n.bad
    awk -F '\t' -v limit="$limit" '
        FILENAME ~ /large$/ { split($0, w, " "); may[w[1]] = w[2]; next }
        {
            k = split($1, at, ":")
            name = at[k]
            sub(/\..*/, "", name) # .part.0 and the like
            most = name in may ? may[name] : limit
            if ($2 > most)
                printf "%s:%s: %d bytes, not %d\n", name, at[2], $2, most
        }' $dir/large $dir/$n.su >$dir/$n.bad
    result "$flags: at most $limit bytes a function" $dir/$n.bad
    if [ "$1" = list ]; then
        echo "$flags:"
        tr '\t' ' ' <$dir/$n.su | sed 's/.*:\([^:]*\)$/\1/' |
            sort -k 2 -n -r | head -n 10 | sed 's/^/    /'
    fi
done

# A function is in a cycle when it can be reached from itself: those that
# call nothing that is left, or that nothing left calls, are taken away until
# all are in one or between two.
awk '
/^edge:/ {
    a = $4; b = $6
    gsub(/"/, "", a); gsub(/"/, "", b)
    sub(/.*:/, "", a); sub(/.*:/, "", b)
    if (b == "__indirect_call" || (a, b) in edge) next
    edge[a, b] = 1
    from[++n] = a
    to[n] = b
}
END {
    do {
        changed = 0
        split("", out)
        split("", in_)
        for (i = 1; i <= n; i++)
            if (from[i] != "") { out[from[i]]++; in_[to[i]]++ }
        for (i = 1; i <= n; i++)
            if (from[i] != "" && (!(to[i] in out) || !(from[i] in in_))) {
                from[i] = ""
                changed = 1
            }
    } while (changed)
    # What is left: which reach each other?
    for (i = 1; i <= n; i++)
        if (from[i] != "") { reach[from[i], to[i]] = 1; node[from[i]]; node[to[i]] }
    for (k in node) for (i in node) if ((i, k) in reach)
        for (j in node) if ((k, j) in reach) reach[i, j] = 1
    for (i in node) {
        if (!((i, i) in reach)) continue
        for (j in node)
            if ((i, j) in reach && (j, i) in reach) print i, j
    }
}' $dir/1.ci 2>/dev/null | sort | awk '
    $1 != name { if (name) print line; name = $1; line = $2; next }
    { line = line " " $2 }
    END { if (name) print line }' | sort -u >$dir/found
grep -v -x -F -f $dir/cycles $dir/found | sed 's/^/a cycle: /' >$dir/bad
result "no recursion" $dir/bad
grep -v -x -F -f $dir/found $dir/cycles |
    sed 's/^/listed here and no more: /' >$dir/bad
result "the list of cycles" $dir/bad
echo "check_stack: $passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
