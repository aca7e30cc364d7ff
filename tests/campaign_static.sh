#!/bin/sh
# Three more analysers over llmcb.h: cppcheck, clang-tidy and scan-build.
# make check runs clang --analyze and gcc -fanalyzer with what they look for
# by themselves; here are the checks that are too slow or too talkative for
# a gate. Each analyser is one pass for each form of the implementation.
#
#     tests/campaign_static.sh [name]
#
# TIDY, SCAN_BUILD and CLANG name others than the newest that is installed.
# All that they say is in build/static. What is known and no defect stands
# below, each with its reason.

cd "$(dirname "$0")/.." || exit 1
dir=build/static
only=$1
passed=0 failed=0 skipped=0
rm -rf $dir
mkdir -p $dir

curl=yes
printf '#include <curl/curl.h>\n' | ${CC:-cc} -E - >/dev/null 2>&1 || curl=
# Forms: with all, and with what the first leaves out.
form() { # name, switches
    {
        for s in $2; do echo "#define $s"; done
        echo '#define LLMCB_IMPLEMENTATION'
        echo '#include "llmcb.h"'
    } >"$dir/$1.c"
    cp "$dir/$1.c" "$dir/$1.cpp"
}
forms="default poll"
form default "${curl:-LLMCB_NO_CURL}"
[ "$curl" ] && form default ""
form poll "LLMCB_NO_CURL LLMCB_NO_EPOLL LLMCB_NO_STDIO"

wanted() { # name
    case $1 in *"$only"*) return 0 ;; esac
    return 1
}
skip() {
    wanted "$1" || return
    skipped=$((skipped + 1))
    echo "  skipped: $1: $2"
}
result() { # name, file with findings
    if [ -s "$2" ]; then
        failed=$((failed + 1))
        echo "  FAILED: $1: $(grep -c . "$2") findings"
        head -n 40 "$2" | sed 's/^/    /'
    else
        passed=$((passed + 1))
    fi
}

# ---- what is known ---------------------------------------------------------

