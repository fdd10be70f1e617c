import { libc } from "../../src/ffi/libc.ts";

/** Address of this process's SIGBUS handler. */
export function busHandler(): number {
  const record = new Uint8Array(152);
  libc().sigaction(7, null, record);
  return Number(new DataView(record.buffer).getBigUint64(0, true));
}
