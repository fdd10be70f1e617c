import assert from "node:assert/strict";
import { painter } from "../../src/cli/colour.ts";
import { takeGlobalFlags } from "../../src/cli/globals.ts";
import { Output, printable, toJson } from "../../src/cli/output.ts";
import { Progress } from "../../src/cli/progress.ts";
import { formatFacts, formatTable } from "../../src/cli/table.ts";
import { MemorySink } from "../support/fake_host.ts";

function output(args: string[] = [], terminal = false, env: Record<string, string> = {}) {
  const stdout = new MemorySink(terminal);
  const stderr = new MemorySink(terminal);
  const variable = (name: string) => env[name];
  return { stdout, stderr, output: new Output(stdout, stderr, { ...takeGlobalFlags(args, variable).flags, env: variable }) };
}

Deno.test("tables have an upper-case header, two spaces between columns, numbers to the right and no trailing spaces", () => {
  const text = formatTable(["name", "queues", "state"], [["vm1", 4, "running"], ["long-name", 16, undefined]]);
  assert.equal(text, ["NAME       QUEUES  STATE", "vm1             4  running", "long-name      16  -"].join("\n"));
});

Deno.test("columns keep their width when cells are coloured", () => {
  const paint = painter(true);
  const lines = formatTable(["a", "b"], [[paint.red("xx"), "1"], ["yyy", "2"]]).split("\n");
  assert.equal(lines[1], "\x1b[31mxx\x1b[39m   1");
  assert.equal(lines[2], "yyy  2");
});

Deno.test("a cell cannot break its line or send control characters", () => {
  assert.equal(formatTable(["a"], [["x\ny\x07"]]).split("\n").length, 2);
  assert.equal(printable("a\x1b[2Jb\r\n"), "a\\x1b[2Jb\\x0d\n");
  assert.equal(formatFacts([["name", "x"], ["longer", 5]]), "name    x\nlonger  5");
});

Deno.test("colour comes on a terminal unless NO_COLOR, a dumb terminal or --color=never say otherwise", () => {
  assert.equal(output([], true).output.paint.enabled, true);
  assert.equal(output([], false).output.paint.enabled, false);
  assert.equal(output([], true, { NO_COLOR: "1" }).output.paint.enabled, false);
  assert.equal(output([], true, { NO_COLOR: "" }).output.paint.enabled, true, "an empty NO_COLOR does not count");
  assert.equal(output([], true, { TERM: "dumb" }).output.paint.enabled, false);
  assert.equal(output(["--color=never"], true).output.paint.enabled, false);
  assert.equal(output(["-j", "--color=always"], true).output.paint.enabled, false);
});

Deno.test("JSON has bigint as 0x… and what is not finite as null", () => {
  assert.equal(toJson({ a: 255n, b: -1n, c: Infinity }), '{"a":"0xff","b":"0xffffffffffffffff","c":null}');
  const stream = output(["-j"]);
  stream.output.record({ n: 1 }, () => "one");
  stream.output.record({ n: 2 }, () => "two");
  assert.equal(stream.stdout.text, '{"n":1}\n{"n":2}\n');
});

Deno.test("when the reader of stdout goes away, the command is told once and nothing more is written", () => {
  const { output: printer, stdout } = output();
  let told = 0;
  printer.onClosed = () => told++;
  stdout.broken = true;
  printer.line("a");
  printer.line("b");
  assert.equal(told, 1);
});

Deno.test("progress draws a bar on a terminal and takes it away, on stderr only", () => {
  const { output: printer, stdout, stderr } = output([], true);
  {
    using progress = new Progress(printer, "migrating");
    progress.update(0.5, "round 2");
    progress.update(0.6, "too soon to be drawn");
  }
  assert.match(stderr.text, /^\rmigrating \[#{15}\.{15}\] {2}50% {2}round 2\r +\r$/);
  assert.equal(stdout.text, "");
});

Deno.test("progress is silent at first off a terminal, and always under -j and -q", () => {
  for (const [args, terminal] of [[[], false], [["-j"], true], [["-q"], true]] as const) {
    const { output: printer, stderr } = output([...args], terminal);
    using progress = new Progress(printer, "migrating");
    progress.update(0.5);
    assert.equal(stderr.text, "", args.join(" "));
  }
});
