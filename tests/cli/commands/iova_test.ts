import assert from "node:assert/strict";

const MAIN = new URL("../../../src/cli/main.ts", import.meta.url).href;
const RANGE = ["--range", "0x0-0x7fffffffff"];

async function svq(args: string[], stdin = ""): Promise<{ code: number; stdout: string; stderr: string }> {
  const command = new Deno.Command(Deno.execPath(), {
    args: ["run", "--quiet", "-A", MAIN, "iova", "plan", ...args],
    env: { NO_COLOR: "1" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  });
  await using child = command.spawn();
  const writer = child.stdin.getWriter();
  // A command that reads no map may have gone before this is written.
  await writer.write(new TextEncoder().encode(stdin)).then(() => writer.close()).catch(() => {});
  const { code, stdout, stderr } = await child.output();
  return { code, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr) };
}

Deno.test("svq iova plan prints guest memory, arenas and free ranges as tables", async () => {
  const regions = ["--region", "0x0+2GiB", "--region", "1TiB+1GiB high"];
  const { code, stdout, stderr } = await svq([...regions, ...RANGE, "--reserved", "0xfee00000-0xfeefffff=msi", "--arena", "8MiB"]);
  assert.equal(stderr, "");
  assert.equal(code, 0);
  assert.equal(
    stdout,
    `NAME         GPA            IOVA          SIZE  PLACEMENT
guest 0x0    0x0            0x0           2GiB  identity
high         0x10000000000  0x7f80000000  1GiB  moved: outside-range
arena rings  -              0x7fff800000  8MiB  top-down

FREE                       SIZE
0x80000000-0xfedfffff      1.98 GiB
0xfef00000-0x7f7fffffff    506 GiB
0x7fc0000000-0x7fff7fffff  1016 MiB

fragmentation 0.006, usable range 0x0-0x7fffffffff
high cannot keep its address: 0x10000000000-0x1003fffffff is outside the usable range 0x0-0x7fffffffff
`,
  );
});

Deno.test("svq iova plan -j reads a map from stdin and prints one svq.iova/1 document", async () => {
  const args = ["-j", "-", ...RANGE, "--asids", "2", "--arena", "rings=1MiB", "--arena", "cvq=4KiB@1", "--region", "4GiB+1GiB=0x80000000"];
  const { code, stdout, stderr } = await svq(args, "00001000-0009fbff : System RAM\n00100000-7fffffff : System RAM\n");
  assert.equal(stderr, "");
  assert.equal(code, 0);
  assert.equal(stdout.trimEnd().split("\n").length, 1);
  const document = JSON.parse(stdout);
  assert.equal(document.schema, "svq.iova/1");
  assert.deepEqual(document.range, { first: "0x0", last: "0x7fffffffff" });
  assert.deepEqual(
    document.regions.map((region: Record<string, unknown>) => [region.gpa, region.iova, region.size_bytes, region.identity]),
    [
      ["0x1000", "0x1000", 0x9e000, true],
      ["0x100000", "0x100000", 0x7ff00000, true],
      ["0x100000000", "0x80000000", 2 ** 30, false],
    ],
  );
  assert.deepEqual(document.allocations.slice(-2), [
    { iova: "0x7ffff00000", size_bytes: 2 ** 20, asid: 0, perm: "rw", tag: "arena rings" },
    { iova: "0x7ffffff000", size_bytes: 4096, asid: 1, perm: "rw", tag: "arena cvq" },
  ]);
});

Deno.test("svq iova plan tells a wrong command line from a layout that is impossible", async () => {
  const cases: [string[], string, number, RegExp][] = [
    [["-"], "0x0-0xfff\n0x1000-1fff\n", 2, /MEMORY_MAP_INVALID.*Line 2 .*hexadecimal numbers begin with 0x/],
    [["-"], "", 2, /MEMORY_MAP_EMPTY/],
    [["/nonexistent/map"], "", 2, /MEMORY_MAP_UNREADABLE.*does not exist/],
    [[], "", 2, /USAGE.*Nothing to lay out/],
    [["--arena", "0"], "", 2, /USAGE.*--arena: Bad arena/],
    [["--region", "0x0+4K", "--range", "0x1000-0x0"], "", 2, /IOVA_INVALID.*--range/],
    [["--region", "0x0+4K", "--align", "100"], "", 2, /IOVA_INVALID.*power of two/],
    [["--arena", "4K@1"], "", 2, /IOVA_NO_SUCH_ASID/],
    [["--region", "0x0+2GiB", "--range", "0x0-0x3fffffff"], "", 1, /IOVA_EXHAUSTED.*0x0-0x3fffffff/],
    [["--region", "0x0+4K", "--region", "0x0+8K"], "", 1, /IOVA_REGION_OVERLAP/],
  ];
  const results = await Promise.all(cases.map(([args, stdin]) => svq(["-j", ...args], stdin)));
  results.forEach(({ code, stdout, stderr }, index) => {
    const [args, , expected, pattern] = cases[index]!;
    assert.match(stderr, pattern, args.join(" "));
    assert.ok(JSON.parse(stderr).error.hint, `no hint for ${args.join(" ")}`);
    assert.equal(code, expected, stderr);
    assert.equal(stdout, "");
  });
});
