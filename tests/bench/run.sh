#!/bin/sh
# make bench and make bench-full: runs the load server and all clients in
# turn, several times, and prints the table and the budgets (report.awk).
#
#     tests/bench/run.sh quick|full [case ...]
#
# With names of cases, only those. All lines that programs printed stay in
# build/tests/bench/raw.txt, the report in report.txt beside it. The status is
# 1 if the clients disagree about any text; a budget that is not met is only
# said.

cd "$(dirname "$0")/../.." || exit 1
mode=${1:-quick}
[ $# -gt 0 ] && shift
only=$*
dir=build/tests/bench
export CC="${CC:-cc}"
raw=$dir/raw.txt
fifo=$dir/server.stdin
mkdir -p $dir
: >$raw
unset http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY \
    ALL_PROXY NO_PROXY OPENAI_API_KEY OPENAI_BASE_URL OPENAI_ORG_ID MAKEFLAGS

# The reference on libcurl and cJSON is built where their headers are.
has_cjson=no
${MAKE:-make} -s $dir/ref_curl_cjson >$dir/cjson.log 2>&1 && has_cjson=yes
has_curl=no
printf '\043include <curl/curl.h>\n' | $CC -E - >/dev/null 2>&1 && has_curl=yes

# The server ends when its standard input does: when this script ends, too.
start_server() {
    rm -f $fifo $dir/port
    mkfifo $fifo || exit 1
    # shellcheck disable=SC2086
    $dir/server $1 <$fifo >$dir/port &
    exec 9>$fifo
    tries=0
    while ! grep -q '^port ' $dir/port 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -gt 100 ] && echo "the server does not start" && exit 1
        sleep 0.05
    done
    port=$(sed -n 's/^port //p' $dir/port)
}

stop_server() {
    exec 9>&-
    wait
}

# One client, one time; both of its lines become one of the raw file.
run_client() { # case, client, streams, tokens
    args="-p $port -n $3 -t $4"
    case $2 in
    recv | scan) set -- "$1" "$2" "$dir/ref_$2 $args" ;;
    curl_cjson)
        [ $has_cjson = yes ] || return 0
        set -- "$1" "$2" "$dir/ref_$2 $args"
        ;;
    curl)
        [ $has_curl = yes ] || return 0
        set -- "$1" "$2" "$dir/client $args -x curl -H inline"
        ;;
    sleeper) set -- "$1" "$2" "$dir/client $args -H sync -S 2" ;;
    own_*) set -- "$1" "$2" "$dir/client $args -u -k 2 -H ${2#own_}" ;;
    *) set -- "$1" "$2" "$dir/client $args -H $2" ;;
    esac
    $3 9>&- >$dir/out.txt
    status=$?
    printf 'CASE %s %s status=%s %s\n' "$1" "$2" $status \
        "$(tr '\n' ' ' <$dir/out.txt)" >>$raw
}

# A quick run repeats only while there is time for it: on a machine that is
# busy with other things a round takes several times as long.
begun=$(date +%s)
repeats_for=$([ "$mode" = full ] && echo 700 || echo 80)

# name, server's options, streams, tokens, rounds, clients
run_case() {
    name=$1 options=$2 streams=$3 tokens=$4 rounds=$5
    shift 5
    [ -n "$only" ] && case " $only " in *" $name "*) ;; *) return ;; esac
    printf 'SHAPE %s %s streams, %s tokens each, server %s\n' "$name" \
        "$streams" "$tokens" "$options" >>$raw
    echo "$name" >&2
    start_server "$options"
    while [ "$rounds" -gt 0 ]; do
        for client in "$@"; do
            run_client "$name" "$client" "$streams" "$tokens"
        done
        rounds=$((rounds - 1))
        [ $(($(date +%s) - begun)) -gt "$repeats_for" ] && break
    done
    stop_server
}

q() { # what a quick run has, what a full run has
    if [ "$mode" = full ]; then echo "$2"; else echo "$1"; fi
}

# ---- what needs no server ----------------------------------------------------

