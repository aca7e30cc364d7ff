# Reads what run.sh has gathered and prints the table of medians and the
# budgets. Ends with status 1 if clients disagree or failed.

function median(key,    n, i, j, v, t) {
    n = count[key]
    if (!n) return ""
    for (i = 1; i <= n; i++) v[i] = list[key, i]
    for (i = 2; i <= n; i++) {
        t = v[i]
        for (j = i - 1; j >= 1 && v[j] > t; j--) v[j + 1] = v[j]
        v[j + 1] = t
    }
    return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
}

function add(key, value) {
    list[key, ++count[key]] = value + 0
}

function wrong(text) {
    print "WRONG: " text
    failed = 1
}

# Median of a client's metric in a case.
function m(c, who, metric) {
    return median(c SUBSEP who SUBSEP metric)
}

# Of two clients' figures of the same rounds, the median of their ratios or of
# their differences: the machine's speed changes from minute to minute, hardly
# within a round.
function paired(a, b, differ,    i) {
    count["pair"] = 0
    for (i = 1; i <= count[a] && i <= count[b]; i++)
        if (differ) add("pair", list[a, i] - list[b, i])
        else if (list[b, i] > 0) add("pair", list[a, i] / list[b, i])
    return median("pair")
}

function ratio(c, who, other, metric) {
    return paired(c SUBSEP who SUBSEP metric, c SUBSEP other SUBSEP metric, 0)
}

# What a client takes more than another.
function more(c, who, other, metric) {
    return paired(c SUBSEP who SUBSEP metric, c SUBSEP other SUBSEP metric, 1)
}

# What 10,000 streams cost more than 100 of the same rate.
function rates(who) {
    return paired("rate-10000" SUBSEP who SUBSEP "steady",
        "rate-100" SUBSEP who SUBSEP "steady", 0)
}

function line(what, figure, unit, limit, limit_text) {
    if (figure == "")
        printf "%-58s %12s  %-22s %s\n", what, "-", limit_text, "not measured"
    else
        printf "%-58s %9.*f %-4s %-20s %s\n", what,
            figure < 10 ? 2 : figure < 100 ? 1 : 0, figure, unit, limit_text,
            limit == "" ? "shown" : figure <= limit ? "ok" : "short"
}

function difference(a, b) {
    return a == "" || b == "" ? "" : a - b
}

function scaled(a, by) {
    return a == "" ? "" : a / by
}

$1 == "SHAPE" {
    name = $2
    sub(/^SHAPE [^ ]* /, "")
    if (!(name in shape)) cases[++n_cases] = name
    shape[name] = $0
}

$1 == "CASE" {
    c = $2; who = $3
    split("", f)
    for (i = 4; i <= NF; i++) {
        k = index($i, "=")
        if (k) f[substr($i, 1, k - 1)] = substr($i, k + 1)
    }
    if (f["status"] != 0 || f["errors"] != 0 || f["tokens"] == "")
        wrong(c " " who ": status " f["status"] ", errors " f["errors"])
    if (f["tokens"] == "") next
    # what every client must agree on; the recv limit has no text
    if (f["client"] != "recv") {
        sum = f["checksum"] " " f["bytes"] " " f["tokens"]
        if (!(c in agreed)) agreed[c] = sum
        else if (agreed[c] != sum)
            wrong(c " " who ": checksum, bytes, tokens are " sum \
                  ", not " agreed[c])
    }
    if (!((c, who) in known)) {
        known[c, who] = 1
        clients[c] = clients[c] " " who
    }
    t = f["tokens"]
    streams[c] = f["streams"]
    add(c SUBSEP who SUBSEP "cpu", f["cpu_s"] / t * 1e9)
    add(c SUBSEP who SUBSEP "wall", f["wall_s"] / t * 1e9)
    if (f["steady_tokens"] > 0)
        add(c SUBSEP who SUBSEP "steady",
            f["steady_cpu_s"] / f["steady_tokens"] * 1e9)
    add(c SUBSEP who SUBSEP "allocs", f["allocs"] / t)
    add(c SUBSEP who SUBSEP "stream_allocs", f["allocs"] / f["streams"])
    add(c SUBSEP who SUBSEP "reads", f["reads"] / t * 1000)
    add(c SUBSEP who SUBSEP "waits", f["waits"] / t * 1000)
    add(c SUBSEP who SUBSEP "rss", f["peak_rss_kib"])
    add(c SUBSEP who SUBSEP "bytes", f["peak_bytes"])
    add(c SUBSEP who SUBSEP "stream_cpu", f["cpu_s"] / f["streams"] * 1e6)
    add(c SUBSEP who SUBSEP "wall_ms", f["wall_s"] * 1e3)
    add(c SUBSEP who SUBSEP "part_ms", f["part_wall_s"] * 1e3)
}

