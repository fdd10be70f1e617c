import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { addWords, checksumBytes, foldDigest, isZeroPage, newDigest } from "../../src/migration/digest.ts";
import {
  commonVersion,
  decodeHello,
  decodeRange,
  decodeRound,
  encodeHello,
  encodeRange,
  encodeRound,
  MAX_ROUNDS,
} from "../../src/migration/protocol.ts";
import { formatMigrationUri, parseMigrationUri } from "../../src/migration/uri.ts";

fc.configureGlobal({ seed: 6, numRuns: 200 });

const bytes16 = fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => Uint8Array.from(bytes));

Deno.test("HELLO, ROUND and page ranges are read as they were written", () => {
  fc.assert(fc.property(fc.integer({ min: 1, max: 65535 }), fc.nat({ max: 65535 }), bytes16, (version, less, session) => {
    const hello = { version, versionMin: Math.max(1, version - less), session };
    assert.deepEqual(decodeHello(encodeHello(hello)), hello);
  }));
  const mark = fc.record({
    round: fc.integer({ min: 1, max: MAX_ROUNDS }),
    frozen: fc.boolean(),
    disk: fc.boolean(),
    pages: fc.nat({ max: 2 ** 40 }),
    checksum: fc.integer(),
  });
  fc.assert(fc.property(mark, (round) => assert.deepEqual(decodeRound(encodeRound(round)), { ...round })));
  fc.assert(fc.property(fc.nat({ max: 2 ** 39 }), fc.integer({ min: 1, max: 2 ** 31 }), (page, count) => {
    const view = new DataView(new ArrayBuffer(24));
    encodeRange(view, 8, { page, count });
    assert.deepEqual(decodeRange(view, 8), { page, count });
  }));
});

Deno.test("Whatever bytes come for a HELLO or a ROUND, they are refused or make sense", () => {
  const refusal = (error: unknown) => error instanceof SvqError && error.code === "MIGRATION_PROTOCOL";
  const any = fc.oneof(
    fc.uint8Array({ maxLength: 40 }),
    fc.uint8Array({ minLength: 24, maxLength: 24 }),
    fc.uint8Array({ minLength: 32, maxLength: 32 }),
  );
  fc.assert(fc.property(any, (bytes) => {
    for (const decode of [decodeHello, decodeRound]) {
      try {
        decode(Uint8Array.from(bytes));
      } catch (error) {
        assert.ok(refusal(error), String(error));
      }
    }
  }));
  const hello = encodeHello({ version: 1, versionMin: 1, session: new Uint8Array(16) });
  hello[0]! ^= 1;
  assert.throws(() => decodeHello(hello), refusal);
});

Deno.test("Two versions of the protocol agree on the highest that both speak, or refuse", () => {
  const session = new Uint8Array(16);
  assert.equal(commonVersion({ version: 2, versionMin: 1, session }), 2);
  assert.equal(commonVersion({ version: 9, versionMin: 2, session }), 2);
  assert.throws(() => commonVersion({ version: 9, versionMin: 3, session }), { code: "MIGRATION_VERSION", exitCode: 7 });
  assert.throws(() => commonVersion({ version: 1, versionMin: 1, session }), { code: "MIGRATION_VERSION" });
});

Deno.test("One changed bit changes the checksum of pages and of payloads", () => {
  const words = fc.array(fc.integer(), { minLength: 32, maxLength: 96 }).map((list) => Int32Array.from(list.slice(0, list.length & ~31)));
  const sum = (list: Int32Array) => {
    const digest = newDigest();
    addWords(digest, list, 0, list.length);
    return { fold: foldDigest(digest), text: [...digest].join() };
  };
  fc.assert(fc.property(words, fc.nat(), fc.nat({ max: 31 }), (list, at, bit) => {
    const changed = list.slice();
    changed[at % list.length]! ^= 1 << bit;
    assert.notEqual(sum(list).text, sum(changed).text);
    const [a, b] = [new Uint8Array(list.buffer), new Uint8Array(changed.buffer)];
    assert.notEqual(checksumBytes(a), checksumBytes(b));
    assert.notEqual(checksumBytes(a), checksumBytes(a.subarray(1)));
  }));
});

Deno.test("A page is zero only when all of it is", () => {
  const words = new Int32Array(2048);
  assert.ok(isZeroPage(words, 1024));
  for (const at of [1024, 1025, 1500, 2046, 2047]) {
    words[at] = 1 << (at & 31);
    assert.ok(!isZeroPage(words, 1024), `word ${at}`);
    words[at] = 0;
  }
  words[1023] = 1;
  assert.ok(isZeroPage(words, 1024));
});

Deno.test("Migration URIs are read and written, and what is none is refused as a usage error", () => {
  for (
    const text of [
      "unix:/run/m.sock",
      "unix:@name",
      "tcp:127.0.0.1:4444",
      "tcp:[::1]:1",
      "tcp:host.example:65535",
      "tcp::4444",
      "tls:host:1",
    ]
  ) {
    assert.equal(formatMigrationUri(parseMigrationUri(text)), text);
  }
  for (const text of ["", "unix:", "/run/m.sock", "tcp:host", "tcp:host:99999", "tcp:::1:5", "quic:host:1", "tls:host"]) {
    assert.throws(() => parseMigrationUri(text), { code: "USAGE", exitCode: 2 }, text);
  }
});
