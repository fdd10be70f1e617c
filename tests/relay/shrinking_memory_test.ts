import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { busFaults, busGuardWorks, createEventfd, mapFd, O, openFd, signalEventfd, truncateFd } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { encodeU64, encodeVringAddr, encodeVringState } from "../../src/uapi/vhost.ts";
import { FLAG, PROTOCOL_FEATURE, REQUEST } from "../../src/uapi/vhost_user.ts";
import { encodeLog, encodeMemTable, encodeVringFd } from "../../src/vhost_user/message.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { SplitDriver } from "../../src/vring/split.ts";
import { rawPair } from "../support/peer.ts";
import { TempDir } from "../support/temp.ts";
import { within } from "../support/test_guest.ts";

const SIZE = 1 << 20;
const NUM = 16;
const UADDR = 0x7000_0000;
const DATA = 0x8_0000;
const { LOG_SHMFD, REPLY_ACK, MQ } = PROTOCOL_FEATURE;

// A front-end that takes memory away under a relay in full work: the file is truncated while a Worker reads and writes the rings in it.
for (const core of ["wasm", "js"] as const) {
  for (const what of ["memory", "log"] as const) {
    const name = `a front-end that cuts off its ${what} in use ends its own connection, and the process lives: --core ${core}`;
    Deno.test({ name, ignore: !busGuardWorks() }, async () => {
      using folder = new TempDir();
      const file = (name: string, size: number) => {
        const fd = openFd(folder.join(name), O.RDWR | O.CREAT);
        truncateFd(fd.fd, size);
        return fd;
      };
      using ram = file("ram", SIZE);
      using log = file("log", 4096);
      using mapping = mapFd(ram.fd, { length: SIZE });
      const bytes = new Uint8Array(mapping.buffer());
      await using device = await SimDevice.open({ kind: "loopback", queues: 1 });
      await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, mode: "shadow", core }, { log: () => {}, error: () => {} });
      const [peer, stream] = rawPair();
      using _peer = peer;
      const ended = new BackendServer(stream, relay, { offerLog: true }).run();
      const say = (request: number, payload: Uint8Array<ArrayBuffer>, fds: number[] = []) => peer.send(request, payload, fds);
      const layout = splitLayout(NUM);
      using kick = createEventfd();
      using call = createEventfd();
      await say(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(bitsOf([LOG_SHMFD, REPLY_ACK, MQ])));
      await say(REQUEST.SET_FEATURES, encodeU64(bitsOf([26, 30, 32])));
      await say(REQUEST.SET_MEM_TABLE, encodeMemTable([{ gpa: 0, size: SIZE, uaddr: UADDR, mmapOffset: 0 }]), [ram.fd]);
      await peer.ask(REQUEST.SET_LOG_BASE, encodeLog({ size: 4096, offset: 0 }), [log.fd]);
      await say(REQUEST.SET_VRING_NUM, encodeVringState({ index: 0, num: NUM }));
      await say(REQUEST.SET_VRING_BASE, encodeVringState({ index: 0, num: 0 }));
      const [desc, avail, used] = [UADDR, UADDR + layout.avail.offset, UADDR + layout.used.offset];
      await say(REQUEST.SET_VRING_ADDR, encodeVringAddr({ index: 0, flags: 1, desc, avail, used, logGuestAddr: layout.used.offset }));
      await say(REQUEST.SET_VRING_CALL, encodeVringFd({ index: 0, hasFd: true }), [call.fd]);
      await say(REQUEST.SET_VRING_KICK, encodeVringFd({ index: 0, hasFd: true }), [kick.fd]);
      const enabled = await peer.ask(REQUEST.SET_VRING_ENABLE, encodeVringState({ index: 0, num: 1 }), [], FLAG.VERSION | FLAG.NEED_REPLY);
      assert.equal(enabled.payload[0], 0);

      const part = (byteOffset: number) => ({ buffer: bytes.buffer, byteOffset });
      const driver = new SplitDriver({
        num: NUM,
        desc: part(0),
        avail: part(layout.avail.offset),
        used: part(layout.used.offset),
        eventIdx: false,
      });
      const offer = () => {
        while (driver.add([{ address: DATA, length: 64 }], [{ address: DATA + 4096, length: 64 }]) >= 0);
        driver.publish();
        signalEventfd(kick.fd);
      };
      const taken = async () => {
        for (let id = driver.take(); id < 0; id = driver.take()) await new Promise((resolve) => setTimeout(resolve, 1));
      };
      offer();
      await within(taken(), 10_000, "the first chain");
      const before = busFaults();
      truncateFd(what === "memory" ? ram.fd : log.fd, 0);
      // For memory this very write is onto a page that is gone.
      offer();
      for (let i = 0; i < 20; i++) {
        signalEventfd(kick.fd);
        await new Promise((resolve) => setTimeout(resolve, 2));
      }
      const error = await within(ended, 10_000, "the end of the connection");
      assert.equal((error as { code?: string }).code, "FILE_SHRUNK", String(error));
      assert.match(error!.message, what === "memory" ? /Memory region 0x0: its file was cut off at 0 bytes/ : /Dirty log/);
      assert.ok(busFaults() > before);
    });
  }
}
