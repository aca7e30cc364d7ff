#!/bin/sh
# The sections of the implementation form a stack: each may use those above
# it in the file and none below. This fails when a private name (llmcbi_*,
# LLMCBI_*) is used in a section before the one that defines it; a forward
# declaration is such a use. The few exceptions are written where they
# happen, in the section that uses the name:
#
#     /* upward: llmcbi_name */
#
#     tests/check_sections.sh [HEADER]          default: llmcb.h
#     tests/check_sections.sh HEADER public     also lists the public
#                                               functions used that way

cd "$(dirname "$0")/.." || exit 1

awk -v public="$2" '
BEGIN {
    n_order = split("BASE JSON SSE LOOP TASK EXEC RUN CALL HTTP SOCK CURL " \
                    "REPLAY WIRE CHAT AGENT KIT", order, " ")
    for (i = 1; i <= n_order; i++) rank[order[i]] = i
    sec = 0; part = "public"; last = 0
    passed = failed = 0
}

function fail(text) {
    if (!(text in told)) {
        told[text] = 1
        failed++
        print "  FAILED: " text
    }
}

# Names with code text in them: what is used here.
function uses(text, where,   name) {
    while (match(text, /[A-Za-z_][A-Za-z0-9_]*/)) {
        name = substr(text, RSTART, RLENGTH)
        text = substr(text, RSTART + RLENGTH)
        if (name ~ /^(llmcbi_|LLMCBI_)/ ||
            (public != "" && name ~ /^llmcb_/ && text ~ /^ *\(/)) {
            n_uses++
            use_name[n_uses] = name
            use_sec[n_uses] = sec
            use_line[n_uses] = where
        }
    }
}

# The first section that defines a name counts.
function defines(name) {
    if (name != "" && !(name in def)) def[name] = sec
}

function last_name(text,   name) {
    name = ""
    while (match(text, /(llmcbi_|LLMCBI_)[A-Za-z0-9_]*/)) {
        name = substr(text, RSTART, RLENGTH)
        text = substr(text, RSTART + RLENGTH)
    }
    return name
}

# A declaration outside of all braces has come to its { or ;.
function declaration(text, ending,   name, head) {
    gsub(/[ \t]+/, " ", text)
    sub(/^ /, "", text)
    if (text == "") return
    if (ending == "{" && text ~ /(struct|union|enum)( [A-Za-z0-9_]+)? ?$/) {
        in_enum = text ~ /enum( [A-Za-z0-9_]+)? ?$/
        is_typedef = text ~ /^typedef /
        if (text ~ /(struct|union|enum) llmcbi_[A-Za-z0-9_]+ ?$/)
            defines(last_name(text))
        after_body = 1
        return
    }
    if (index(text, "=") > 0) {
        head = substr(text, 1, index(text, "=") - 1)
        defines(last_name(head))
        return
    }
    if (ending == "{") {
        if (match(text, /llmcbi?_[A-Za-z0-9_]+ ?\(/)) {
            name = substr(text, RSTART, RLENGTH)
            sub(/ ?\($/, "", name)
            defines(name)
        }
        return
    }
    if (text ~ /^typedef /) {
        if (match(text, /\( ?\* ?llmcbi_[A-Za-z0-9_]+ ?\)/)) {
            defines(last_name(substr(text, RSTART, RLENGTH)))
            return
        }
        name = last_name(text)
        # "typedef struct x x;" defines nothing: that is forward.
        if (text !~ ("(struct|union|enum) " name " " name "$")) defines(name)
        return
    }
    # The name of a static table without a value; not a prototype.
    if (text !~ /\(/ && text ~ /^static /) defines(last_name(text))
}

# Takes comments, strings and characters out of a line.
function code_of(line,   out, c, i, n, two) {
    out = ""
    n = length(line)
    for (i = 1; i <= n; i++) {
        c = substr(line, i, 1)
        two = substr(line, i, 2)
        if (in_comment) {
            if (two == "*/") { in_comment = 0; i++ }
        } else if (two == "/*") {
            in_comment = 1
            out = out " "
            i++
        } else if (c == "\"" || c == "\047") {
            for (i++; i <= n && substr(line, i, 1) != c; i++)
                if (substr(line, i, 1) == "\\") i++
            out = out "0"
        } else {
            out = out c
        }
    }
    return out
}

/^#endif \/\* LLMCB_H \*\// { part = "guard"; last = 0; next }
part == "guard" && /^#if.*LLMCB_IMPLEMENTATION/ { part = "implementation" }

/^\/\* ==== \[[A-Z]+\]/ {
    tag = $0
    sub(/^\/\* ==== \[/, "", tag)
    sub(/\].*/, "", tag)
    if (!(tag in rank)) {
        fail("line " NR ": [" tag "] is no section")
    } else if (rank[tag] <= last) {
        fail("line " NR ": [" tag "] comes after [" order[last] "]")
    } else {
        last = rank[tag]
        if (part == "implementation") {
            sec = last
            seen[sec] = 1
        }
    }
    next
}

part == "implementation" {
    if (match($0, /\* upward: [A-Za-z0-9_, ]+\*\//)) {
        text = substr($0, RSTART + 10, RLENGTH - 12)
        n = split(text, names, /[ ,]+/)
        for (i = 1; i <= n; i++)
            if (names[i] != "") {
                allowed[sec, names[i]] = NR
                n_allowed++
            }
    }
    in_directive = continued
    continued = /\\$/
    code = code_of($0)
    if (code ~ /^[ \t]*#/) in_directive = 1
    if (in_directive) {
        if (match(code, /^[ \t]*#[ \t]*define[ \t]+[A-Za-z0-9_]+/)) {
            name = substr(code, RSTART, RLENGTH)
            sub(/^.*[ \t]/, "", name)
            if (name ~ /^(llmcbi_|LLMCBI_)/) defines(name)
        }
        uses(code, NR)
        if (!/\\$/) continued = 0
        next
    }
    uses(code, NR)
    # Branches of #if may each open a brace; a brace in the first column
    # closes whatever is open.
    if (code ~ /^[}]/) {
        depth = 0
        if (after_body) acc = is_typedef ? "typedef int" : ""
        else acc = ""
        sub(/^[}]/, "", code)
        in_enum = 0
    }
    if (code ~ /^extern 0 [{]/) next
    n = length(code)
    for (i = 1; i <= n; i++) {
        c = substr(code, i, 1)
        if (depth == 0) {
            if (c == "{") {
                after_body = 0
                declaration(acc, "{")
                acc = ""
                depth = 1
                fresh = 1
            } else if (c == ";") {
                declaration(acc, ";")
                acc = ""
                after_body = 0
            } else if (c != "}") {
                acc = acc c
            }
        } else if (c == "{") {
            depth++
        } else if (c == "}") {
            depth--
            if (depth == 0) {
                in_enum = 0
                acc = after_body && is_typedef ? "typedef int " : ""
            }
        } else if (in_enum && depth == 1) {
            if (c == ",") fresh = 1
            else if (fresh && c ~ /[A-Za-z_]/) {
                match(substr(code, i), /^[A-Za-z0-9_]+/)
                name = substr(code, i, RLENGTH)
                if (name ~ /^LLMCBI_/) defines(name)
                i += RLENGTH - 1
                fresh = 0
            }
        }
    }
    if (depth == 0 && acc != "") acc = acc " "
}

END {
    if (part != "implementation") {
        print "  skipped: sections: there is no implementation"
        print "check_sections: 0 passed, 0 failed, 1 skipped"
        exit 0
    }
    for (i = 1; i <= n_uses; i++) {
        name = use_name[i]
        if (!(name in def)) {
            # Includes the guards that only a program defines.
            if (name ~ /^llmcbi_/ && !(name in unknown)) {
                unknown[name] = 1
                print "  note: line " use_line[i] ": " name \
                    " is used, but no definition was recognised"
            }
            continue
        }
        if (def[name] <= use_sec[i]) continue
        if ((use_sec[i], name) in allowed) {
            taken[use_sec[i], name] = 1
            continue
        }
        if (name ~ /^llmcb_/) {
            print "  public: line " use_line[i] ": [" order[use_sec[i]] \
                "] uses " name " of [" order[def[name]] "]"
            continue
        }
        bad[use_sec[i]] = 1
        key = use_sec[i] SUBSEP name
        if (!(key in once)) {
            once[key] = 1
            fail("line " use_line[i] ": [" \
                (use_sec[i] ? order[use_sec[i]] : "head") "] uses " name \
                " of [" order[def[name]] "]")
        }
    }
    for (k in allowed)
        if (!(k in taken)) {
            split(k, pair, SUBSEP)
            fail("line " allowed[k] ": the exception for " pair[2] \
                " is not needed")
        }
    for (i = 1; i <= n_order; i++)
        if (seen[i] && !bad[i]) passed++
    if (n_allowed)
        print "  " n_allowed " documented upward uses"
    print "check_sections: " passed " passed, " failed " failed, 0 skipped"
    exit failed > 0
}' "${1:-llmcb.h}"
