#!/bin/sh
# make campaign: make check and all that takes too long for it, one after the
# other. What fails does not stop the rest; the status says whether something
# did.
#
#     tests/campaign.sh        FUZZ_SECONDS, AFL_SECONDS, LOAD_SECONDS: how long
#                              those take

cd "$(dirname "$0")/.." || exit 1
make=${MAKE:-make}
failed=
for part in check bench-instructions load fuzz afl; do
    echo "== make $part"
    $make "$part" || failed="$failed $part"
done
echo "== WALK=deep build/tests/test_walk"
WALK=deep build/tests/test_walk || failed="$failed test_walk"
for f in tests/model/check.sh tests/walk_mutants.sh tests/campaign_*.sh; do
    echo "== $f"
    sh "$f" || failed="$failed $f"
done
if [ "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all parts passed"
