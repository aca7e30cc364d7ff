#!/bin/sh
# Runs test programs under valgrind's helgrind and DRD, which look for data
# races, lock orders and misuse of pthreads in another way than
# ThreadSanitizer does. Each program under each tool is one pass or failure.
#
#     tests/campaign_races.sh [PROGRAM ...]
#
# RACES_SECONDS bounds one of them (240), TOOLS says which (helgrind drd). A
# program is named as test_run or, for some of its tests, as test_run:name.
#
# What this cannot find: valgrind's own default suppressions ignore what has
# its first frame in libc, which since glibc 2.34 holds libpthread too; how
# many were is printed. What children of a fork did is not looked at: they
# begin with the errors of their parent.

cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
dir=build/races
limit=${RACES_SECONDS:-240}
passed=0 failed=0 skipped=0

finish() {
    echo "campaign_races: $passed passed, $failed failed, $skipped skipped"
    [ "$failed" = 0 ]
    exit
}
if ! command -v valgrind >/dev/null 2>&1; then
    echo "  skipped: campaign_races: valgrind is not installed"
    skipped=1
    finish
fi
mkdir -p $dir
rm -f $dir/*.log $dir/*.out

# The programs end themselves after 100 s, for which valgrind is too slow:
# timeout(1) does it here.
echo 'unsigned __wrap_alarm(unsigned s); unsigned __wrap_alarm(unsigned s)
{ (void)s; return 0; }' >$dir/alarm.c

# Tests keep gates and heaps on the stack, and leave gates without destroying
# their mutex and condition: what the next test makes at the same place is
# then, for DRD, one that is made twice or of another kind. Whether somebody
# is still inside is what ASan's use-after-return looks for. Each entry names
# the function of the tests, so that none hides anything of llmcb.h.
cat >$dir/supp <<'END'
{
   # over a mutex of a gate of the test before
   scene_init makes a mutex
   drd:MutexErr
   fun:pthread_mutex_init@*
   fun:scene_init
}
{
   # over a condition of a gate of the test before
   world_init makes a mutex
   drd:MutexErr
   fun:pthread_mutex_init@*
   fun:world_init
}
{
   # over a mutex of a stage before it
   stage_init makes a mutex
   drd:MutexErr
   fun:pthread_mutex_init@*
   fun:stage_init
}
{
   # over the condition of its gate
   stage_init makes a condition
   drd:CondErr
   fun:pthread_cond_init@*
   fun:stage_init
}
{
   # the same mutex, which DRD goes on to take for that condition
   world_close destroys it
   drd:MutexErr
   fun:pthread_mutex_destroy@*
   fun:world_close
}
END

[ $# -gt 0 ] || set -- test_call test_run test_tree test_agent
for program; do
    name=${program%%:*} only=
    [ "$name" = "$program" ] || only=${program#*:}
    # -lm and the like stand in the program
    extra=$(sed -n 's|^/\* build: \(.*\) \*/$|\1|p' "tests/$name.c")
    # shellcheck disable=SC2086
    if ! $CC -DLLMCB_NO_CURL -O1 -g -I. -Wl,--wrap=alarm -o "$dir/$name" \
        "tests/$name.c" $dir/alarm.c -lpthread $extra >$dir/make.log 2>&1; then
        head -n 20 $dir/make.log
        echo "  FAILED: $name: not built"
        failed=$((failed + 1))
        continue
    fi
    for tool in ${TOOLS:-helgrind drd}; do
        log=$dir/$name-$tool
        more=
        # a whole history is ten times as slow; without it the second place
        # of a race is not named in full
        [ "$tool" = helgrind ] && more=--history-level=approx
        start=$(date +%s)
        # shellcheck disable=SC2086
        timeout -k 5 "$limit" valgrind --tool=$tool $more -s \
            --suppressions=$dir/supp --log-file="$log-%p.log" \
            "$dir/$name" $only >"$log.out" 2>&1 </dev/null &
        pid=$!
        wait $pid
        status=$?
        seconds=$(($(date +%s) - start))
        # a log of its own has each process that was forked
        own=$(grep -l "Parent PID: $pid\$" "$log"-*.log | head -n 1)
        sum=$(sed -n 's/.*ERROR SUMMARY: //p' "${own:-/dev/null}" | tail -n 1)
        tests=$(grep -E ': [0-9]+ passed' "$log.out" | tail -n 1)
        what="$program under $tool: ${tests#*: }; $sum; $seconds s"
        case $status,$sum in
        124,* | 137,*) # too slow, or hanging
            echo "  FAILED: $program under $tool: not done in $limit s"
            failed=$((failed + 1))
            ;;
        *,"0 errors "*)
            if [ "$status" = 0 ]; then
                echo "$what"
                passed=$((passed + 1))
            else
                grep -v ': [0-9]* passed' "$log.out" | head -n 30
                echo "  FAILED: $what; status $status"
                failed=$((failed + 1))
            fi
            ;;
        *)
            sed 's/^==[0-9]*== //' "$own" | head -n 80
            echo "  FAILED: $what; all of it: $own"
            failed=$((failed + 1))
            ;;
        esac
    done
done
finish
