/**
 * What runs inside the lab VM: the script that its init hands over to, and small programs on its PATH.
 *
 * @module
 */

/** What the start script is made from. */
export interface StartRequest {
  /** Program and arguments. */
  command: readonly string[];
  /** Modules with parameters, in load order. */
  modules: readonly string[];
  /** Shell lines before the command. */
  setup: readonly string[];
  /** The command's environment. */
  env: Readonly<Record<string, string>>;
  /** Path of the checkout, on the host and in the VM. */
  checkout: string;
  /** Path of Deno's cache, on the host and in the VM. */
  denoDir: string;
  /** File name of the Deno binary in its share. */
  denoName: string;
  /** The time now. */
  epochSeconds: number;
  /** After this the VM ends itself. */
  lifetimeSeconds: number;
}

/** A word as the shell reads it back. */
export function quote(word: string): string {
  return `'${word.replaceAll("'", `'\\''`)}'`;
}

/** /lab/start.sh, which runs as process 1 and never returns. */
export function startScript(request: StartRequest): string {
  const env = Object.entries(request.env).map(([name, value]) => `export ${name}=${quote(value)}`);
  const denoDir = quote(request.denoDir);
  const checkout = quote(request.checkout);
  return `export PATH=/lab/bin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root NO_COLOR=1 LC_ALL=C.UTF-8 TERM=dumb
export DENO_DIR=${denoDir} DENO_NO_UPDATE_CHECK=1 SVQ_IN_LAB=1
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mkdir -p /usr/local/bin /dev/shm /dev/pts /run/deno/lower /run/deno/upper /run/deno/work /opt/deno ${denoDir} ${checkout}
mount -t tmpfs tmpfs /dev/shm
mount -t devpts pts /dev/pts
ln -sfn /proc/self/fd /dev/fd
ip link set lo up
p=ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose
mount -t 9p -o $p checkout ${checkout}
mount -t 9p -o $p denohome /opt/deno
ln -sfn /opt/deno/${quote(request.denoName)} /usr/local/bin/deno
mount -t 9p -o $p denodir /run/deno/lower
mount -t overlay -o lowerdir=/run/deno/lower,upperdir=/run/deno/upper,workdir=/run/deno/work overlay ${denoDir}
# The host's Deno may be writing to its databases; new ones are made here.
rm -f ${denoDir}/*_cache_v*
(sleep ${request.lifetimeSeconds}; echo b > /proc/sysrq-trigger) &
# A saved machine's clock stands where it was saved.
date -s @${request.epochSeconds} > /dev/null
(n=0; while sleep 1; do n=$((n + 1)); echo $n > /lab/alive; done) &
lab_alive=$!
echo LAB-BOOTED
cat > /run/prepare <<'LAB-END'
set -e
${request.modules.map((module) => `modprobe ${module}`).join("\n")}
${request.setup.join("\n")}
LAB-END
cd ${checkout}
${env.join("\n")}
export LAB_ALIVE_PID=$lab_alive
bash /run/prepare > /lab/stdout 2> /lab/stderr < /dev/null
code=$?
if [ $code = 0 ]; then
  ${request.command.map(quote).join(" ")} >> /lab/stdout 2>> /lab/stderr < /dev/null
  code=$?
fi
dmesg > /lab/dmesg
echo $code > /lab/code.new
mv /lab/code.new /lab/code
echo b > /proc/sysrq-trigger
sleep 60
`;
}

/** Programs on the VM's PATH, by name. */
export function labPrograms(): Record<string, string> {
  return {
    // lab-vp SLOT NAME: gives a virtio PCI device to vp_vdpa and makes the vDPA device NAME of it.
    "lab-vp": `#!/bin/bash
set -e
address=0000:00:$1.0
device=/sys/bus/pci/devices/$address
if [ -e $device/driver ]; then echo $address > $device/driver/unbind; fi
echo vp-vdpa > $device/driver_override
echo $address > /sys/bus/pci/drivers/vp-vdpa/bind
vdpa dev add name "$2" mgmtdev pci/$address
`,
    // lab-vduse NAME FILE: a VDUSE block device on a raw file, which others may have too, served by qemu-storage-daemon in the background.
    "lab-vduse": `#!/bin/bash
set -e
qemu-storage-daemon --daemonize --pidfile /run/vduse-$1.pid --blockdev driver=file,node-name=f,locking=off,filename="$2" \\
  --export type=vduse-blk,id=e,name=$1,node-name=f,writable=on,num-queues=2
vdpa dev add name "$1" mgmtdev vduse
`,
    // lab-qmp COMMAND [ARGUMENTS]: one QMP command to the QEMU that runs this VM; prints the answer. ARGUMENTS is JSON.
    "lab-qmp": `#!/bin/bash
set -e
for port in /sys/class/virtio-ports/*; do
  if [ "$(cat $port/name)" = qmp ]; then exec 3<> /dev/\${port##*/}; fi
done
# A monitor accepts the same negotiation once; a later one is answered with an error, which is skipped too.
echo '{"execute":"qmp_capabilities","id":"open"}' >&3
if [ -z "$2" ]; then set -- "$1" "{}"; fi
echo '{"execute":"'"$1"'","arguments":'"$2"',"id":"ask"}' >&3
while read -r -t 10 line <&3; do
  case $line in *'"id": "ask"'*) echo "$line"; case $line in *'"error"'*) exit 1 ;; *) exit 0 ;; esac ;; esac
done
exit 124
`,
  };
}
