#!/bin/busybox sh
# PID 1 of the lab's guest. The kernel command line chooses what runs:
#   svq.run=workload|shell   the checked disk workload, or a shell on the serial line (default: shell)
#   svq.args=a=1,b=2         arguments of the workload, separated by commas
#   svq.modules=disk,net     module lists to load besides the virtio bus (default: disk)
#   svq.end=off|stay         after the workload: power off (default), or a shell
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
$B --install -s /bin
export PATH=/bin HOME=/
stty -F /dev/ttyS0 -echo raw 2>/dev/null

option() {
  for word in $(cat /proc/cmdline); do
    case "$word" in "$1="*) echo "${word#*=}"; return;; esac
  done
  echo "$2"
}

for list in base $(option svq.modules disk | tr , ' '); do
  while read -r name; do
    [ -d "/sys/module/$name" ] || insmod "/lib/$name.ko" || echo "GUEST module $name failed"
  done < "/lib/$list.modules"
done

echo "GUEST up $(cut -d' ' -f1 /proc/uptime)"
case "$(option svq.run shell)" in
  workload)
    # shellcheck disable=SC2046
    svq_guest $(option svq.args "" | tr , ' ')
    echo "GUEST workload ended with $?"
    ;;
  *) stay=1 ;;
esac
if [ "${stay:-}" = 1 ] || [ "$(option svq.end off)" = stay ]; then
  stty -F /dev/ttyS0 icanon icrnl opost onlcr 2>/dev/null
  PS1='' setsid cttyhack sh
fi
sync
poweroff -f
