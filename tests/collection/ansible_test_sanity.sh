#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# `ansible-test sanity` on the collection: ansible_test_sanity.sh [ansible-test arguments]
#
# ansible-test wants a real folder at ansible_collections/ppec/cloud and litters it, so it gets a copy; and it would
# download its own pip, so it is given a script that takes Python's. What it needs otherwise comes from the package index.
# The folder is kept: its virtual environments make the next run quick.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${PPEC_SANITY_DIR:-$root/build/sanity}
collection=$work/ansible_collections/ppec/cloud
mkdir -p "$work/home/.ansible/test/cache" "$work/ansible_collections/ppec"
# 2.19 asks for 24.2, 2.21 for 25.2.
for version in 24_2 25_2; do
    printf 'import ensurepip\nensurepip.bootstrap(default_pip=True)\n' >"$work/home/.ansible/test/cache/get_pip_$version.py"
done
rm -rf "$collection"
cp -aT "$root/collections/ppec" "$collection"
find "$collection" -name __pycache__ -prune -exec rm -rf {} +
# Inside a git checkout that ignores build/, ansible-test would find no files: the root is named, and git kept away.
export HOME="$work/home" PATH="$root/.venv/bin:$PATH" ANSIBLE_TEST_CONTENT_ROOT="$collection" GIT_CEILING_DIRECTORIES="$work"
cd "$collection"
exec ansible-test sanity --python 3.11 --color no "$@"
