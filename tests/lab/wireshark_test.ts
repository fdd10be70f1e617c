/** What svq trace --pcapng writes, read by Wireshark's own programs. */
import assert from "node:assert/strict";
import { wiresharkProgram } from "../../scripts/lab/host.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { svq } from "../support/cli.ts";
import { decodePcapng } from "../support/pcapng.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";

async function run(program: "tshark" | "capinfos", words: string[]): Promise<string> {
  const { command, args, env } = await wiresharkProgram(program);
  const output = await new Deno.Command(command, { args: [...args, ...words], env: { ...env, LC_ALL: "C", TZ: "UTC" } }).output();
  const [stdout, stderr] = [output.stdout, output.stderr].map((bytes) => new TextDecoder().decode(bytes));
  assert.equal(output.code, 0, stderr);
  return stdout!;
}

await labTest(
  "capinfos and tshark read a capture as it was made: frames, lengths, times, directions, interface and queues",
  ["wireshark"],
  async ({ folder }) => {
    const env = { SVQ_RUNTIME_DIR: folder.path };
    await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:net,cable=loop,queues=5" });
    await using device = await VhostUserFrontEnd.connect(relay.front);
    const begun = Date.now() / 1000;
    await using driver = await EmbeddedDriver.open(device, { queues: 2, depth: 8, num: 64, ramSize: 16 << 20, rate: 500 });
    const running = driver.run({ drainMs: 5000 });
    running.catch(() => {});
    const file = folder.join("frames.pcapng");
    const traced = await svq(["trace", "relay", "--pcapng", file, "--duration", "1s"], env);
    assert.equal(traced.code, 0, traced.stderr);
    await driver.stop(5000);
    const { frames } = decodePcapng(Deno.readFileSync(file));
    assert.ok(frames.length > 100, `${frames.length} frames`);

    // -M: numbers as they are.
    const infos = Object.fromEntries(
      (await run("capinfos", ["-M", file])).split("\n").flatMap((line) => {
        const [, key, value] = /^([^:=]+?)\s*[:=]\s*(.*)$/.exec(line) ?? [];
        return key === undefined ? [] : [[key, value]];
      }),
    ) as Record<string, string>;
    assert.match(infos["File type"]!, /pcapng/);
    assert.equal(infos["File encapsulation"], "ether");
    assert.match(infos["File timestamp precision"]!, /nanoseconds/);
    assert.equal(Number(infos["Number of packets"]), frames.length);
    assert.equal(parseInt(infos["Data size"]!), frames.reduce((sum, { length }) => sum + length, 0));
    assert.equal(infos["Strict time order"], "True");

    const fields = ["time_epoch", "len", "packet_flags_direction", "interface_name", "interface_queue"];
    const table = await run("tshark", ["-n", "-r", file, "-T", "fields", ...fields.flatMap((name) => ["-e", `frame.${name}`])]);
    const rows = table.trim().split("\n").map((line) => line.split("\t"));
    const expected = frames.map(({ timeNs, length, direction, queue }) => {
      const time = `${timeNs / 1_000_000_000n}.${String(timeNs % 1_000_000_000n).padStart(9, "0")}`;
      // 1 is inbound, 2 outbound; tshark prints them in hexadecimal.
      return [time, String(length), direction === "in" ? 1 : 2, "relay", String(queue)];
    });
    assert.deepEqual(rows.map(([time, length, direction, name, queue]) => [time, length, Number(direction), name, queue]), expected);
    assert.deepEqual(new Set(rows.map((row) => `${Number(row[2])} ${row[4]}`)), new Set(["1 0", "2 1", "2 3"]));
    const times = rows.map((row) => Number(row[0]));
    assert.ok(times[0]! >= begun && times.at(-1)! <= Date.now() / 1000, "the times are the host's");
    // Without a hash all come back through the first pair. Sent by the guest first, received by it then: the way of each frame can be followed.
    assert.equal(rows.findIndex((row) => Number(row[2]) === 2) < rows.findIndex((row) => Number(row[2]) === 1), true);
  },
);
