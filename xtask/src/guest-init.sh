#!/bin/sh
# PID 1 of the lab's guest, run by busybox on the host's root: gives it two DAX file systems, a DAX
# device and a soft NIC, runs the command, reports its status and powers off. Whatever can't be set up ends
# the boot with "init: failure": a test never runs on less than it asked for.
lab=$(dirname "$0")
# shellcheck source=/dev/null
. "$lab/settings.sh"
PATH=$lab/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

bb() { "$lab/busybox" "$@"; }

power_off() {
    echo o >/proc/sysrq-trigger
    while :; do bb sleep 60; done
}

fail() {
    echo "init: failure: $*" >/dev/console
    power_off
}

mount_or_fail() { bb mount "$@" || fail "mount $* says no"; }

# For modules that the initramfs does not bring, by name or on the kernel's demand. The host's
# modprobe configuration is about another kernel: -C and -i leave it out.
write_modprobe() {
    bb mkdir -p "$lab/bin"
    cat >"$lab/bin/modprobe" <<END
#!/bin/sh
exec $HOST_MODPROBE -C /dev/null -d '$MODULE_TREE' -S '$(bb uname -r)' -i "\$@"
END
    bb chmod 755 "$lab/bin/modprobe"
    echo "$lab/bin/modprobe" >/proc/sys/kernel/modprobe
}

# `newer-rdma-core COMMAND` runs it on the libraries that the host may not have: they lie over the
# host's, in a mount namespace of the command's own. libibverbs knows its providers by absolute paths,
# so another place would not do.
write_newer_rdma_core() {
    cat >"$lab/bin/newer-rdma-core" <<END
#!/bin/sh
exec $lab/busybox unshare -m /bin/sh -c '
    $lab/busybox mount -t overlay -o "ro,lowerdir=$NEWER_RDMA_CORE:$HOST_LIBRARIES" \
        newer-rdma-core $HOST_LIBRARIES || exit 126
    exec "\$@"' newer-rdma-core "\$@"
END
    bb chmod 755 "$lab/bin/newer-rdma-core"
}

mount_system() {
    mount_or_fail -t proc proc /proc
    mount_or_fail -t sysfs sys /sys
    mount_or_fail -t devtmpfs dev /dev
    bb mkdir -p /dev/pts /dev/shm
    mount_or_fail -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
    mount_or_fail -t tmpfs -o mode=1777 shm /dev/shm
    for dir in $EXTRA_TMPFS; do
        mount_or_fail -t tmpfs -o mode=755 tmpfs "$dir"
    done
    bb mkdir -p "$LAB_BASE/ext4" "$LAB_BASE/xfs" "$LAB_BASE/disk" "$LAB_BASE/tmp"
    bb chmod 1777 "$LAB_BASE/tmp"
}

# A virtio port by its name.
port() {
    for dir in /sys/class/virtio-ports/*; do
        if [ "$(cat "$dir/name" 2>/dev/null)" = "$1" ]; then
            echo "/dev/${dir##*/}"
            return
        fi
    done
    fail "no virtio port $1"
}

# Where a power cut is to show what was not flushed, nothing is flushed by the kernel's own clock
# (ext4(5), commit; Documentation/admin-guide/xfs.rst, xfssyncd_centisecs; sysctl/vm.rst,
# dirty_writeback_centisecs).
SELDOM=commit=3000
flush_seldom() {
    echo 300000 >/proc/sys/fs/xfs/xfssyncd_centisecs || fail "no xfssyncd_centisecs"
    echo 0 >/proc/sys/vm/dirty_writeback_centisecs || fail "no dirty_writeback_centisecs"
}

# A file system by the command that makes it; one that an earlier guest has left stays as it is.
make_on() {
    device=$1
    shift
    # Drivers find their devices in the background.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ -b "$device" ] && break
        bb sleep 1
    done
    [ -b "$device" ] || fail "no device $device"
    [ "$STORAGE" = used ] || "$@" "$device" >/dev/null || fail "$1 fails on $device"
}

dax_mount() {
    device=$1 type=$2 dir=$3
    shift 3
    make_on "$device" "$@"
    options=dax=always
    [ "$type" = ext4 ] && [ -n "$STORAGE" ] && options=$options,$SELDOM
    bb mount -t "$type" -o "$options" "$device" "$dir" || fail "$type on $device takes no DAX"
    bb grep -q "^$device $dir $type .*dax=always" /proc/mounts || fail "$type on $device is not DAX"
}

add_pmem() {
    dax_mount /dev/pmem0 ext4 "$LAB_BASE/ext4" mkfs.ext4 -q -F -b 4096
    dax_mount /dev/pmem1 xfs "$LAB_BASE/xfs" mkfs.xfs -q -f
}

# A disk, for what is not DAX: only with storage that outlives the guest.
add_disk() {
    "$lab/bin/modprobe" virtio_blk || fail "module virtio_blk does not load"
    make_on /dev/vda mkfs.ext4 -q -F
    mount_or_fail -t ext4 -o "$SELDOM" /dev/vda "$LAB_BASE/disk"
}

