#!/bin/sh
# Builds and runs the examples, offline, and compiles the code of README.md.
#
#     tests/test_examples.sh

cd "$(dirname "$0")/.." || exit 1
unset OPENAI_API_KEY OPENAI_BASE_URL OPENAI_ORG_ID http_proxy https_proxy \
    all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
CC=${CC:-cc}
dir=build/examples
out=build/examples/out
joke=examples/recordings/joke.http
fixtures=tests/fixtures
passed=0 failed=0 skipped=0
mkdir -p $out

pass() {
    passed=$((passed + 1))
}
fail() { # name, why
    failed=$((failed + 1))
    echo "  FAILED: $1${2:+: $2}"
}
skip() { # name, why
    skipped=$((skipped + 1))
    echo "  skipped: $1: $2"
}
has() {
    command -v "$1" >/dev/null 2>&1
}
bounded() { # command; at most 20 s
    if has timeout; then timeout -k 5 20 "$@"; else "$@"; fi
}
# Runs a program; its output is then in $out/NAME and $out/NAME.err.
run() { # name, expected status, command
    name=$1 want=$2
    shift 2
    bounded "$@" >"$out/$name" 2>"$out/$name.err"
    got=$?
    if [ $got != "$want" ]; then
        fail "$name" "status $got, not $want"
        sed 's/^/    /' "$out/$name.err" | head -n 20
        return 1
    fi
    pass
}
# Compares what was printed with standard input.
expect() { # name
    cat >"$out/$1.want"
    if cmp -s "$out/$1.want" "$out/$1"; then
        pass
    else
        fail "$1" "other output"
        diff "$out/$1.want" "$out/$1" | head -n 20
    fi
}
# Counts the lines of a file that match.
count() { # name, number, basic regular expression
    n=$(grep -c -e "$3" "$out/$1")
    if [ "$n" = "$2" ]; then
        pass
    else
        fail "$1" "$n lines with $3, not $2"
    fi
}

# ---- how they are written, and building ------------------------------------

curl=$(pkg-config --cflags --libs libcurl 2>/dev/null || echo -lcurl)
printf '#include <curl/curl.h>\nint main(void) { return !curl_version(); }\n' \
    >$out/curl.c
# shellcheck disable=SC2086
$CC -o $out/curl $out/curl.c $curl >/dev/null 2>&1 || curl=-DLLMCB_NO_CURL
rm -f $out/curl

warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow"
cxx=
for c in g++ clang++; do
    if echo 'struct a { int x; } b = { .x = 1 };' |
        $c -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1; then
        cxx=$c
        break
    fi
done

