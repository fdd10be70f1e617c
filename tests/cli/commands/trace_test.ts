import assert from "node:assert/strict";
import { VhostUserFrontEnd } from "../../../src/vhost_user/front_end.ts";
import { svq, svqCommand } from "../../support/cli.ts";
import { RelayProcess } from "../../support/relay_process.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";
import { waitUntil } from "../../support/wait.ts";

Deno.test("svq trace shows the messages of a relay so far, and goes on with --follow until the relay ends", async () => {
  using folder = new TempDir();
  const env = { SVQ_RUNTIME_DIR: folder.path };
  await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:blk" });
  await using vmm = await VhostUserFrontEnd.connect(relay.front);
  await vmm.getConfig(0, 8);

  const shown = await svq(["trace", "relay", "--messages", "-j"], env);
  assert.equal(shown.code, 0, shown.stderr);
  const messages = shown.stdout.trimEnd().split("\n").map((line) => JSON.parse(line));
  for (const message of messages) assertMatchesSchema("svq.trace.message/1", message);
  assert.deepEqual(messages.slice(0, 2).map(({ from, request, reply }) => [from, request, reply]), [
    ["vmm", "GET_FEATURES", false],
    ["relay", "GET_FEATURES", true],
  ]);
  assert.deepEqual(messages.at(-1).fields, { offset: 0, size: 8, flags: 0, bytes: messages.at(-1).fields.bytes });

  const text = await svq(["trace", "relay", "--side", "front"], env);
  assert.match(text.stdout, /^\d\d:\d\d:\d\d\.\d{6} {2}vmm > relay {5}GET_CONFIG {2}offset=0 size=8/m);

  const following = svqCommand(["trace", "relay", "--follow", "-j"], env).spawn();
  const lines: string[] = [];
  const read = (async () => {
    for await (const chunk of following.stdout.pipeThrough(new TextDecoderStream())) lines.push(chunk);
  })();
  const errors = new Response(following.stderr).text();
  await waitUntil("GET_CONFIG in the stream", () => lines.join("").includes("GET_CONFIG"));
  await vmm.setStatus(1);
  await waitUntil("SET_STATUS in the stream", () => lines.join("").includes("SET_STATUS"));
  await vmm.close();
  await relay.stop();
  assert.equal((await following.status).code, 0, await errors);
  await read;
  await errors;
});
