#!/bin/sh
# Breaks the parsers and the state machines of llmcb.h in one random place
# each and looks whether a test sees it. tests/mutants.py does it and says
# more; tests/walk_mutants.sh is for breaks of the threads' protocol.
#
#     tests/campaign_mutants.sh [SECTION ... | ID ...]    MUTANTS=25, SEED=1

cd "$(dirname "$0")/.." || exit 1
if ! command -v python3 >/dev/null 2>&1; then
    echo "  skipped: mutants: python3 is not installed"
    exit 0
fi
exec python3 tests/mutants.py "$@"
