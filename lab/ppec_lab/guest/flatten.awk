# SPDX-License-Identifier: Apache-2.0
# Flattens a small YAML or JSON document into lines "path<TAB>value", for example
#   /ethernets/net0/addresses/0<TAB>10.1.0.9/24
# It reads what a NoCloud seed holds in practice: block mappings and sequences, quoted and plain scalars, flow
# collections on one line, and whole JSON documents. It never runs anything it reads.

function emit(path, value) {
    gsub(/[\t\r\n]/, " ", value)
    print path "\t" value
}

function skip_blank() {
    while (pos <= length(text) && substr(text, pos, 1) ~ /[ \t\r\n]/) pos++
}

# One quoted scalar at `pos`; leaves `pos` behind the closing quote.
function quoted(    mark, out, c) {
    mark = substr(text, pos, 1)
    out = ""
    for (pos++; pos <= length(text); pos++) {
        c = substr(text, pos, 1)
        if (c == mark) {
            if (mark == "'" && substr(text, pos + 1, 1) == "'") {
                out = out "'"
                pos++
                continue
            }
            pos++
            return out
        }
        if (c == "\\" && mark == "\"") {
            pos++
            c = substr(text, pos, 1)
        }
        out = out c
    }
    return out
}

function plain_until(stop,    start) {
    start = pos
    while (pos <= length(text) && !index(stop, substr(text, pos, 1))) pos++
    return trimmed(substr(text, start, pos - start))
}

function trimmed(s) {
    sub(/^[ \t\r\n]+/, "", s)
    sub(/[ \t\r\n]+$/, "", s)
    return s
}

# A plain key ends at a colon followed by a blank, so that "a:b" stays one word.
function flow_key(    c, start) {
    skip_blank()
    c = substr(text, pos, 1)
    if (c == "\"" || c == "'") {
        start = quoted()
        skip_blank()
        pos++
        return start
    }
    start = plain_until(":")
    pos++
    return start
}

# Any flow value at `pos`: {..}, [..], quoted or plain.
function flow(path,    c, n, key) {
    skip_blank()
    c = substr(text, pos, 1)
    if (c == "{" || c == "[") {
        pos++
        n = 0
        while (pos <= length(text)) {
            skip_blank()
            if (substr(text, pos, 1) ~ /[]}]/) {
                pos++
                return
            }
            if (substr(text, pos, 1) == ",") {
                pos++
                continue
            }
            key = c == "{" ? flow_key() : n++
            flow(path "/" key)
        }
    } else if (c == "\"" || c == "'") {
        emit(path, quoted())
    } else {
        emit(path, plain_until(",]}"))
    }
}

function scalar_or_flow(path, value) {
    if (value ~ /^[[{"']/) {
        text = value
        pos = 1
        flow(path)
    } else {
        sub(/[ \t]+#.*$/, "", value)
        emit(path, trimmed(value))
    }
}

# Splits "key: rest" of a block line into the globals `key` and `rest`; false when the line is no mapping entry.
function split_entry(line,    at) {
    if (line ~ /^["']/) {
        text = line
        pos = 1
        key = quoted()
        rest = substr(line, pos)
        if (rest !~ /^[ \t]*:([ \t]|$)/) return 0
        sub(/^[ \t]*:/, "", rest)
    } else {
        if (line ~ /^[[{]/ || !match(line, /:([ \t]|$)/)) return 0
        key = trimmed(substr(line, 1, RSTART - 1))
        rest = substr(line, RSTART + 1)
    }
    rest = trimmed(rest)
    return 1
}

# The innermost open collection that is still open for content at this indent.
function close_to(indent) {
    while (depth > 0 && level[depth] >= indent) depth--
}

function block_line(line,    indent, path) {
    match(line, /^ */)
    indent = RLENGTH
    line = substr(line, indent + 1)
    while (line ~ /^-([ \t]|$)/) {
        # A sequence may stand at its key's own indent, so only deeper levels and other items end here.
        while (depth > 0 && (level[depth] > indent || (level[depth] == indent && is_item[depth]))) depth--
        path = path_at[depth]
        depth++
        level[depth] = indent
        is_item[depth] = 1
        path_at[depth] = path "/" (items[path] + 0)
        items[path]++
        match(line, /^-[ \t]*/)
        indent += RLENGTH
        line = substr(line, RLENGTH + 1)
        if (line == "") return
        if (!split_entry(line)) {
            scalar_or_flow(path_at[depth], line)
            return
        }
    }
    close_to(indent)
    if (!split_entry(line)) return
    path = path_at[depth] "/" key
    if (rest == "" || rest ~ /^#/) {
        depth++
        level[depth] = indent
        is_item[depth] = 0
        path_at[depth] = path
    } else {
        scalar_or_flow(path, rest)
    }
}

{ lines[NR] = $0 }

END {
    whole = ""
    for (i = 1; i <= NR; i++) whole = whole lines[i] "\n"
    if (whole ~ /^[ \t\r\n]*\{/) {
        text = whole
        pos = 1
        flow("")
    } else {
        depth = 0
        path_at[0] = ""
        for (i = 1; i <= NR; i++) {
            sub(/\r$/, "", lines[i])
            if (lines[i] !~ /^[ \t]*(#.*)?$/ && lines[i] !~ /^(---|\.\.\.)/) block_line(lines[i])
        }
    }
}
