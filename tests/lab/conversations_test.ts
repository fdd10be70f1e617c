// What real front-ends say to a relay in a device's life, compared with what was recorded (SVQ_RECORD=1 records anew).
import { startVirtiofsd } from "../support/daemons.ts";
import { assertConversation } from "../support/conversation.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { VirtioUser } from "../support/virtio_user.ts";
import { startTestpmd, startVm } from "../support/vm.ts";

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `the conversations of QEMU ${qemu} about a disk, a network card and a file system are the recorded ones`,
    [`qemu-${qemu}`, "guest", "dpdk", "virtiofsd"],
    async ({ folder }) => {
      const [net, fs, share] = [folder.join("net.device"), folder.join("fs.device"), folder.join("share")];
      await Deno.mkdir(share);
      await using _testpmd = await startTestpmd({ folder: folder.path, socket: net });
      await using _virtiofsd = await startVirtiofsd(fs, share);
      await using disk = await RelayProcess.start({ folder: folder.path, name: "blk", device: "sim:blk,size=64MiB" });
      await using card = await RelayProcess.start({ folder: folder.path, name: "net", device: `unix:${net}` });
      await using files = await RelayProcess.start({ folder: folder.path, name: "fs", device: `unix:${fs}` });
      const relays = [disk, card, files];
      {
        await using vm = await startVm({
          ...{ qemu, folder: folder.path, run: "shell", modules: ["disk", "net", "fs"] },
          disk: { socket: disk.front },
          nets: [{ socket: card.front }],
          extraArgs: ["-chardev", `socket,id=fs0,path=${files.front}`, "-device", "vhost-user-fs-pci,chardev=fs0,tag=share,queue-size=256"],
        });
        await vm.shell("ip link set eth0 up && mount -t virtiofs share /mnt && dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync");
        await vm.send("umount /mnt; ip link set eth0 down; poweroff -f\n");
        await vm.process.expectExit(0);
      }
      for (const relay of relays) {
        await relay.waitStatus("waits again", (status) => !status.front_connected);
        await assertConversation(`qemu_${qemu}_${relay.name}`, await relay.messages());
      }
    },
  );
}

await labTest("the conversation of DPDK virtio-user about a network card is the recorded one", ["dpdk"], async ({ folder }) => {
  const socket = folder.join("net.sock");
  await using _back = await startTestpmd({ folder: folder.path, socket });
  await using relay = await RelayProcess.start({ folder: folder.path, device: `unix:${socket}` });
  {
    await using front = await VirtioUser.start({ folder: folder.path, socket: relay.front, mergeable: true });
    await relay.waitStatus("runs", (status) => status.queues.filter(({ mode }) => mode === "passthrough").length === 2);
    await front.command("quit");
    await front.process.expectExit(0);
  }
  await relay.waitStatus("waits again", (status) => !status.front_connected);
  await assertConversation("virtio_user", await relay.messages());
});
