#!/bin/sh
# The shortcuts that only save time (LLMCBI_QUICK) change nothing: twins.c,
# built with them and without, says the same of streams made at random.
#
#     tests/check_twins.sh       SEEDS=4000, FROM=1
#
# What differs is in build/check_twins/differs.

cd "$(dirname "$0")/.." || exit 1
dir=build/check_twins
cc=${CC:-cc}
from=${FROM:-1}
to=$((from + ${SEEDS:-4000}))
passed=0 failed=0
mkdir -p $dir

sanitize=
echo 'int main(void) { return 0; }' >$dir/x.c
$cc -fsanitize=address,undefined -o $dir/x $dir/x.c 2>/dev/null && $dir/x &&
    sanitize='-fsanitize=address,undefined -fno-sanitize-recover=undefined'
build() { # name, flags
    name=$1
    shift
    $cc -std=gnu99 -O1 -g -Wall -Wextra -I. "$@" -o "$dir/$name" tests/twins.c \
        -lpthread && "$dir/$name" "$from" "$to" >"$dir/$name.txt"
}
for twin in quick=1 small=0; do
    # shellcheck disable=SC2086
    if build ${twin%=*} -DLLMCBI_QUICK=${twin#*=} $sanitize; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "  FAILED: $twin"
    fi
done
if diff $dir/quick.txt $dir/small.txt >$dir/differs; then
    passed=$((passed + 1))
else
    failed=$((failed + 1))
    echo "  FAILED: shortcuts change what is told"
    sed 5q $dir/differs
fi
echo "check_twins: $passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
