#!/bin/sh
# A fleet CA and certificates made with openssl alone, as a site with its own CA would: $1 is the folder, the rest are
# the identities, such as host/host1. Writes <name>.pem and <name>.key for each; what exists is kept.
set -eu
umask 077
mkdir -p "$1"
cd "$1"
shift

key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

if [ ! -e ca.pem ]; then
    key ca.key
    openssl req -x509 -new -key ca.key -days 30 -subj "/CN=Lab fleet CA" -out ca.pem \
        -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign
fi
for identity in "$@"; do
    name=${identity#*/}
    [ -e "$name.pem" ] && continue
    key "$name.key"
    printf '%s\n' "subjectAltName=URI:ppec://$identity,DNS:$name" extendedKeyUsage=serverAuth,clientAuth \
        basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature >"$name.ext"
    openssl req -new -key "$name.key" -subj "/CN=$name" |
        openssl x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile "$name.ext" -out "$name.pem" \
            2>/dev/null
done
