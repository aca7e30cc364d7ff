#!/bin/sh
# Checks tests/model/run.pml with spin, in all its states: nobody stands still
# for ever, and under weak fairness each run ends. Then the same with defects
# put in, each of which must be found. MODEL=deep: more tokens.

cd "$(dirname "$0")" || exit 1
passed=0 failed=0

finish() {
    echo "model: $passed passed, $failed failed, ${1:-0} skipped"
    [ $failed = 0 ]
    exit
}
for tool in spin "${CC:-cc}"; do
    command -v "$tool" >/dev/null 2>&1 && continue
    echo "  skipped: model: $tool is not installed"
    finish 1
done
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
cp run.pml "$dir" && cd "$dir" || exit 1

build() { # flags of the model, of the compiler
    rm -f pan pan.*
    # shellcheck disable=SC2086
    spin -a $1 run.pml >spin.out 2>&1 &&
        ${CC:-cc} -w -O2 -DVECTORSZ=2048 $2 -o pan pan.c >cc.out 2>&1 &&
        return
    cat spin.out cc.out 2>/dev/null
    return 1
}
# Whether all states were seen and none was bad.
clean() {
    ./pan -m100000 "$@" >pan.out 2>&1
    grep -q 'errors: 0' pan.out && ! grep -q 'max search depth' pan.out
}
result() { # command's status, text
    if [ "$1" = 0 ]; then
        echo "ok $2"
        passed=$((passed + 1))
    else
        echo "not ok $2"
        failed=$((failed + 1))
    fi
}
states() {
    sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1 states/p' pan.out |
        head -n 1
}

n=3
[ "$MODEL" = deep ] && n=4
# With claims, a thread that stands still is no error, so this comes first.
build "-DTOKENS=$n" "-DSAFETY -DNOCLAIM" && clean
result $? "assertions and deadlocks ($(states))"
build "-DTOKENS=$n" -DNFAIR=3 && clean -a -f
result $? "each run ends ($(states))"
if [ "$MODEL" = deep ]; then
    build "-DTOKENS=6 -DWINDOW=3" "-DSAFETY -DNOCLAIM" && clean
    result $? "a larger window, assertions and deadlocks ($(states))"
    build "-DTOKENS=6 -DWINDOW=3" -DNFAIR=3 && clean -a -f
    result $? "a larger window, each run ends ($(states))"
fi

for defect in $(sed -n 's/^#if.*def BREAK_\([A-Z]*\)$/\1/p' run.pml |
    sort -u); do
    by=
    if build "-DTOKENS=2 -DWINDOW=1 -DBREAK_$defect" "-DSAFETY -DNOCLAIM"; then
        if ! clean; then
            by=$(sed -n 's/^pan:1: \(.*\) (at .*/\1/p' pan.out)
        elif build "-DTOKENS=2 -DWINDOW=1 -DBREAK_$defect" -DNFAIR=3 &&
            ! clean -a -f &&
            grep -q 'errors: 1' pan.out; then
            by="a run does not end"
        fi
    fi
    [ "$by" ]
    result $? "BREAK_$defect is found${by:+: $by}"
done
finish
