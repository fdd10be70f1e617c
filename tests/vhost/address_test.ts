import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { type DeviceAddress, formatDeviceAddress, parseDeviceAddress } from "../../src/vhost/address.ts";

const text = fc.string({ minLength: 1, maxLength: 12, unit: fc.constantFrom("a", "Z", "0", ",", "=", "/", ":", " ", "é") });
const mac = fc.array(fc.nat({ max: 255 }), { minLength: 6, maxLength: 6 })
  .map((bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":"));
const size = fc.nat({ max: Number.MAX_SAFE_INTEGER });
const common = { queues: fc.integer({ min: 1, max: 256 }), num: fc.integer({ min: 1, max: 65535 }), latency: size, name: text };
const some = { noNullPrototype: true, requiredKeys: ["kind", "device"] as ["kind", "device"] };

const address: fc.Arbitrary<DeviceAddress> = fc.oneof(
  fc.nat({ max: 99 }).map((n): DeviceAddress => ({ kind: "vhost-vdpa", path: `/dev/vhost-vdpa-${n}` })),
  fc.stringMatching(/^[\w.-]{1,10}$/).map((name): DeviceAddress => ({ kind: "vdpa", name })),
  fc.option(text).map((tap): DeviceAddress => ({ kind: "vhost-net", path: "/dev/vhost-net", ...(tap === null ? {} : { tap }) })),
  fc.record({
    kind: fc.constant("vhost-user" as const),
    how: fc.constantFrom("unix" as const, "listen" as const, "connect" as const),
    path: text,
  }, { noNullPrototype: true }),
  fc.nat({ max: 2 ** 31 - 1 }).map((fd): DeviceAddress => ({ kind: "fd", fd })),
  fc.record({
    kind: fc.constant("sim" as const),
    device: fc.constant("blk" as const),
    file: text,
    size,
    ro: fc.boolean(),
    id: fc.string({ minLength: 1, maxLength: 10, unit: fc.constantFrom("a", ",", "9") }),
    ...common,
  }, some),
  fc.record({
    kind: fc.constant("sim" as const),
    device: fc.constant("net" as const),
    tap: text,
    cable: text,
    mac,
    mtu: fc.integer({ min: 1, max: 65535 }),
    ...common,
  }, some),
  fc.record({ kind: fc.constant("sim" as const), device: fc.constant("loopback" as const), ...common }, some),
);

Deno.test("every address is read back from its text", () => {
  fc.assert(fc.property(address, (value) => assert.deepEqual(parseDeviceAddress(formatDeviceAddress(value)), value)), {
    seed: 7,
    numRuns: 300,
  });
});

Deno.test("any text either parses to an address that is stable or is refused as wrong usage", () => {
  const near = fc.array(
    fc.constantFrom("sim", ":", "blk", ",", "file=", "size=", "4M", "unix", "/dev/vhost-net", "tap=", "fd", "-1", "x"),
    {
      maxLength: 8,
    },
  ).map((parts) => parts.join(""));
  fc.assert(
    fc.property(fc.oneof(near, fc.string()), (input) => {
      let parsed: DeviceAddress;
      try {
        parsed = parseDeviceAddress(input);
      } catch (error) {
        assert.ok(error instanceof SvqError && error.exitCode === 2 && error.hint !== undefined, String(error));
        return;
      }
      assert.deepEqual(parseDeviceAddress(formatDeviceAddress(parsed)), parsed);
    }),
    { seed: 7, numRuns: 300 },
  );
});

Deno.test("the forms of the manual mean what it says", () => {
  const cases: [string, DeviceAddress][] = [
    ["/dev/vhost-vdpa-0", { kind: "vhost-vdpa", path: "/dev/vhost-vdpa-0" }],
    ["vdpa:vdpa0", { kind: "vdpa", name: "vdpa0" }],
    ["/dev/vhost-net,tap=tap0", { kind: "vhost-net", path: "/dev/vhost-net", tap: "tap0" }],
    ["unix:/run/a,,b.sock", { kind: "vhost-user", how: "unix", path: "/run/a,b.sock" }],
    ["listen:/run/x", { kind: "vhost-user", how: "listen", path: "/run/x" }],
    ["fd:3", { kind: "fd", fd: 3 }],
    ["sim:blk,file=/a=b.img,ro", { kind: "sim", device: "blk", file: "/a=b.img", ro: true }],
    ["sim:blk,size=64MiB,latency=100us,queues=2", { kind: "sim", device: "blk", size: 2 ** 26, latency: 1e5, queues: 2 }],
    ["sim:net,mac=52:54:00:AB:00:01", { kind: "sim", device: "net", mac: "52:54:00:ab:00:01" }],
  ];
  for (const [input, expected] of cases) assert.deepEqual(parseDeviceAddress(input), expected, input);
});

Deno.test("a wrong address says what is wrong and what would be right", () => {
  const cases: [string, RegExp, RegExp][] = [
    ["sim:blk,sise=4", /unknown option "sise"/, /did you mean size\?/],
    ["sim:blk,zzz=4", /unknown option "zzz"/, /options: file, size, ro/],
    ["sim:blok", /Unknown embedded device/, /did you mean blk\?/],
    ["uinx:/a", /Bad device address/, /did you mean unix:/],
    ["/run/a.sock", /Bad device address/, /unix:\/run\/a\.sock/],
    ["unix:/a,b", /no options/, /written twice/],
    ["sim:blk,size=1,size=2", /given twice/, /once/],
    ["sim:blk,file=", /needs a value/, /file=PATH/],
    ["sim:blk,ro=maybe", /Bad value for ro/, /ro=off/],
    ["sim:blk,id=123456789012345678901", /too long/, /20 bytes/],
    ["sim:blk,__proto__=1", /unknown option/, /options/],
    ["", /Bad device address/, /is one of/],
    ["fd:x", /Bad number/, /whole number/],
  ];
  for (const [input, message, hint] of cases) {
    assert.throws(
      () => parseDeviceAddress(input),
      (error) => error instanceof SvqError && message.test(error.message) && hint.test(error.hint ?? ""),
      input,
    );
  }
});