for file in examples/*.c; do
    name=$(basename "$file" .c)
    limit=120
    case $name in
    trace) limit=340 ;;
    chain) limit=200 ;;
    embed_*) limit=170 ;;
    esac
    lines=$(($(wc -l <"$file")))
    if [ $lines -lt $limit ]; then pass; else fail "$name" "$lines lines"; fi

    if grep '^#' "$file" | head -n 2 | tr '\n' ' ' |
        grep -q '^#define LLMCB_IMPLEMENTATION #include "llmcb.h" $'; then
        pass
    else
        fail "$name" "does not include llmcb.h first"
    fi

    rm -f "$dir/$name"
    lib=
    case $name in
    embed_uv) lib=libuv ;;
    embed_glib) lib=glib-2.0 ;;
    esac
    if [ "$lib" ] && ! pkg-config --exists $lib 2>/dev/null; then
        skip "$name" "$lib is not installed"
        continue
    fi
    flags=
    [ "$lib" ] && flags=$(pkg-config --cflags $lib | sed 's/-I/-isystem/g')
    if ! ${MAKE:-make} -s "$dir/$name" "CC=$CC" "CFLAGS=-g $warnings" \
        >"$out/$name.log" 2>&1; then
        fail "$name" "does not compile"
        head -n 20 "$out/$name.log"
    elif grep -q 'warning: .*\[-W' "$out/$name.log"; then # gcc's and clang's
        fail "$name" "warnings"
        head -n 20 "$out/$name.log"
    else
        pass
    fi

    # This one has compound literals, which C++ has not.
    if [ "$name" != async_callbacks ]; then
        if [ ! "$cxx" ]; then
            skip "$name as C++" "no compiler for C++20"
        # shellcheck disable=SC2086
        elif $cxx -std=c++20 -x c++ -DLLMCB_NO_CURL -Wall -I. -fsyntax-only \
            $flags "$file" >"$out/$name.log" 2>&1; then
            pass
        else
            fail "$name" "does not compile as C++"
            head -n 20 "$out/$name.log"
        fi
    fi
done

# ---- the code of README.md ---------------------------------------------------

awk -v out="$out" '
    /^```c$/ { n++; file = out "/readme" n ".c"; code = ""; on = 1; next }
    /^```$/ && on {
        if (code !~ /LLMCB_IMPLEMENTATION/)
            printf "#include \"llmcb.h\"\n#include <poll.h>\n" > file
        printf "%s", code > file
        close(file)
        on = 0
    }
    on { code = code $0 "\n" }' README.md
for file in "$out"/readme*.c; do
    if $CC -std=c99 -Wall -Wextra -DLLMCB_NO_CURL -D_POSIX_C_SOURCE=200809L \
        -I. -c -o "$out/readme.o" "$file" >"$out/readme.log" 2>&1 &&
        [ ! -s "$out/readme.log" ]; then
        pass
    else
        fail "README.md" "code does not compile"
        head -n 20 "$out/readme.log"
    fi
done

# ---- the programs --------------------------------------------------------------

# shellcheck disable=SC2016
handler='Sync handler being called in a `thread_pool_executor`: token: '
tokens="|Why| don|'t| scientists| trust| atoms|?| ~~|Because| they| make| up"
tokens="$tokens| everything|.|||" # the last two: finish and usage

run async_callbacks 0 $dir/async_callbacks && {
    echo 'zzzz....'
    echo 'Hi! I just woke up. Your llm is starting'
    printf %s "$tokens" | tr '|' '\n' | sed "s/^/$handler/" | tr '~' '\n'
    echo 'zzzz....'
    echo 'Hi! I just woke up. Your llm is ending'
    echo "text: Why don't scientists trust atoms? "
    echo
    echo 'Because they make up everything.'
    echo 'finish reason: stop'
    echo 'model name: gpt-4o-mini-2024-07-18'
    echo 'usage: 11 input, 14 output, 25 total tokens'
} | expect async_callbacks

run pull 0 $dir/pull --replay $joke "Tell me a joke" && expect pull <<'END'
Why don't scientists trust atoms? 

Because they make up everything.
END
run pull_reset 1 $dir/pull --replay $fixtures/mid-stream-reset.http hi &&
    expect pull_reset <<'END'
Reset
END
count pull_reset.err 1 .
run pull_usage 2 $dir/pull

echo atoms >$out/in
run coroutine 0 sh -c "$dir/coroutine --replay $joke <$out/in" &&
    expect coroutine <<'END'
A topic, please: 
The joke: Why don't scientists trust atoms? 

Because they make up everything.

The fact: Why don't scientists trust atoms? 

Because they make up everything.
END

if run many 0 $dir/many --replay $joke --jobs 2 one two three; then
    count many 3 ' 11 *14  *stop  *Why don.t scientists trust atoms'
fi
run many_error 1 $dir/many --replay $fixtures/error-401.http one two &&
    count many_error 2 LLMCB_EHTTP

printf 'one\ntwo\nthree\n' >$out/in
run embed_poll 0 sh -c "$dir/embed_poll --replay $joke <$out/in" &&
    count embed_poll 3 '^.*Why don.t scientists trust atoms'

for f in embed_uv embed_glib; do
    [ -x $dir/$f ] || continue
    run $f 0 $dir/$f --replay $joke &&
        count $f 1 '^Why don.t scientists trust atoms'
    run ${f}_error 1 $dir/$f --replay $fixtures/error-401.http
done

printf 'hello\n\nagain\n' >$out/in
run chat 0 sh -c "$dir/chat --replay $joke <$out/in" && expect chat <<'END'
Why don't scientists trust atoms? 

Because they make up everything.
Why don't scientists trust atoms? 

Because they make up everything.
END

# Ctrl-C: an answer that hangs after its second token, then one that does not.
if [ -x $dir/chat ]; then
    cp $fixtures/slow.http $out/hang.http
    sed 's/\[1417,30\]/[1417,60000]/' $fixtures/slow.segments.json \
        >$out/hang.segments.json
    cp $joke $out/hang-2.http
    rm -f $out/fifo $out/interrupted
    mkfifo $out/fifo
    $dir/chat --replay $out/hang.http <$out/fifo >$out/interrupted \
        2>$out/interrupted.err &
    pid=$!
    exec 3>$out/fifo
    wait_for() { # text in the output; at most 10 s
        tries=0
        until grep -qs "$1" $out/interrupted || [ $tries = 100 ]; do
            sleep 0.1
            tries=$((tries + 1))
        done
    }
    echo hello >&3
    wait_for 'One two'
    kill -INT $pid
    echo again >&3
    wait_for everything
    exec 3>&-
    [ $tries = 100 ] && kill $pid 2>/dev/null
    wait $pid
    got=$?
    if [ $got = 0 ]; then pass; else fail interrupted "status $got"; fi
    count interrupted.err 1 .
    expect interrupted <<'END'
One two
Why don't scientists trust atoms? 

Because they make up everything.
END
fi

# ---- agents, chains, handlers: offline, in virtual time, always the same ------

# But two of the tools run on the pool at once: either may end first.
run agent 0 $dir/agent && {
    sed -n 1,3p "$out/agent"
    sed -n 4,5p "$out/agent" | LC_ALL=C sort -r
    sed '1,5d' "$out/agent"
} >"$out/agent_sorted" && expect agent_sorted <<'END'
-> get_weather {"city": "Paris"}
-> add {"a": 17.5, "b": 24.5}
-> wait {"seconds": 2}
<- get_weather: 21 °C and sunny in Paris
<- add: 42
<- wait: done
It is 21 °C and sunny in Paris, 17.5 + 24.5 is 42, and I have waited two seconds.
END
run trace_tree 0 $dir/trace_tree && expect trace_tree <<'END'
AgentExecutor  3.4 s
|-- RunnableSequence  530 ms
|   `-- ChatOpenAI  530 ms, 112 + 61 tokens
|-- get_weather  0 ms
|-- add  0 ms
|-- wait  2.0 s
`-- RunnableSequence  905 ms
    `-- ChatOpenAI  905 ms, 190 + 25 tokens
388 tokens in all; the last answer began after 255 ms and came with 40 tokens a second
END
rm -f $out/tree.jsonl
run trace_tree_file 0 $dir/trace_tree $out/tree.jsonl && {
    cp $out/tree.jsonl $out/tree_file
    count tree_file 61 '^{"event":"on_[a-z_]*","time_ms":[0-9]*,"run_id":"[-0-9a-f]\{36\}",.*}$'
    count tree_file 3 '^{"event":"on_agent_action".*"tool":"'
    count tree_file 4 '"event":"on_chain_start"\|"event":"on_agent_finish"'
    count tree_file 3 '^{"event":"on_tool_end".*"output":"'
    if has python3; then
        if python3 -c 'import json, sys
for line in sys.stdin:
    json.loads(line)' <$out/tree.jsonl 2>/dev/null; then
            pass
        else
            fail trace_tree_file "not JSON"
        fi
    fi
    mode=$(find $out/tree.jsonl -perm 600)
    if [ "$mode" ]; then pass; else fail trace_tree_file "mode is not 0600"; fi
}
run chain 0 $dir/chain && expect chain <<'END'
   0 ms  on_chain_start       RunnableSequence
   0 ms  on_chain_start       ChatPromptTemplate  seq:step:1
   0 ms  on_chain_end         ChatPromptTemplate  seq:step:1
   0 ms  on_chat_model_start  ChatOpenAI  seq:step:2
 400 ms  on_llm_end           ChatOpenAI  seq:step:2
 400 ms  on_chain_start       StrOutputParser  seq:step:3
 400 ms  on_chain_end         StrOutputParser  seq:step:3
 400 ms  on_chain_end         RunnableSequence
RunnableSequence  400 ms
|-- ChatPromptTemplate  0 ms
|-- ChatOpenAI  400 ms, 13 + 20 tokens
`-- StrOutputParser  0 ms
Why don't scientists trust atoms? They make up everything.

 400 ms  on_chain_start       RunnableParallel
 400 ms  on_chain_start       RunnableSequence  map:key:joke
 400 ms  on_chat_model_start  ChatOpenAI  map:key:poem
 400 ms  on_chain_start       ChatPromptTemplate  seq:step:1
 400 ms  on_chain_end         ChatPromptTemplate  seq:step:1
 400 ms  on_chat_model_start  ChatOpenAI  seq:step:2
 650 ms  on_llm_end           ChatOpenAI  map:key:poem
 800 ms  on_llm_end           ChatOpenAI  seq:step:2
 800 ms  on_chain_start       StrOutputParser  seq:step:3
 800 ms  on_chain_end         StrOutputParser  seq:step:3
 800 ms  on_chain_end         RunnableSequence  map:key:joke
 800 ms  on_chain_end         RunnableParallel
RunnableParallel  400 ms
|-- RunnableSequence  400 ms
|   |-- ChatPromptTemplate  0 ms
|   |-- ChatOpenAI  400 ms, 13 + 20 tokens
|   `-- StrOutputParser  0 ms
`-- ChatOpenAI  250 ms, 8 + 13 tokens
joke: Why don't scientists trust atoms? They make up everything.
poem: A dot so small, and yet it is the whole of all.


 800 ms  on_chain_start       RunnableWithFallbacks
 800 ms  on_chat_model_start  ChatOpenAI
 900 ms  on_llm_error         ChatOpenAI
 900 ms  on_chat_model_start  ChatOpenAI
1300 ms  on_llm_end           ChatOpenAI
1300 ms  on_chain_end         RunnableWithFallbacks
RunnableWithFallbacks  500 ms
|-- ChatOpenAI  100 ms  LLMCB_EHTTP
`-- ChatOpenAI  400 ms, 13 + 20 tokens
Why don't scientists trust atoms? They make up everything.

Would you like another one?

1300 ms  on_chain_start       RunnableRetry
1300 ms  on_chat_model_start  ChatOpenAI
1400 ms  on_llm_error         ChatOpenAI
1400 ms  on_chat_model_start  ChatOpenAI  retry:attempt:2
1500 ms  on_llm_error         ChatOpenAI  retry:attempt:2
1500 ms  on_chat_model_start  ChatOpenAI  retry:attempt:3
1800 ms  on_llm_end           ChatOpenAI  retry:attempt:3
1800 ms  on_chain_end         RunnableRetry
RunnableRetry  500 ms
|-- ChatOpenAI  100 ms  LLMCB_EHTTP
|-- ChatOpenAI  100 ms  LLMCB_EHTTP
`-- ChatOpenAI  300 ms, 8 + 11 tokens
Never trust an atom. They make up everything.

END
run handlers 0 $dir/handlers && expect handlers <<'END'
   0 ms  inline   (start)
   pool  sync     (start)
 100 ms  awaited  (start)
 250 ms  async    (start)
 250 ms  inline   one
   pool  sync     one
 350 ms  awaited  one
 350 ms  inline   two
   pool  sync     two
 450 ms  awaited  two
 450 ms  inline   three
   pool  sync     three
 500 ms  async    one
 550 ms  awaited  three
 750 ms  async    two
1000 ms  async    three
1000 ms  inline   (end)
   pool  sync     (end)
1100 ms  awaited  (end)
1250 ms  async    (end)
END

# ---- trace ------------------------------------------------------------------------

trace=$dir/trace
# The events in order, the same ones in a row as one.
events() { # name
    sed 's/^{"event":"\([a-z_]*\)".*/\1/' "$out/$1" | uniq -c |
        awk '{ printf "%s%s %s", sep, $1, $2; sep = ", " } END { print "" }' \
            >"$out/$1.events"
    cat >"$out/$1.events.want"
    if cmp -s "$out/$1.events.want" "$out/$1.events"; then
        pass
    else
        fail "$1" "$(cat "$out/$1.events")"
    fi
    # Whoever has Python has a judge of JSON.
    if has python3; then
        if python3 -c 'import json, sys