$1 == "MICRO" {
    if (!($2 in micro)) order[++n_micro] = $2
    if (!($2 in micro) ||
        ($4 ~ /^GB/ ? $3 + 0 > micro[$2] : $3 + 0 < micro[$2]))
        micro[$2] = $3 + 0
    unit[$2] = $4
}
$1 == "SIZE" {
    size[$2] = $3 / 1024
    read_only[$2] = $4 / 1024
    static_bytes += $5
    sized = 1
}
$1 == "INCLUDE" { add("include" SUBSEP $2, $3 / 1000) }
$1 == "INSTR" { instr[$2] = $3; instr_order[++n_instr] = $2 }

function memory_a_stream(c, who) {
    if (m(c, who, "bytes") > 0 && streams[c] >= 1000)
        return text(m(c, who, "bytes") / streams[c], 0)
    return "-"
}

function table(    i, k, n, who, names, c) {
    for (i = 1; i <= n_cases; i++) {
        c = cases[i]
        n = split(clients[c], names, " ")
        if (!n) continue
        printf "%s: %s\n", c, shape[c]
        printf "  %-12s %8s %7s %9s %7s %9s %8s %8s %8s %8s %8s\n", "client",
            "CPU ns", "x recv", "steady ns", "x recv", "wall ns", "reads/k",
            "waits/k", "allocs", "peak KiB", "B/stream"
        for (k = 1; k <= n; k++) {
            who = names[k]
            printf "  %-12s %8.0f %7s %9s %7s %9.0f ", who, m(c, who, "cpu"),
                text(ratio(c, who, "recv", "cpu"), 2),
                text(m(c, who, "steady"), 0),
                text(ratio(c, who, "recv", "steady"), 2),
                m(c, who, "wall")
            printf "%8.1f %8.1f %8.4f %8d %8s\n", m(c, who, "reads"),
                m(c, who, "waits"), m(c, who, "allocs"), m(c, who, "rss"),
                memory_a_stream(c, who)
        }
        print ""
    }
}

function text(value, digits) {
    return value == "" ? "-" : sprintf("%.*f", digits, value)
}

