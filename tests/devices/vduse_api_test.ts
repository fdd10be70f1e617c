import assert from "node:assert/strict";
import { agree, type VduseAgreement } from "../../src/devices/vduse_api.ts";
import { SysError } from "../../src/ffi/mod.ts";
import { encodeVduseConfig, VDUSE } from "../../src/uapi/vduse.ts";
import { viewOf } from "../../src/uapi/vhost.ts";

const [EPERM, EINVAL, ENOTTY] = [1, 22, 25];

/** A control device of a kernel that knows API versions up to `api`, and these features (undefined: not even the question). */
function kernel(api: number, features?: bigint, unknown = EINVAL) {
  const set: Record<string, bigint> = {};
  const agreement: VduseAgreement = agree((request, argument, name) => {
    const view = viewOf(argument);
    const known = ["GET_API_VERSION", "SET_API_VERSION", ...(features === undefined ? [] : ["GET_FEATURES", "SET_FEATURES"])];
    const key = Object.entries(VDUSE).find(([, number]) => number === request)![0];
    if (!known.includes(key)) throw new SysError(name, unknown);
    if (key === "GET_API_VERSION") view.setBigUint64(0, BigInt(api), true);
    else if (key === "GET_FEATURES") view.setBigUint64(0, features!, true);
    else if (view.getBigUint64(0, true) > (key === "SET_FEATURES" ? features! : BigInt(api))) throw new SysError(name, EINVAL);
    else set[key] = view.getBigUint64(0, true);
    return 0;
  });
  return { set, agreement };
}

Deno.test("Linux 6.12: API 0, and no feature is asked for twice", () => {
  const { set, agreement } = kernel(0);
  assert.deepEqual(agreement, { apiVersion: 0, queueReady: false, suspend: false });
  assert.deepEqual(set, { SET_API_VERSION: 0n });
});

Deno.test("a kernel with API 1 gets version 1, and none of the features that it does not know", () => {
  for (const unknown of [EINVAL, ENOTTY]) {
    const { set, agreement } = kernel(1, undefined, unknown);
    assert.deepEqual(agreement, { apiVersion: 1, queueReady: false, suspend: false });
    assert.deepEqual(set, { SET_API_VERSION: 1n });
  }
});

Deno.test("QUEUE_READY and SUSPEND are taken where they are offered, each by itself; unknown ones and later versions are not", () => {
  assert.deepEqual(kernel(1, 3n), {
    set: { SET_API_VERSION: 1n, SET_FEATURES: 3n },
    agreement: { apiVersion: 1, queueReady: true, suspend: true },
  });
  assert.deepEqual(kernel(1, 1n).agreement, { apiVersion: 1, queueReady: true, suspend: false });
  assert.deepEqual(kernel(1, 2n).agreement, { apiVersion: 1, queueReady: false, suspend: true });
  assert.deepEqual(kernel(9, 0xf0n).set, { SET_API_VERSION: 1n });
  assert.deepEqual(kernel(9, 0xffn).set, { SET_API_VERSION: 1n, SET_FEATURES: 3n });
});

Deno.test("a kernel that forbids is not mistaken for one that does not know", () => {
  assert.throws(() => kernel(1, undefined, EPERM), (error: SysError) => error.errno === EPERM);
});

Deno.test("API 1 puts the numbers of groups and address spaces into what was padding", () => {
  const config = { name: "a", vendorId: 0, deviceId: 2, features: 1n << 33n, vqNum: 1, vqAlign: 4096, config: new Uint8Array(8) };
  const words = (bytes: Uint8Array<ArrayBuffer>) => [280, 284].map((at) => viewOf(bytes).getUint32(at, true));
  assert.deepEqual(words(encodeVduseConfig(config)), [0, 0]);
  assert.deepEqual(words(encodeVduseConfig({ ...config, groups: 1, addressSpaces: 1 })), [1, 1]);
});
