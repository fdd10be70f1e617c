import assert from "node:assert/strict";
import { parseJunit } from "../../scripts/_junit.ts";

Deno.test("a JUnit report is counted by passed, failed and skipped, with names unescaped", () => {
  const counts = parseJunit(`<testsuites><testsuite>
    <testcase name="plain" classname="./a.ts" time="0.1">
    </testcase>
    <testcase name="left out (&quot;no root&quot; &amp; no apt)" time="0"><skipped/></testcase>
    <testcase name="broken" time="0"><failure message="x">Error: &lt;skipped/&gt;
    at a_test.ts:1</failure></testcase>
    <testcase name="short form"/>
  </testsuite></testsuites>`);
  assert.deepEqual(counts, {
    passed: 2,
    failed: 1,
    skipped: 1,
    passedNames: ["plain", "short form"],
    skippedNames: ['left out ("no root" & no apt)'],
    failedNames: ["broken"],
    reasons: ["Error: <skipped/>\n    at a_test.ts:1"],
  });
});
