/**
 * Asks a vhost-user back-end what it is without changing it: GET messages only.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, SysError } from "../ffi/errno.ts";
import { connectUnix } from "../ffi/unix_socket.ts";
import { hasBit } from "../uapi/bits.ts";
import { decodeU64 } from "../uapi/vhost.ts";
import { PROTOCOL_FEATURE, REQUEST, VHOST_USER_F_PROTOCOL_FEATURES } from "../uapi/vhost_user.ts";
import type { MessageHook } from "./connection.ts";
import { decodeConfig, encodeConfig } from "./message.ts";
import { Requester } from "./requester.ts";

/** What a back-end says about itself. */
export interface VhostUserProbe {
  /** Virtio and vhost feature bits, bit 30 included. */
  features: bigint;
  /** Protocol features offered; 0 without bit 30. */
  protocolFeatures: bigint;
  /** Queues (for a net device: pairs), where it has MQ and answered. */
  queueNum?: number;
  /** Memory slots, where it has CONFIGURE_MEM_SLOTS and answered. */
  maxMemSlots?: number;
  /** Device configuration space from its first byte, where it has CONFIG and answered. */
  config?: Uint8Array<ArrayBuffer>;
  /** What could not be found out, and why. */
  notes: string[];
}

// vhost-user does not tell the device id, and a read beyond the end is refused: blk with its common fields, net, smaller ones.
const CONFIG_SIZES = [60, 24, 8];

function inUse(path: string, timeoutMs: number, cause: unknown): SvqError {
  return new SvqError("DEVICE_IN_USE", `${path}: no answer within ${timeoutMs} ms; another front-end is probably connected`, {
    exitCode: EXIT.failed,
    hint: "A vhost-user back-end serves one front-end at a time",
    cause,
  });
}

/**
 * Connects, asks and disconnects. A one-shot daemon ends after that.
 *
 * @param timeoutMs for each answer
 * @throws SvqError DEVICE_IN_USE where GET_FEATURES gets no answer, SysError where nobody listens
 */
export async function probeVhostUser(path: string, timeoutMs: number, onMessage?: MessageHook): Promise<VhostUserProbe> {
  using requester = connect(path, timeoutMs, onMessage);
  const getU64 = async (request: number): Promise<bigint> => decodeU64(await requester.call(request, undefined, { timeoutMs }));
  const probe: VhostUserProbe = { features: 0n, protocolFeatures: 0n, notes: [] };
  try {
    probe.features = await getU64(REQUEST.GET_FEATURES);
  } catch (error) {
    if (error instanceof SvqError && error.code === "VHOST_USER_TIMEOUT") throw inUse(path, timeoutMs, error);
    throw error;
  }
  if (!hasBit(probe.features, VHOST_USER_F_PROTOCOL_FEATURES)) {
    probe.notes.push("It has no protocol features: queues, memory slots and configuration cannot be asked for");
    return probe;
  }
  probe.protocolFeatures = await getU64(REQUEST.GET_PROTOCOL_FEATURES);
  // Some back-ends answer the rest only after SET_PROTOCOL_FEATURES, and close the connection before it.
  const optional = async (feature: number, what: string, ask: () => Promise<void>): Promise<void> => {
    if (!hasBit(probe.protocolFeatures, feature)) return;
    try {
      await ask();
    } catch (error) {
      if (!(error instanceof SvqError)) throw error;
      probe.notes.push(`${what} not known: ${error.message}; asking for it may need SET_PROTOCOL_FEATURES, which a probe does not send`);
    }
  };
  await optional(PROTOCOL_FEATURE.MQ, "Queues", async () => {
    probe.queueNum = Number(await getU64(REQUEST.GET_QUEUE_NUM));
  });
  await optional(PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS, "Memory slots", async () => {
    probe.maxMemSlots = Number(await getU64(REQUEST.GET_MAX_MEM_SLOTS));
  });
  await optional(PROTOCOL_FEATURE.CONFIG, "Configuration", async () => {
    for (const size of CONFIG_SIZES) {
      const request = encodeConfig({ offset: 0, flags: 0, bytes: new Uint8Array(size) });
      const answer = await requester.call(REQUEST.GET_CONFIG, request, { timeoutMs });
      if (answer.length === 0) continue;
      probe.config = decodeConfig(answer).bytes;
      return;
    }
    probe.notes.push("Configuration not known: the device refused to give it");
  });
  return probe;
}

function connect(path: string, timeoutMs: number, onMessage: MessageHook | undefined): Requester {
  try {
    return new Requester(connectUnix(path), { onMessage });
  } catch (error) {
    // The queue of waiting connections is full.
    if (error instanceof SysError && error.errno === ERRNO.EAGAIN) throw inUse(path, timeoutMs, error);
    throw error;
  }
}
