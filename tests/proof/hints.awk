# awk -f hints.awk hints llmcb.h: llmcb.h with the annotations of hints.
BEGIN { FS = "\t" }
FNR == NR {
    if (/^#/ || NF < 3) next
    name[++n] = $1
    text[n] = $2
    hint[n] = $3
    next
}
/^[A-Za-z].*\(/ && !/;$/ {
    fn = $0
    sub(/\(.*/, "", fn)
    sub(/.*[ *]/, "", fn)
}
/^}/ { fn = "" }
{
    for (i = 1; i <= n; i++)
        if (fn == name[i] && !used[i] && index($0, text[i])) {
            empty = sub(/^null /, "", hint[i]) ? " ;" : ""
            k = split(hint[i], one, "; *")
            for (h = 1; h <= k; h++)
                if (one[h]) printf "/*@ %s; */%s\n", one[h], empty
            used[i] = 1
        }
    print
}
END {
    for (i = 1; i <= n; i++)
        if (!used[i]) {
            print "no such line: " name[i] ": " text[i] >"/dev/stderr"
            exit 1
        }
}
