import assert from "node:assert/strict";
import type { SvqError } from "../../src/errors.ts";

/** For `assert.throws` and `assert.rejects`: an error with this code whose message or hint matches. */
export function withCode(code: string, text: RegExp): (error: SvqError) => true {
  return (error) => {
    assert.equal(error.code, code, error.stack);
    assert.match(`${error.message}\n${error.hint}`, text);
    return true;
  };
}