# What `ndctl create-namespace -m devdax` does: the namespace is taken from the block device's driver
# and given to the region's seed (drivers/nvdimm/dax_devs.c). `ram`: what the kernel notes about each
# page is in memory, so that all but the first 2 MiB are the device's.
add_devdax() {
    echo namespace2.0 >/sys/bus/nd/drivers/nd_pmem/unbind || fail "namespace2.0 is not free"
    seed=$(cat /sys/bus/nd/devices/region2/dax_seed)
    for setting in mode=ram align=2097152 "uuid=$(cat /proc/sys/kernel/random/uuid)" \
        namespace=namespace2.0; do
        echo "${setting#*=}" >"/sys/bus/nd/devices/$seed/${setting%%=*}" ||
            fail "$seed takes no $setting"
    done
    echo "$seed" >/sys/bus/nd/drivers/dax_pmem/bind || fail "dax_pmem does not take $seed"
    [ -c "$LAB_DEVDAX" ] || fail "no device $LAB_DEVDAX"
}

add_nic() {
    ip link set lo up || fail "lo does not come up"
    if [ "$HOSTS" = 2 ]; then
        add_hosts
        return
    fi
    rdma link add rxe0 type rxe netdev lo || fail "rxe0 can't be added on lo"
    [ -e /sys/class/infiniband/rxe0 ] || fail "rxe0 is not there"
}

# busybox's shell takes its own ip before any other, and that knows no namespaces.
# Two network namespaces, a wire between them, a soft NIC in each. The wire takes whole pages: with
# less, rxe misplaces on-demand data.
add_hosts() {
    bb mkdir -p /run/netns
    for host in a b; do
        "$HOST_IP" netns add "$host" || fail "no network namespace $host"
    done
    "$HOST_IP" link add wire-a type veth peer name wire-b || fail "no veth pair"
    number=1
    for host in a b; do
        "$HOST_IP" link set "wire-$host" netns "$host" mtu 4300 || fail "wire-$host does not move"
        "$HOST_IP" -n "$host" link set lo up
        "$HOST_IP" -n "$host" addr add "10.78.0.$number/24" dev "wire-$host" &&
            "$HOST_IP" -n "$host" link set "wire-$host" up || fail "wire-$host does not come up"
        number=$((number + 1))
    done
    for host in a b; do
        "$HOST_IP" netns exec "$host" rdma link add "rxe-$host" type rxe netdev "wire-$host" ||
            fail "rxe-$host can't be added"
        [ -e "/sys/class/infiniband/rxe-$host" ] || fail "rxe-$host is not there"
    done
}

# Output goes through fifos: a program can then open /dev/stdout again, which a port refuses.
run_command() {
    bb mkfifo "$lab/out" "$lab/err"
    bb cat "$lab/out" >&4 3>&- 5>&- &
    cats=$!
    bb cat "$lab/err" >&5 3>&- 4>&- &
    cats="$cats $!"
    echo started >&3
    "$lab/busybox" setsid /bin/sh "$lab/command.sh" \
        </dev/null >"$lab/out" 2>"$lab/err" 3>&- 4>&- 5>&- &
    wait $!
    status=$?
    end_leftovers
    # A process stuck in the kernel may hold a fifo open for ever.
    # shellcheck disable=SC2086 # two process ids
    (bb sleep 5 && kill $cats) 2>/dev/null &
    for cat in $cats; do wait "$cat"; done
    printf '%s' "$END_MARK" >&4
    printf '%s' "$END_MARK" >&5
}

# What the command left running would hold its output open.
end_leftovers() {
    for dir in /proc/[0-9]*; do
        pid=${dir#/proc/}
        case " 1 $cats " in *" $pid "*) continue ;; esac
        # Kernel threads have no program.
        [ -e "$dir/exe" ] && kill -9 "$pid" 2>/dev/null
    done
}

run_shell() {
    echo started >&3
    bb setsid /bin/sh -c "exec /bin/sh '$lab/command.sh' <>/dev/hvc0 >&0 2>&1" 3>&-
    status=$?
}

mount_system
write_modprobe
write_newer_rdma_core
exec 3<>"$(port pinfold.control)"
bb hostname pinfold-lab
add_pmem
if [ -n "$STORAGE" ]; then
    flush_seldom
    add_disk
else
    add_devdax
fi
add_nic
echo 1 >/sys/devices/system/cpu/cpu1/online || fail "the second processor does not come up"
echo "$LEASE_BREAK_TIME" >/proc/sys/fs/lease-break-time
ulimit -l unlimited
ulimit -c 0
if [ "$MODE" = shell ]; then
    run_shell
else
    exec 4>"$(port pinfold.stdout)" 5>"$(port pinfold.stderr)"
    run_command
fi
echo "status $status" >&3
# The host answers when it has read everything.
read -r _ <&3
echo "init: success"
power_off