# Of all analysers, by check and text of the line that it is said of, with the
# reason why it is no defect; no line numbers, which change.
cat >$dir/known <<'END'
bugprone-not-null-terminated-result	memcpy(out, "\xEF\xBF\xBD", 3);	bytes with a length
bugprone-not-null-terminated-result	memcpy(at, "data: ", 6);	bytes with a length
bugprone-not-null-terminated-result	memchr(llmcbi_json_	bytes with a length
clang-analyzer-security.insecureAPI.strcpy	strcpy(chat->url + len + sizeof path - 1, query);	room for it was asked for
clang-analyzer-security.insecureAPI.strcpy	r->path = strcpy((char *)(r + 1), path);	room for it was asked for
clang-analyzer-security.insecureAPI.strcpy	chat->key = strcpy(auth + before, d->api_key);	room for it was asked for
clang-analyzer-security.insecureAPI.strcpy	strcpy(to, llmcbi_decimal(	a number into room for one
clang-analyzer-security.insecureAPI.strcpy	strcat(text, llmcbi_decimal(digits	a number behind 5 of 40 bytes
concurrency-mt-unsafe	getenv(	the manual says when the environment is read
bugprone-implicit-widening-of-multiplication-result	months + 3 * month	month is below 12
bugprone-implicit-widening-of-multiplication-result	return days * 86400 + v[2] * 3600	of two digits each
readability-non-const-parameter	llmcbi_transfer_connected(	libcurl gives the type
bugprone-inc-dec-in-conditions	if (++h->framing > LLMCBI_H1_FREE_FRAMING &&	what stands before && comes first
alpha.core.PointerSub	if ((size_t)(end - s) < mid ||	s is at the closing quote
alpha.core.PointerSub	raw.len = (size_t)(s - raw.ptr);	s is at the closing quote
ctuuninitvar	const char *p = j->p, *end = j->end;	all that call it have set these two
ctunullpointer	if (m->failed) return;	without a maker there is no record to fill, which is asked before
ctuuninitvar	const char *s = j->str, *end = s + j->len;	behind a string that was read
uninitvar	struct pollfd one, *fds = loop->fds ? loop->fds : &one;	llmcbi_poller_fill does
redundantContinue	continue;	the whole body of a loop
clarifyCalculation	what & CURL_POLL_	x & FLAG ? a : b has no second reading
clarifyCalculation	types & LLMCBI_OR_NONE ?	x & FLAG ? a : b has no second reading
END
# stdin: findings; those that are not known.
unknown() {
    while IFS= read -r line; do
        n=${line#*:} n=${n%%:*}
        text=$(sed -n "${n}p" llmcb.h) known=
        while IFS='	' read -r check words reason; do
            case $line in *"[$check"*)
                case $text in *"$words"*) known=$reason ;; esac ;;
            esac
        done <$dir/known
        [ "$known" ] || echo "$line"
    done
}

# ---- clang-tidy ------------------------------------------------------------

# What finds defects. Left out of these groups, since it is how this file is
# written and no defect:
#   bugprone-easily-swappable-parameters   a taste; 60 functions
#   bugprone-reserved-identifier           the C library's feature macros
#   bugprone-assignment-in-if-condition    while ((x = y)) and the like
#   bugprone-macro-parentheses             names of types and members
#   bugprone-narrowing-conversions         -Wconversion does that, as error
#   clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling
#                                          wants memcpy_s, which nobody has
#   cert-err33-c                           (void) casts nothing here wants
#   bugprone-sizeof-expression             n * sizeof *array of pointers
#   clang-analyzer-optin.performance.Padding   8 bytes in a struct of 700
#   misc-no-recursion                      tests/check_stack.sh knows better
#   performance-no-int-to-ptr              msg_iov takes no const
#   bugprone-casting-through-void          how -Wcast-align is told that a
#                                          record or a part of a struct is
#                                          where its type may be
#   bugprone-multi-level-implicit-pointer-conversion   arrays of pointers are
#                                          moved and freed like all others
checks="-*,bugprone-*,cert-*,clang-analyzer-*,concurrency-*,portability-*
misc-redundant-expression,misc-misplaced-const
performance-*,readability-misleading-indentation
readability-suspicious-call-argument,readability-duplicate-include
readability-inconsistent-declaration-parameter-name
readability-redundant-control-flow,readability-redundant-declaration
readability-non-const-parameter
-bugprone-easily-swappable-parameters,-bugprone-reserved-identifier
-bugprone-assignment-in-if-condition,-bugprone-macro-parentheses
-bugprone-narrowing-conversions,-cert-dcl37-c,-cert-dcl51-cpp,-cert-err33-c
-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling
-bugprone-sizeof-expression,-clang-analyzer-optin.performance.Padding
-performance-no-int-to-ptr,-bugprone-casting-through-void
-bugprone-multi-level-implicit-pointer-conversion"
checks=$(echo "$checks" | tr '\n' ',')
tidy=$TIDY
for v in -19 -18 -17 -16 -15 -14 ""; do
    t=clang-tidy$v
    [ "$tidy" ] || ! command -v $t >/dev/null 2>&1 || tidy=$t
done
for f in $forms; do
    if [ ! "$tidy" ]; then
        skip "clang-tidy $f" "clang-tidy is not installed"
    elif wanted "clang-tidy $f"; then
        $tidy --quiet "--checks=$checks" '--header-filter=.*llmcb\.h' \
            $dir/$f.c -- -std=c11 -I. >$dir/tidy.$f.out 2>$dir/tidy.$f.err
        grep -E 'llmcb\.h:[0-9]+:[0-9]+: (warning|error)' $dir/tidy.$f.out |
            sed 's|.*/llmcb\.h|llmcb.h|' | sort -u >$dir/tidy.$f.all
        unknown <$dir/tidy.$f.all >$dir/tidy.$f.bad
        grep -q 'error:' $dir/tidy.$f.err && cat $dir/tidy.$f.err \
            >>$dir/tidy.$f.bad
        result "clang-tidy $f" $dir/tidy.$f.bad
    fi
done

# ---- scan-build ------------------------------------------------------------

# Beyond the default. The alpha checkers of strings and bounds do not end in
# ten minutes on one file as large as this.
scan=$SCAN_BUILD
for v in -19 -18 -17 -16 -15 -14 ""; do
    t=scan-build$v
    [ "$scan" ] || ! command -v $t >/dev/null 2>&1 || scan=$t
done
clang=${CLANG:-clang${scan#*scan-build}}
more="optin.portability.UnixAPI nullability.NullableDereferenced
nullability.NullablePassedToNonnull security.FloatLoopCounter
valist.Uninitialized valist.Unterminated valist.CopyToSelf
alpha.core.BoolAssignment alpha.core.IdenticalExpr alpha.core.PointerSub
alpha.core.TestAfterDivZero"
for f in $forms; do
    if [ ! "$scan" ]; then
        skip "scan-build $f" "scan-build is not installed"
    elif wanted "scan-build $f"; then
        set --
        for c in $more; do set -- "$@" -enable-checker "$c"; done
        $scan -o $dir/scan.$f -analyze-headers "$@" "$clang" -std=c11 -I. -c \
            -o $dir/scan.o $dir/$f.c >$dir/scan.$f.out 2>&1
        grep -E 'llmcb\.h:[0-9]+:[0-9]+: warning|: error:' \
            $dir/scan.$f.out | sed 's|.*/llmcb\.h|llmcb.h|' | sort -u |
            unknown >$dir/scan.$f.bad
        grep -q '^scan-build: ' $dir/scan.$f.out ||
            echo "scan-build did not work: $dir/scan.$f.out" \
                >>$dir/scan.$f.bad
        result "scan-build $f" $dir/scan.$f.bad
    fi
done

# ---- cppcheck --------------------------------------------------------------

# Checks that are not asked for:
#   missingIncludeSystem, unmatchedSuppression   about cppcheck itself
#   unusedFunction        the functions are the program's
#   toomanyconfigs        one configuration a form is what is wanted
#   variableScope         variables stand at the top of their function; in a
#                         coroutine those of a block would be jumped over
#   constParameter*, constVariable*
#                         the callbacks have the types that they have
cppcheck_ignores="missingIncludeSystem unmatchedSuppression variableScope
constParameter constParameterPointer constParameterCallback constVariable
constVariablePointer toomanyconfigs"
for f in $forms; do
    if ! command -v cppcheck >/dev/null 2>&1; then
        skip "cppcheck $f" "cppcheck is not installed"
    elif wanted "cppcheck $f"; then
        set --
        for i in $cppcheck_ignores; do set -- "$@" "--suppress=$i"; done
        # One configuration, that of the form: all switches at once are too
        # many to try.
        cppcheck --enable=warning,performance,portability,style \
            --inconclusive --std=c11 --platform=unix64 --library=posix \
            -D__linux__ -D__x86_64__ -D__STDC_VERSION__=201112L \
            -DCLOCK_MONOTONIC=1 -DO_CLOEXEC=1 -U__cplusplus \
            --template='{file}:{line}:{column}: {severity}: {message} [{id}]' \
            --template-location='' -I. "$@" --quiet $dir/$f.c \
            >$dir/cppcheck.$f.out 2>&1
        grep -E 'llmcb\.h:[0-9]+' $dir/cppcheck.$f.out | sort -u |
            unknown >$dir/cppcheck.$f.bad
        result "cppcheck $f" $dir/cppcheck.$f.bad
    fi
done

echo "campaign_static: $passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
