/**
 * The other end of `svq bench migrate`'s stream.
 *
 * @module
 */
import { DirtyBitmap } from "../dirty/bitmap.ts";
import { mapAnonymous, OwnedFd, readable, servePort, SysError, UnixStream, type WorkerPort } from "../ffi/mod.ts";
import { Channel } from "../migration/channel.ts";
import { PageMap, PageReceiver } from "../migration/pages.ts";
import { decodeRound, FRAME } from "../migration/protocol.ts";
import type { TakeCommand, TakeReply } from "./migrate_messages.ts";

const SINK_BYTES = 1 << 20;

async function discard(stream: UnixStream): Promise<number> {
  const bytes = new Uint8Array(SINK_BYTES);
  for (let total = 0;;) {
    const { bytes: count } = await stream.receive(bytes);
    if (count === 0) return total;
    total += count;
  }
}

// As src/migration/destination.ts does it, round after round, until the source closes the link.
async function receivePages(stream: UnixStream, memory: number): Promise<void> {
  using mapping = mapAnonymous(memory, "received memory");
  const map = new PageMap([{ gpa: 0, size: memory, uaddr: 0, address: mapping.address }]);
  using channel = new Channel(stream, 60_000);
  for (;;) {
    // Each round goes into a receiver of its own: rounds of the bench have nothing to do with each other.
    const receiver = new PageReceiver(channel, map, DirtyBitmap.covering(map.endGpa));
    try {
      await receiver.receive(decodeRound(await channel.readPayload(await channel.receiveHead([FRAME.ROUND]), 24)));
    } catch (error) {
      if (!(error instanceof SysError) && (error as { code?: string }).code === "MIGRATION_LINK") return;
      throw error;
    }
  }
}

async function main(port: WorkerPort): Promise<void> {
  for (;;) {
    await readable(port.controlFd);
    for (const command of await port.commands()) {
      if (command.name === "close") {
        port.reply(command);
        return;
      }
      const { fd, memory } = command.data as TakeCommand;
      try {
        using stream = new UnixStream(new OwnedFd(fd));
        const bytes = memory === 0 ? await discard(stream) : await receivePages(stream, memory).then(() => 0);
        port.reply(command, { bytes } satisfies TakeReply);
      } catch (error) {
        port.fail(command, error);
      }
    }
  }
}

servePort(main);
