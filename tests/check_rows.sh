#!/bin/sh
# Every row of the fault catalogue (fault_001 to fault_116) and of LangChain's
# rules (case_001 to case_107) must be the name of a test, or stand below
# among those that are left out, with the reason. One row is one pass.
#
#     tests/check_rows.sh

cd "$(dirname "$0")/.." || exit 1

# None is left out. These stand for something else than the catalogue says,
# because the design does:
#   fault_041  no budget of retries over all calls: each keeps to its own
#   fault_064, fault_065  nothing is decoded: an encoded answer is refused
#   fault_067  HTTP/2 is never used in clear text, and only where it is asked
#   fault_080  there is no timer of progress: the idle timer counts events
#              with data alone
#   fault_087, fault_091  there are no strict modes
#   fault_099  the handlers of a run are fixed at its start
absent='
'
cat tests/test_*.c | grep -oE '(TEST[A-Z_]*\(|^ *\{ ")(fault|case)_[0-9]{3}_' |
    grep -oE '(fault|case)_[0-9]{3}' | sort -u |
    awk -v absent="$absent" '
{ have[$0] = 1 }
function row(name,   why) {
    why = index(absent, "\n" name " ")
    if (have[name] && !why) passed++
    else if (!have[name] && why) passed++
    else {
        failed++
        print "  FAILED: " name (why ? ": is left out, and there" : \
                                      ": no test has this name")
    }
}
END {
    for (i = 1; i <= 116; i++) row(sprintf("fault_%03d", i))
    for (i = 1; i <= 107; i++) row(sprintf("case_%03d", i))
    print "check_rows: " passed + 0 " passed, " failed + 0 " failed, 0 skipped"
    exit failed > 0
}'
