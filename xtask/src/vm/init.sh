#!/bin/busybox sh
# PID 1 of the guest: makes a node-like root, runs /vm/command, reports its exit code, resets.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
bb=/bin/busybox

$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
$bb mkdir -p /dev/pts /dev/shm /dev/net
$bb mount -t devpts -o ptmxmode=666 devpts /dev/pts
$bb mount -t tmpfs tmpfs /dev/shm
$bb mount -t tmpfs tmpfs /run
$bb mount -t bpf bpf /sys/fs/bpf
$bb mount -t cgroup2 cgroup2 /sys/fs/cgroup
$bb mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
$bb mkdir -p /run/netns /run/lock
# Opening the node loads the module.
[ -e /dev/net/tun ] || $bb mknod /dev/net/tun c 10 200
$bb ln -s /proc/self/fd /dev/fd
$bb ln -s /proc/mounts /etc/mtab
$bb hostname guest
$bb ip link set lo up
$bb modprobe -qa virtio_pci virtio_console veth ipvlan sch_ingress cls_bpf 2>/dev/null

# Port 1 carries the command's output, port 2 its result.
if [ ! -c /dev/vport0p2 ]; then
    echo "init: this kernel shows no virtio-serial port" >/dev/console
    $bb reboot -f
fi
$bb setsid /bin/sh /vm/command </dev/null >/dev/vport0p1 2>&1
echo "EXIT:$?" >/dev/vport0p2
# QEMU was started with -no-reboot, so a reset ends it at once.
exec $bb reboot -f