# Three times, far from each other: what is measured in nanoseconds depends on
# the speed that the machine has at the moment.
run_alone() {
    [ -n "$only" ] && return
    echo "micro, recorded" >&2
    $dir/micro >>$raw || echo "CASE micro micro status=1" >>$raw
    # So much stays in a cache, as what has just been received does.
    $dir/server -g 2000 >$dir/long.http
    rounds=$(q 3 5)
    printf 'SHAPE recorded 2000 tokens from memory, 200 rounds\n' >>$raw
    while [ "$rounds" -gt 0 ]; do
        for kind in none inline async sync; do
            printf 'CASE recorded %s status=0 %s\n' $kind "$($dir/client \
                -f $dir/long.http -r 200 -H $kind | tr '\n' ' ')" >>$raw
        done
        rounds=$((rounds - 1))
    done
}

run_cases() {
    # Correctness first: handlers that keep the text themselves.
    run_case check "-e 7" 50 500 1 scan own_inline own_async own_sync curl
    run_alone
    run_case burst-1 "-e 64" 1 300000 "$(q 3 7)" recv scan inline async sync
    run_case burst-100 "-e 64" 100 10000 "$(q 3 7)" recv scan inline async \
        sync none curl curl_cjson
    run_case setup "-e 64" 2000 1 "$(q 3 7)" recv inline sync curl curl_cjson
    run_case sleeper "-e 64" 100 1000 "$(q 5 9)" sync sleeper
    run_case idle-1 "-e 1 -r 50" 1 20 1 scan inline
    run_case lock-step "-e 64" 1 2000 "$(q 2 5)" sync lock
    run_case burst-1000 "-e 64" 1000 1000 "$(q 2 5)" recv scan inline sync
    run_case burst-10000 "-e 64" 10000 100 "$(q 2 3)" recv scan inline
    run_alone
    run_case uneven-100 "-e 64 -o" 100 10000 "$(q 2 5)" recv scan inline sync
    run_case one-100 "-e 1" 100 2000 "$(q 2 5)" recv scan inline async sync \
        curl curl_cjson
    # short rounds, and many: the machine's speed moves more than the budget
    # shellcheck disable=SC2046
    run_case paced-1000 "-e 1 -r 20" 1000 "$(q 20 50)" "$(q 7 15)" recv \
        inline sync $(q '' scan)
    run_case paced-curl "-e 1 -r 20" 1000 "$(q 20 50)" "$(q 3 7)" curl \
        curl_cjson
    # in turn, since each is compared with the other
    turns=$(q 2 3)
    while [ "$turns" -gt 0 ]; do
        run_case rate-100 "-e 1 -r 200" 100 "$(q 400 2000)" 1 recv inline
        # shellcheck disable=SC2046
        run_case rate-10000 "-e 1 -r 2" 10000 "$(q 8 30)" 1 recv inline \
            $(q '' 'scan sync curl_cjson')
        turns=$((turns - 1))
    done
    run_alone
}

run_size() {
    for what in all no_curl least; do
        {
            [ $what != all ] && echo '#define LLMCB_NO_CURL'
            [ $what = least ] && echo '#define LLMCB_NO_AGENT' &&
                echo '#define LLMCB_NO_KIT'
            echo '#define LLMCB_IMPLEMENTATION'
            echo '#include "llmcb.h"'
        } >$dir/size.c
        $CC -Os -I. -c -o $dir/size.o $dir/size.c 2>/dev/null &&
            size -A $dir/size.o | awk -v w=$what '
                $1 ~ /^\.(text|rodata|eh_frame)/ { all += $2 }
                $1 == ".text" { text = $2 }
                $1 ~ /^\.(data|bss|tdata|tbss)$/ { writable += $2 }
                END { print "SIZE", w, text, all, writable + 0 }' >>$raw
    done
}

now_us() {
    echo $(($(date +%s%N) / 1000))
}

run_include() {
    echo '#include <stdio.h>' >$dir/include_stdio.c
    echo '#include "llmcb.h"' >$dir/include_llmcb.c
    rounds=$(q 15 51)
    while [ "$rounds" -gt 0 ]; do
        for what in stdio llmcb; do
            t=$(now_us)
            $CC -I. -fsyntax-only $dir/include_$what.c
            echo "INCLUDE $what $(($(now_us) - t))" >>$raw
        done
        rounds=$((rounds - 1))
    done
}

run_cases
if [ -z "$only" ]; then
    echo "size, include, instructions" >&2
    run_size
    run_include
    tests/bench/callgrind.sh count >>$raw
fi
rm -f $fifo $dir/port $dir/out.txt
awk -f tests/bench/report.awk $raw >$dir/report.txt
status=$?
cat $dir/report.txt
exit $status
