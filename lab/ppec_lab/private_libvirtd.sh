#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# First process of a private libvirtd's namespaces; started by private_libvirtd.py through unshare(1).
# Argument 1: a directory with etc/ (becomes /etc/libvirt) and cache/ (becomes /var/cache/libvirt).
# Prints its process id as seen from outside once the mounts stand, then lives until its standard input ends:
# when the starter is gone, however it went, the whole PID namespace goes with this shell.
set -eu
base=$1
# /proc is still the outer one here, so this is the id by which the outside knows this shell.
read -r outer_pid _ </proc/self/stat
mount --make-rprivate /
mount -t proc proc /proc
mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt
for dir in /run/libvirt /var/lib/libvirt /var/log/libvirt; do
    mount -t tmpfs -o mode=755 ppec-lab "$dir"
done
mount --bind "$base/etc" /etc/libvirt
mount --bind "$base/cache" /var/cache/libvirt
if [ "${2-}" = own-network ]; then
    # libvirt finds bridges in /sys/class/net, and a sysfs shows the network namespace it was mounted in. What was
    # mounted below /sys (control groups, security) is carried over.
    mkdir /run/libvirt/sys
    mount --rbind /sys /run/libvirt/sys
    mount -t sysfs sysfs /sys
    mount --rbind /run/libvirt/sys/fs/cgroup /sys/fs/cgroup
    umount -l /run/libvirt/sys
    rmdir /run/libvirt/sys
    ip link set lo up
fi
exec 3<&0
printf '%s\n' "$outer_pid"
# Not exec: this shell reaps what the daemons leave behind. It waits in the background for the end of its input.
cat <&3 >/dev/null &
wait $!
