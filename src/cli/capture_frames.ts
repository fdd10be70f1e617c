/**
 * `svq trace --pcapng`: a relay's frames into a file.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { ControlClient } from "../relay/control.ts";
import type { FramesAnswer } from "../relay/frame_reader.ts";
import { controlPath } from "../relay/runtime_dir.ts";
import type { CliContext } from "./context.ts";

/** How long one question to the relay waits for frames, ms. */
const WAIT_MS = 500;

/** What is captured, and whereto. */
export interface CaptureWish {
  /** File, or `-` for stdout. */
  path: string;
  /** Most bytes kept of a frame. */
  snapLength: number;
  /** End after this time, nanoseconds. */
  durationNs: number | undefined;
}

/** Writes frames until interrupted, the time is over, or the guest has gone. @throws what the relay says, and of writing */
export async function captureFrames({ output, signal }: CliContext, name: string, wish: CaptureWish): Promise<void> {
  const { path, snapLength, durationNs } = wish;
  if (path === "-" && output.stdout.isTerminal) {
    throw new SvqError("BAD_PARAMETER", "Frames are not written to a terminal", {
      hint: "name a file, or pipe them: --pcapng - | tcpdump -r -",
    });
  }
  using client = ControlClient.connect(name, controlPath(name));
  const reader = crypto.randomUUID();
  const first = await client.call("frames", { reader, snap_length: snapLength }) as FramesAnswer;
  // Not before it is certain that there is something to write.
  using sink = openSink(output, path);
  sink.write(Uint8Array.fromBase64(first.pcapng));
  const end = durationNs === undefined ? Infinity : performance.now() + durationNs / 1e6;
  let frames = 0;
  for (let answer = first; !answer.ended;) {
    const stop = signal.aborted || sink.closed || performance.now() >= end;
    const wait = Math.max(0, Math.min(WAIT_MS, end - performance.now()));
    try {
      answer = await client.call("frames", { reader, wait_ms: stop ? 0 : wait, stop }) as FramesAnswer;
    } catch (error) {
      if (!(error instanceof SvqError) || error.code !== "CONTROL_CLOSED") throw error;
      output.warn("the relay has ended, and the capture with it");
      return;
    }
    sink.write(Uint8Array.fromBase64(answer.pcapng));
    frames += answer.frames;
    if (answer.ended) output.info(`${frames} frames captured, ${answer.dropped} not captured for want of room`);
  }
}

interface ByteSink extends Disposable {
  readonly closed: boolean;
  write(bytes: Uint8Array): void;
}

function openSink(output: CliContext["output"], path: string): ByteSink {
  if (path === "-") {
    let closed = false;
    return {
      get closed() {
        return closed;
      },
      write: (bytes) => closed = closed || !output.writeBytes(bytes),
      [Symbol.dispose]: () => {},
    };
  }
  const file = Deno.openSync(path, { write: true, create: true, truncate: true });
  return {
    closed: false,
    write: (bytes) => {
      for (let at = 0; at < bytes.length;) at += file.writeSync(bytes.subarray(at));
    },
    [Symbol.dispose]: () => file.close(),
  };
}
