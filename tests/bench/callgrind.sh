#!/bin/sh
# Instructions, which do not depend on what else the machine does.
#
#     tests/bench/callgrind.sh count      prints "INSTR name number" lines
#     tests/bench/callgrind.sh record     writes them to instructions.txt
#     tests/bench/callgrind.sh compare    fails if one is 5 % above those
#
# Two runs that differ only in how often they repeat: the difference is what
# one repetition costs, without start and end of the program. The numbers are
# of one compiler and C library; they are named in the file, and others are
# compared all the same, with a word of warning.

cd "$(dirname "$0")/../.." || exit 1
dir=build/tests/bench
file=tests/bench/instructions.txt
mkdir -p $dir
command -v valgrind >/dev/null 2>&1 || {
    [ "$1" = count ] && exit 0
    echo "bench-instructions: valgrind is not installed"
    exit 1
}

collected() { # the client's arguments
    valgrind --tool=callgrind --callgrind-out-file=/dev/null \
        $dir/client "$@" 2>&1 >/dev/null | sed -n 's/.*Collected : //p'
}

# name, divisor, file, few rounds, many rounds, the rest of the arguments
per() {
    name=$1 by=$2 in=$3 few=$4 many=$5
    shift 5
    a=$(collected -f "$in" -r "$few" "$@")
    b=$(collected -f "$in" -r "$many" "$@")
    echo "INSTR $name $(((b - a) / (many - few) / by))"
}

count() {
    $dir/server -g 4000 >$dir/callgrind.http
    $dir/server -g 4000 -o >$dir/callgrind-uneven.http
    $dir/server -g 4000 -m 1 >$dir/callgrind-reasoning.http
    $dir/server -g 4000 -m 2 >$dir/callgrind-tool.http
    # the same without chunks: many events in one piece
    awk '{ sub(/\r$/, "") }
        body { if (/^data:/) printf "%s\n\n", $0; next }
        !/^(Transfer-Encoding|Connection):/ { printf "%s\r\n", $0 }
        $0 == "" { body = 1 }' $dir/callgrind.http >$dir/callgrind-plain.http
    per token_none 4000 $dir/callgrind.http 1 6 -H none
    per token_inline 4000 $dir/callgrind.http 1 6 -H inline
    per token_async 4000 $dir/callgrind.http 1 6 -H async
    per token_inline_10 4000 $dir/callgrind.http 1 6 -H inline -k 10
    per token_plain_inline 4000 $dir/callgrind-plain.http 1 6 -H inline
    per token_uneven_inline 4000 $dir/callgrind-uneven.http 1 6 -H inline
    per token_reasoning_inline 4000 $dir/callgrind-reasoning.http 1 6 -H inline
    per token_tool_inline 4000 $dir/callgrind-tool.http 1 6 -H inline
    per run_joke_inline 1 tests/fixtures/joke.http 10 60 -H inline
}

case $1 in
count) count ;;
record)
    {
        echo "# $(${CC:-cc} --version | sed 1q)"
        echo "# $(ldd --version 2>&1 | sed 1q)"
        count
    } >$file.new && mv $file.new $file && cat $file
    ;;
compare)
    grep -qxF "# $(${CC:-cc} --version | sed 1q)" $file ||
        echo "(recorded with another compiler)"
    count >$dir/instructions.txt
    awk '
        FNR == NR { if ($1 == "INSTR") old[$2] = $3; next }
        $1 == "INSTR" {
            bad = old[$2] && $3 > old[$2] * 1.05
            printf "%-24s %8d  recorded %8d  %s\n", $2, $3, old[$2],
                bad ? "WORSE" : "ok"
            if (bad) failed = 1
        }
        END { exit failed }' $file $dir/instructions.txt
    ;;
*)
    echo "usage: $0 count|record|compare"
    exit 2
    ;;
esac
