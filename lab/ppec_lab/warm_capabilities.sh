#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the libvirtd of the tree given as argument 1 just long enough to fill its /var/cache/libvirt.
# Started by host_tree.py in namespaces of its own; all that is mounted or started here ends with this shell.
set -eu
tree=$1
mount --make-rprivate /
mount --rbind /dev "$tree/dev"
mount -t proc proc "$tree/proc"
mount -t sysfs sysfs "$tree/sys"
for dir in run var/log var/lib/libvirt; do
    mount -t tmpfs -o mode=755 ppec-lab "$tree/$dir"
done
mkdir -p "$tree/var/log/libvirt"
chroot "$tree" libvirtd --daemon
chroot "$tree" virsh -c qemu:///system capabilities >/dev/null