for line in sys.stdin:
    json.loads(line)' <"$out/$1" 2>/dev/null; then
            pass
        else
            fail "$1" "not JSON"
        fi
    fi
}
# What may differ between two runs: the ids.
same() { # name, name
    for f in "$1" "$2"; do
        sed 's/"run_id":"[-0-9a-f]*"//' "$out/$f" >"$out/$f.same"
    done
    if cmp -s "$out/$1.same" "$out/$2.same"; then
        pass
    else
        fail "$2" "not as $1"
        diff "$out/$1.same" "$out/$2.same" | head -n 10
    fi
}

for method in generate stream; do
    for handler in async sync inline; do
        run trace_$method-$handler 0 $trace --replay $joke --method $method \
            --handler $handler --system "Be brief" "Tell me a joke" &&
            events trace_$method-$handler <<'END'
1 on_chat_model_start, 17 on_llm_new_token, 1 on_llm_end, 1 result
END
        same trace_generate-async trace_$method-$handler
    done
done
count trace_generate-async 1 '"event":"on_chat_model_start","seq":1,"run_id":"[-0-9a-f]\{36\}","parent_run_id":null,"name":"ChatOpenAI","tags":\[\],"metadata":{.*},"messages":\[{"role":"system","content":"Be brief"},{"role":"user","content":"Tell me a joke"}\]}$'
count trace_generate-async 1 '"text":" \\n\\n","choice":0}$'
count trace_generate-async 1 '"text":"","choice":0,"finish_reason":"stop"}$'
usage='{"input_tokens":11,"output_tokens":14,"total_tokens":25,"cached_tokens":0,"reasoning_tokens":0}'
count trace_generate-async 1 "\"text\":\"\",\"choice\":0,\"usage\":$usage}\$"
count trace_generate-async 1 "\"llm_output\":{\"model_name\":\"gpt-4o-mini-2024-07-18\",\"token_usage\":$usage}}\$"
count trace_generate-async 1 '"event":"result","ok":true,"code":"LLMCB_OK","generations":\[\[{"text":"Why don.t .*everything\.","finish_reason":"stop","tool_calls":\[\],"refusal":null,"reasoning":null}\]\]}$'

