/** The scripts of examples/ and the files of share/: each is run, or held against what reads it. */
import assert from "node:assert/strict";
import { programInRoot, unpackedRoot } from "../../scripts/lab/apt.ts";
import { LabUnavailable } from "../../scripts/lab/cache.ts";
import { Process } from "../support/process.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const ROOT = new URL("../../", import.meta.url).pathname;
const EXAMPLES = [...Deno.readDirSync(`${ROOT}examples`)].map(({ name }) => name).filter((name) => name.endsWith(".sh")).sort();
const WRAPPERS = ["svq-block", "svq-net"];

function onPath(program: string): boolean {
  return (Deno.env.get("PATH") ?? "").split(":").some((folder) => {
    try {
      return Deno.statSync(`${folder}/${program}`).isFile;
    } catch {
      return false;
    }
  });
}

/** A folder with `svq`, which runs the source. */
function svqFolder(): TempDir {
  const folder = new TempDir();
  Deno.writeTextFileSync(folder.join("svq"), `#!/bin/sh\nexec "${Deno.execPath()}" run -A --quiet "${ROOT}src/cli/main.ts" "$@"\n`, {
    mode: 0o755,
  });
  return folder;
}

async function run(script: string, args: string[] = []): Promise<{ code: number; stdout: string; stderr: string }> {
  using folder = svqFolder();
  const output = await new Deno.Command(`${ROOT}examples/${script}`, {
    args,
    env: { PATH: `${folder.path}:${Deno.env.get("PATH")}`, DURATION: "10s", TMPDIR: folder.path },
    stdin: "null",
  }).output();
  const decoder = new TextDecoder();
  const result = { code: output.code, stdout: decoder.decode(output.stdout), stderr: decoder.decode(output.stderr) };
  assert.deepEqual([...Deno.readDirSync(folder.path)].map(({ name }) => name), ["svq"], "it cleans up behind itself");
  return result;
}

/** What each example prints at the least. */
const EXPECTED: Readonly<Record<string, { args?: string[]; stdout: RegExp }>> = {
  "migrate.sh": { args: ["60000"], stdout: /^completed: \d+ rounds, downtime [\d.]+ ms, memory identical: true$/m },
  "plan.sh": { stdout: /^0x100000000 -> 0x100000000 {2}6144 MiB$/m },
  "probe.sh": { args: ["sim:blk"], stdout: /^sim:blk\tblk\tcan be migrated$/m },
  "relay.sh": { stdout: /^queue 0 is in shadow after .*\nqueue 0 is in passthrough after .*\n\d+ requests, 0 lost, 0 corrupted$/m },
  "rings.sh": { stdout: /no broken rule[^]*^queue 0 shadow: split, 256 descriptors/m },
};

Deno.test("every example has a test", () => assert.deepEqual(Object.keys(EXPECTED), EXAMPLES));

const noJq = onPath("jq") ? "" : " (left out, needs jq)";
for (const [script, { args, stdout }] of Object.entries(EXPECTED)) {
  Deno.test({ name: `examples/${script} runs and prints what it promises${noJq}`, ignore: noJq !== "" }, async () => {
    const result = await run(script, args);
    assert.equal(result.code, 0, result.stderr);
    assert.match(result.stdout, stdout);
  });
}

Deno.test({ name: `examples/plan.sh fails with the reason where the range is too small${noJq}`, ignore: noJq !== "" }, async () => {
  const { code, stderr } = await run("plan.sh", ["0x1bfffffff"]);
  assert.equal(code, 1);
  assert.match(stderr, /IOVA_EXHAUSTED/);
});

async function shellcheck(): Promise<{ command: string; args: string[] } | string> {
  if (onPath("shellcheck")) return { command: "shellcheck", args: [] };
  try {
    return programInRoot(await unpackedRoot("shellcheck", "bookworm", ["shellcheck"]), "bin/shellcheck");
  } catch (error) {
    if (error instanceof LabUnavailable) return error.message;
    throw error;
  }
}

const checker = await shellcheck();
const noChecker = typeof checker === "string" ? ` (left out, needs shellcheck: ${checker})` : "";
Deno.test({ name: `shellcheck finds nothing in the scripts${noChecker}`, ignore: noChecker !== "" }, async () => {
  if (typeof checker === "string") return;
  const scripts = [...EXAMPLES.map((name) => `examples/${name}`), ...WRAPPERS.map((name) => `share/vhost-user/${name}`), ".ci/run"];
  const { code, stdout, stderr } = await new Deno.Command(checker.command, { args: [...checker.args, ...scripts], cwd: ROOT }).output();
  assert.equal(code, 0, new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr));
});

for (const wrapper of WRAPPERS) {
  Deno.test(`the descriptor of ${wrapper} says what the back-end says of itself`, async () => {
    const descriptor = JSON.parse(Deno.readTextFileSync(`${ROOT}share/vhost-user/50-${wrapper}.json`));
    assert.deepEqual(Object.keys(descriptor), ["description", "type", "binary", "tags"]);
    assert.ok(descriptor.binary.endsWith(`/${wrapper}`));
    const { stdout } = await new Deno.Command(`${ROOT}share/vhost-user/${wrapper}`, { args: ["--print-capabilities"] }).output();
    assert.deepEqual(JSON.parse(new TextDecoder().decode(stdout)), { type: descriptor.type, features: [] });
  });
}

Deno.test("svq-block serves a VMM at --socket-path with the device of the environment", async () => {
  using folder = svqFolder();
  const env = { SVQ: folder.join("svq"), SVQ_DEVICE: "sim:blk", SVQ_RUNTIME_DIR: folder.path };
  await using relay = new Process(`${ROOT}share/vhost-user/svq-block`, { args: ["--socket-path", folder.join("front")], env });
  await relay.stderr.wait(/: ready$/);
  const { code } = await new Deno.Command(folder.join("svq"), {
    args: ["drive", `unix:${folder.join("front")}`, "--requests", "100"],
    env,
    stdout: "null",
  }).output();
  assert.equal(code, 0);
  relay.kill("SIGTERM");
  await waitUntil("its end", () => relay.ended);
});

Deno.test("the libvirt snippets are well-formed and name sockets of the systemd units", () => {
  const listen = /^ListenStream=(.*)%i(.*)$/m.exec(Deno.readTextFileSync(`${ROOT}units/svq-relay@.socket`))!;
  for (const name of ["disk", "interface", "memory"]) {
    const text = Deno.readTextFileSync(`${ROOT}share/libvirt/${name}.xml`).replace(/<!--[^]*?-->/g, "");
    const open: string[] = [];
    for (const [, close, tag, attributes] of text.matchAll(/<(\/?)([\w]+)([^<>]*)>/g)) {
      if (close === "/") assert.equal(open.pop(), tag);
      else if (!attributes!.endsWith("/")) open.push(tag!);
      assert.match(attributes!, /^(?: [\w]+="[^"<&]*")* ?\/?$/);
    }
    assert.deepEqual(open, []);
    for (const [, path] of text.matchAll(/ path="([^"]*)"/g)) assert.ok(path!.startsWith(listen[1]!) && path!.endsWith(listen[2]!), path);
  }
});
