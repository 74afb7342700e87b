#!/bin/busybox sh
# /init of the lab's initramfs: mounts the host's root read-only, then goes on there.
bb=/bin/busybox
# shellcheck source=/dev/null
. /lab/settings.sh

fail() {
    echo "init: failure: $*"
    echo o >/proc/sysrq-trigger
    $bb sleep 60
}

$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
while read -r module; do
    $bb insmod "/modules/$module.ko" || fail "module $module does not load"
done </modules/order
$bb mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /root ||
    fail "the host's root does not mount over 9p"
# The one folder of the host that the guest hides.
$bb mount -t tmpfs -o mode=755 lab "/root$LAB_BASE" || fail "no tmpfs on $LAB_BASE"
$bb cp -a /lab "/root$LAB_BASE/lab" || fail "cannot copy the guest's init"
$bb umount /proc /dev
exec $bb switch_root /root "$LAB_BASE/lab/busybox" sh "$LAB_BASE/lab/guest-init.sh"