run trace_whole 0 $trace --replay $fixtures/joke.json.http --no-stream hi &&
    events trace_whole <<'END'
1 on_chat_model_start, 1 on_llm_end, 1 result
END
run trace_batch 0 $trace --replay $joke one two &&
    count trace_batch 2 '"event":"on_llm_end"'
count trace_batch 1 '"result".*\]\],\[{"text"\|"result".*\],\[{"text"'
head -n 2 $out/trace_batch >$out/trace_batch_starts
count trace_batch_starts 2 on_chat_model_start

echo '[{"type":"function","function":{"name":"get_weather"}}]' >$out/tools
run trace_tools 0 $trace --replay $fixtures/tool-call.usage.http \
    --tools $out/tools "Weather?" &&
    count trace_tools 2 '"tool_calls":\[{"id":"call_mock_weather_1","name":"get_weather","arguments":"{\\"city\\":\\"Paris\\"}","valid":true}\]'
count trace_tools 6 '"event":"on_llm_new_token".*"tool_calls":\[{"index":0,'

run trace_cancel 1 $trace --replay $fixtures/slow.http --cancel-after 3 hi &&
    events trace_cancel <<'END'
1 on_chat_model_start, 3 on_llm_new_token, 1 on_llm_error, 1 result
END
count trace_cancel 1 '"event":"on_llm_error".*"code":"LLMCB_ECANCELLED".*"partial":\[\[{"text":"One two",'
run trace_retry 0 $trace --replay $fixtures/error-429-then-ok.http hi &&
    count trace_retry 1 '"event":"on_retry".*"attempt":1,"delay_ms":1000,.*"http_status":429'
