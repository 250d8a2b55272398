# SPDX-License-Identifier: Apache-2.0
# Turns a flattened network-config v2 into lines of tab-separated words that init carries out in order:
#   address <nic> <address/length>     route <nic> <to> <via>     dns <nic> <server>
# where <nic> is a MAC address, or an interface's name when the entry matches none.
BEGIN { FS = "\t" }

{
    path = $1
    sub(/^\/network/, "", path)
    count = split(path, part, "/")
    # part[1] is empty: the path starts with a slash.
    if (part[2] != "ethernets" || count < 4) next
    id = part[3]
    if (!(id in nic)) {
        nic[id] = id
        order[++nics] = id
    }
    what = part[4]
    if (what == "match" && part[5] == "macaddress") nic[id] = tolower($2)
    else if (what == "addresses") add(id, "address", $2, "")
    else if (what == "gateway4") add(id, "route", "0.0.0.0/0", $2)
    else if (what == "gateway6") add(id, "route", "::/0", $2)
    else if (what == "nameservers" && part[5] == "addresses") add(id, "dns", $2, "")
    else if (what == "routes") {
        route_id[id, part[5]] = 1
        if (part[6] == "to") to[id, part[5]] = $2
        if (part[6] == "via") via[id, part[5]] = $2
        if (part[5] + 1 > routes[id]) routes[id] = part[5] + 1
    }
}

function add(id, verb, first, second) {
    lines[id, verb] = lines[id, verb] verb SUBSEP first SUBSEP second "\n"
}

# The addresses of a NIC come first: a route's gateway must be reachable when the route is set.
function print_lines(id, verb,    n, i, row, word) {
    n = split(lines[id, verb], row, "\n")
    for (i = 1; i < n; i++) {
        split(row[i], word, SUBSEP)
        print word[1] "\t" nic[id] "\t" word[2] (word[3] == "" ? "" : "\t" word[3])
    }
}

END {
    for (i = 1; i <= nics; i++) {
        id = order[i]
        for (r = 0; r < routes[id]; r++) {
            target = to[id, r]
            if (target == "default" || target == "0/0") target = index(via[id, r], ":") ? "::/0" : "0.0.0.0/0"
            if (target != "") add(id, "route", target, via[id, r])
        }
        print_lines(id, "address")
        print_lines(id, "route")
        print_lines(id, "dns")
    }
}
