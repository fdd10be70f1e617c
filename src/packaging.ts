/**
 * In which form this program runs.
 *
 * @module
 */

/**
 * `deno-compile`: one file made by `deno compile`; `packed`: one file of a whole runtime and the program; `source`: Deno
 * runs the source files.
 */
export type Packaging = "deno-compile" | "packed" | "source";

/** The form in which this program runs. */
export function packaging(): Packaging {
  if (Deno.build.standalone) return "deno-compile";
  // Set by the code that starts a packed program (scripts/ship/boot.js).
  return (globalThis as Record<symbol, unknown>)[Symbol.for("svq.packaging")] === "packed" ? "packed" : "source";
}

/**
 * How V8 is started: WebAssembly memory is guarded by pages that cannot be accessed instead of by a comparison at each access
 * (docs/security.md). Where DENO_V8_FLAGS is set, that decides, but for what `deno compile` made.
 */
export const V8_FLAGS = "--no-wasm-bounds-checks";
