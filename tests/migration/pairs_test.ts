import assert from "node:assert/strict";
import { isClean } from "../../src/migration/document.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { assertMoves, Hosts, type HostsOptions, migrationTo, overVhostUser, progress } from "../support/migration.ts";

const vhostUser = async (hosts: Hosts, more = {}) => overVhostUser(hosts, await hosts.openDevice(more));

const PAIRS: [name: string, options: HostsOptions & { copyDisk?: "auto" | "yes" }][] = [
  ["from an embedded device to one behind vhost-user", { openDestination: (hosts) => vhostUser(hosts) }],
  ["from a device behind vhost-user to an embedded one, two queues", { openSource: (hosts) => vhostUser(hosts), queues: 2 }],
  ["with packed rings from a device that has them to one that has none", {
    packed: true,
    openDestination: (hosts) => hosts.openDevice({ packed: false }),
  }],
  ["with packed rings from an embedded device without them to one behind vhost-user with them", {
    packed: true,
    queues: 2,
    openSource: (hosts) => hosts.openDevice({ packed: false }),
    openDestination: (hosts) => vhostUser(hosts),
  }],
  ["with split rings to a device that has both, and longer ones", {
    num: 64,
    openDestination: (hosts) => hosts.openDevice({ packed: true, num: 4096 }),
  }],
  ["with a disk of its own from an embedded device to one behind vhost-user, packed rings", {
    packed: true,
    copyDisk: "auto",
    openDestination: (hosts) => vhostUser(hosts, { file: hosts.dir.join("there") }),
  }],
  ["with a disk of its own from a device behind vhost-user to an embedded one, two queues", {
    queues: 2,
    copyDisk: "yes",
    openSource: (hosts) => vhostUser(hosts),
    openDestination: (hosts) => hosts.openDevice({ file: hosts.dir.join("there") }),
  }],
  ["with packed rings of an odd size to a device without packed rings", {
    packed: true,
    num: 192,
    openDestination: (hosts) => hosts.openDevice({ packed: false }),
  }],
];

for (const [name, { copyDisk = "no", ...options }] of PAIRS) {
  Deno.test(`A guest moves ${name}`, async () => {
    await using hosts = new Hosts({ device: { jitterUs: 200 }, ...options });
    const { disk } = await assertMoves(hosts, hosts.destination(), { copyDisk });
    if (copyDisk !== "no") assert.ok(disk!.rounds.length >= 2);
  });
}

Deno.test("A device whose rings are too short for the guest is refused, and the guest goes on at the source", async () => {
  await using hosts = new Hosts({ openDestination: (hosts) => hosts.openDevice({ num: 64 }) });
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.outcome, "aborted");
  assert.match(result.error!.message, /rings of 1 to 64 descriptors/);
  await progress(guest);
  assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
});
