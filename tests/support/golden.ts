/** Lower-case hex of `bytes`. */
export function toHex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The inverse of {@linkcode toHex}. */
export function fromHex(hex: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/** A recorded message: who sent it, request id, header flags, payload, how many descriptors came along. */
export interface GoldenMessage {
  from: "frontend" | "backend";
  request: number;
  flags: number;
  payload: Uint8Array<ArrayBuffer>;
  fds: number;
}

/** A recorded migration: what was said to the device at the source and to the one at the destination. */
export interface GoldenConversations {
  qemu: string;
  source: GoldenMessage[];
  destination: GoldenMessage[];
}

type Row = [from: "frontend" | "backend", request: number, flags: number, payload: string, fds: number];

/** Reads tests/vhost_user/golden/`name`.json, made by tests/lab/record_golden.ts. */
export function readGolden(name: string): GoldenConversations {
  const text = Deno.readTextFileSync(new URL(`../vhost_user/golden/${name}.json`, import.meta.url));
  const { qemu, source, destination } = JSON.parse(text) as { qemu: string; source: Row[]; destination: Row[] };
  const messages = (rows: Row[]): GoldenMessage[] =>
    rows.map(([from, request, flags, payload, fds]) => ({ from, request, flags, payload: fromHex(payload), fds }));
  return { qemu, source: messages(source), destination: messages(destination) };
}