function budgets(    a, b) {
    printf "%-58s %14s %-20s\n", "budget", "figure", "limit"
    line("CPU a token, 100 streams, 64 a write, inline, x recv",
        ratio("burst-100", "inline", "recv", "cpu"), "x", 1.5, "1.5 x")
    line("  the same, sync handler on the pool, x recv",
        ratio("burst-100", "sync", "recv", "cpu"), "x", 2, "2 x")
    line("  the same, events of uneven length, inline, x recv",
        ratio("uneven-100", "inline", "recv", "cpu"), "x", "", "")
    line("one stream, 64 a write, sync more than inline",
        more("burst-1", "sync", "inline", "cpu"), "ns", 100, "100 ns")
    line("one async handler that does not await, over inline",
        more("recorded", "async", "inline", "cpu"), "ns", 30, "30 ns")
    line("lock step on the pool, a token, wall",
        scaled(more("lock-step", "lock", "sync", "wall"), 1000), "us", "",
        "about 30 us")
    line("start and end barriers with a sync handler, wall",
        micro["barriers_sync_wall"], "us", "", "about 60 us")
    line("paced, 1,000 streams of 20 a second, inline, x recv",
        ratio("paced-1000", "inline", "recv", "steady"), "x", 1.1, "1.10 x")
    line("  the same, sync handler on the pool, x recv",
        ratio("paced-1000", "sync", "recv", "steady"), "x", 1.4, "1.4 x")
    line("the same token rate over 10,000 streams against 100",
        rates("inline"), "x", 1.2, "1.2 x")
    line("  for comparison, recv alone", rates("recv"), "x", "", "")
    line("parsing alone, inline handler", m("recorded", "inline", "cpu"),
        "ns", 40, "40 ns")
    line("  instructions a token", instr["token_inline"], "", 700, "700")
    line("curl transport against libcurl + cJSON, burst",
        ratio("burst-100", "curl", "curl_cjson", "cpu"), "x", 0.9999, "< 1 x")
    line("  the same, paced",
        ratio("paced-curl", "curl", "curl_cjson", "steady"), "x", 0.9999,
        "< 1 x")
    split("inline async sync", names, " ")
    for (i = 1; i <= 3; i++) {
        a = m("burst-100", names[i], "allocs")
        b = m("setup", names[i] == "sync" ? "sync" : "inline",
            "stream_allocs")
        line("allocations a token, " names[i],
            a == "" || b == "" ? "" : a - b / 10000, "", 0.01, "0.01")
    }
    line("memory of a waiting stream, plain sockets",
        scaled(m("rate-10000", "inline", "bytes"), 10000 * 1024), "KiB", 2,
        "2 KiB")
    line("peak with 10,000 paced streams",
        scaled(m("rate-10000", "inline", "rss"), 1024), "MiB", 24, "24 MiB")
    line("a stream's set-up and end, inline",
        m("setup", "inline", "stream_cpu"), "us", 60, "60 us")
    line("  the same, sync handler", m("setup", "sync", "stream_cpu"), "us",
        60, "60 us")
    line("  for comparison, recv alone", m("setup", "recv", "stream_cpu"),
        "us", "", "")
    a = m("sleeper", "sync", "wall_ms")
    line("99 streams beside one whose handler sleeps 2 ms, x without",
        a > 0 ? m("sleeper", "sleeper", "part_ms") / a : "", "x", 1.2,
        "no longer (1.2 x)")
    line("timer, expire and insert, 10,000 sleepers",
        micro["timer_expire_insert_10000"], "ns", 120, "120 ns")
    line("code, -Os, text section: all", size["all"], "KiB", 112, "112 KiB")
    line("  no curl", size["no_curl"], "KiB", 96, "96 KiB")
    line("  no curl, agent, kit", size["least"], "KiB", 56, "56 KiB")
    line("  all, with constants and unwind tables", read_only["all"], "KiB",
        "", "")
    line("static memory", sized ? static_bytes : "", "B", 0, "0")
    line("a loop with one open stream, read buffer included",
        scaled(m("idle-1", "inline", "bytes"), 1024), "KiB", 80, "80 KiB")
    line("including the declarations, over stdio.h",
        difference(median("include" SUBSEP "llmcb"),
            median("include" SUBSEP "stdio")), "ms", 15, "15 ms")
}

END {
    table()
    for (i = 1; i <= n_micro; i++)
        printf "micro: %-32s %10.2f %s\n", order[i], micro[order[i]],
            unit[order[i]]
    for (i = 1; i <= n_instr; i++)
        printf "instructions: %-25s %10d\n", instr_order[i],
            instr[instr_order[i]]
    print ""
    budgets()
    if (failed) print "\nWRONG: see the top; no figure counts"
    exit failed
}
