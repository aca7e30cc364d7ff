#!/bin/sh
# Frama-C's Eva over the parsers: no access out of bounds or to what was not
# set, no bad pointer, no signed overflow, whatever the bytes are. Each driver
# in tests/proof gives functions of llmcb.h all inputs up to a length, most of
# them from any state that they can be in, so that the length is that of one
# step. What Eva says of a driver holds for all runs of it.
#
#     tests/campaign_proof.sh [name]             a driver
#     tests/campaign_proof.sh self-test [name]   finds planted defects
#
# tests/proof/hints has what helps Eva with llmcb.h: annotations, which go into
# a copy. An alarm that is not listed below fails its driver, and so do fewer
# statements of the functions it enters than it says (those of functions that
# it has inlined count with their callers). The parts of [WIRE] that walk
# through JSON are not here: the reader below them is. build/proof has it all:
# NAME/alarms, NAME/cover, NAME/gaps, NAME/out.

cd "$(dirname "$0")/.." || exit 1
root=$PWD
dir=build/proof
mode=
if [ "$1" = self-test ]; then
    mode=$1
    shift
fi
only=$1
passed=0 failed=0 skipped=0
limit=${PROOF_SECONDS:-900} # for one driver, on a loaded machine
mkdir -p $dir

if ! command -v frama-c >/dev/null 2>&1; then
    echo "  skipped: frama-c is not installed"
    echo "campaign_proof: 0 passed, 0 failed, 1 skipped"
    exit 0
fi

# Known and no defect: function, text of the alarm, and why; no line numbers,
# which change.
cat >$dir/known <<'END'
llmcbi_copy_clean	\valid_read(s + 1)	a lead byte 0xC2 that llmcbi_utf8_at accepts has a second one; Eva forgets which byte it was
END
# name, driver, header, switches: into $dir/name. False: Eva came to no end.
analyse() {
    rm -rf "${dir:?}/$1"
    mkdir -p "$dir/$1"
    awk -f tests/proof/hints.awk tests/proof/hints "$3" >"$dir/$1/llmcb.h" ||
        return 1
    # Nothing but annotations and empty statements has come to it.
    grep -v '^/\*@ .* \*/\( ;\)\{0,1\}$' "$dir/$1/llmcb.h" | cmp -s - "$3" ||
        return 1
    opt=$(sed -n 's|^/\* eva: \(.*\) \*/$|\1|p' "tests/proof/$2.c")
    # In that directory, whose llmcb.h is found first.
    # shellcheck disable=SC2086
    (cd "$dir/$1" && timeout "$limit" frama-c -cpp-extra-args="$4" \
        -machdep gcc_x86_64 "$root/tests/proof/$2.c" \
        -kernel-warn-key typing:implicit-function-declaration=inactive \
        -kernel-warn-key annot:missing-spec=abort \
        -eva -eva-no-print -eva-msg-key=-initial-state \
        -eva-split-return full -eva-auto-loop-unroll 8 -eva-split-limit 300 \
        -eva-alloc-builtin fresh -eva-no-alloc-returns-null \
        -warn-invalid-pointer -warn-right-shift-negative $opt \
        -then -metrics-eva-cover -then -report-csv alarms.csv >out 2>&1) ||
        return 1
    [ -s "$dir/$1/alarms.csv" ] || return 1
    # Of a precondition of the C library, what its caller does not meet.
    awk -F '\t' 'NR > 1 && $1 !~ /^FRAMAC_SHARE/ &&
        ($6 == "Unknown" || $6 ~ /^Invalid/ || $6 == "Partially proven" ||
         $6 == "Never tried") && $4 !~ /^Frama_C_show/ {
            print $4 "\t" $7 "\t" $5 }' "$dir/$1/alarms.csv" |
        sort -u >"$dir/$1/alarms"
    sed -n 's/^ *\([a-z_0-9]*\): \([0-9]*\) stmts out of \([0-9]*\).*/\1 \2 \3/p' \
        "$dir/$1/out" | grep '^llmcb' >"$dir/$1/cover"
}

# stdin: alarms; those that are listed (yes) or not (no).
listed() { # yes or no
    awk -F '\t' -v want="$1" '
        FNR == NR { known[$1 "\t" $2] = 1; next }
        (($1 "\t" $2) in known) == (want == "yes")' $dir/known -
}
indent() {
    sed 's/^/    /'
}