run trace_no_retry 1 $trace --max-retries 0 \
    --replay $fixtures/error-429-then-ok.http hi &&
    events trace_no_retry <<'END'
1 on_chat_model_start, 1 on_llm_error, 1 result
END
count trace_no_retry 1 '"code":"LLMCB_EHTTP",.*"http_status":429,"partial":\[\[\]\]}$'
run trace_reset 1 $trace --replay $fixtures/mid-stream-reset.http hi &&
    count trace_reset 2 '\[\[{"text":"Reset",'
run trace_multibyte 0 $trace --replay $fixtures/multibyte.http hi

run trace_bad1 2 $trace
run trace_bad2 2 $trace --idle-ms x hi
run trace_bad3 2 $trace --method stream one two
run trace_bad4 2 $trace --bogus hi
run trace_bad5 1 $trace --replay $out/none hi
run trace_bad6 2 $trace --model

# The same over a socket, from the test server.
transports=socket
[ "$curl" != -DLLMCB_NO_CURL ] && transports="socket curl"
serve=build/tests/serve
if [ ! -x $serve ] && [ -f tests/serve.c ]; then
    mkdir -p build/tests
    $CC -o $serve tests/serve.c -lpthread >$out/serve.log 2>&1
fi
for transport in $transports; do
    if [ ! -x $serve ] || [ ! -x $trace ]; then
        skip "trace over $transport" "no tests/serve"
        continue
    fi
    rm -f $out/fifo $out/said
    mkfifo $out/fifo $out/said
    $serve $joke <$out/fifo >$out/said &
    pid=$!
    exec 3>$out/fifo 4<$out/said
    read -r _ port <&4
    for method in generate stream; do
        run "trace_$transport-$method" 0 $trace --transport "$transport" \
            --base-url "http://127.0.0.1:$port/v1" --method $method \
            --system "Be brief" "Tell me a joke" &&
            same trace_generate-async "trace_$transport-$method"
    done
    exec 3>&-
    wait $pid
    exec 4<&-
done

echo "test_examples: $passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