driver() { # name
    start=$(date +%s)
    if ! analyse "$1" "$1" llmcb.h ""; then
        failed=$((failed + 1))
        echo "  FAILED: $1: no result: $dir/$1/out"
        grep -v '^\[eva\] .*: *$' "$dir/$1/out" | tail -n 5 | indent
        return
    fi
    seconds=$(($(date +%s) - start))
    listed no <"$dir/$1/alarms" >"$dir/$1/bad"
    listed yes <"$dir/$1/alarms" >"$dir/$1/ok"
    awk '$2 < $3 { print $1 ": " $2 " of " $3 " statements" }' \
        "$dir/$1/cover" >"$dir/$1/gaps"
    least=$(sed -n 's|^/\* reached: \([0-9]*\) \*/$|\1|p' "tests/proof/$1.c")
    awk -v name="$1" -v bad="$(grep -c . "$dir/$1/bad")" \
        -v ok="$(grep -c . "$dir/$1/ok")" -v s="$seconds" \
        -v least="${least:-100}" '
        { n++; got += $2; all += $3 }
        END { percent = all ? 100 * got / all : 0
            printf "  %s: %d alarms (and %d known ones), %d functions, " \
                "%d of %d statements reached (%.1f %%), %d s\n", name, bad,
                ok, n, got, all, percent, s
            exit percent < least }' "$dir/$1/cover"
    reached=$?
    if [ -s "$dir/$1/bad" ] || [ $reached != 0 ]; then
        failed=$((failed + 1))
        echo "  FAILED: $1: alarms, or less than $least % reached"
        indent <"$dir/$1/bad"
    else
        passed=$((passed + 1))
    fi
    sed 's/^/    known: /' "$dir/$1/ok"
    sed 's/^/    not all reached: /' "$dir/$1/gaps"
}

# A defect, the driver and the part of it that has to find it.
mutant() { # name, sed script, driver, part
    case $1 in *"$only"*) ;; *) return ;; esac
    sed "$2" llmcb.h >"$dir/mutant.h"
    if cmp -s llmcb.h "$dir/mutant.h"; then
        echo "not ok $1: changes nothing"
        failed=$((failed + 1))
    elif ! analyse "mutant.$1" "$3" "$dir/mutant.h" "-DONLY=$4"; then
        echo "not ok $1: no result: $dir/mutant.$1/out"
        failed=$((failed + 1))
    elif listed no <"$dir/mutant.$1/alarms" | grep -q .; then
        printf 'ok %s: %s\n' "$1" \
            "$(listed no <"$dir/mutant.$1/alarms" | cut -f 1,2 | head -n 1)"
        passed=$((passed + 1))
    else
        echo "not ok $1: not found"
        failed=$((failed + 1))
    fi
}
in_function() { # name, command
    printf '%s\n' "/^\\([A-Z_ ]*static .*\\)\\{0,1\\}$1(.*[^;]\$/,/^}/{$2}"
}

if [ "$mode" ]; then
    mutant utf8_reads_on \
        "$(in_function llmcbi_utf8_at '/if ((size_t)size > len)/d')" base 0
    mutant buffer_is_one_too_small \
        "$(in_function llmcbi_buf_add 's/len >= b->cap - b->len/len > b->cap - b->len/')" \
        base 5
    mutant escape_reads_on \
        "$(in_function llmcbi_json_string 's/end - p < 4 || //')" json 0
    mutant one_level_too_deep \
        "$(in_function llmcbi_json_open 's/j->depth == LLMCBI/j->depth > LLMCBI/')" \
        json 0
    mutant field_reads_on \
        "$(in_function llmcbi_sse_line 's/value.len > 1 && //')" sse 3
    mutant chunk_size_reads_on \
        "$(in_function llmcbi_h1_chunks 's/end - from >= 12/end > from/')" \
        http 4
    mutant date_overflows \
        "$(in_function llmcbi_parse_seconds 's|INT64_MAX / 100000|INT64_MAX / 100|')" \
        http 5
else
    for f in tests/proof/*.c; do
        name=${f##*/} name=${name%.c}
        case $name in *"$only"*) driver "$name" ;; esac
    done
fi

echo "campaign_proof: $passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
