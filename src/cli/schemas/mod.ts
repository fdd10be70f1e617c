/**
 * JSON schemas of everything that svq prints under `-j`. Keys may be added within a version, never changed.
 *
 * @module
 */
import { choice, count, document, flag, type JsonSchema, list, object, optional, text } from "./build.ts";
import { DEVICE_SCHEMAS } from "./devices.ts";
import { RELAY_SCHEMAS } from "./relays.ts";

export type { JsonSchema } from "./build.ts";

const error: JsonSchema = {
  $schema: "https://json-schema.org/draft/2020-12/schema",
  title: "error",
  ...object({
    error: object({
      code: text("Stable name"),
      message: text("One sentence"),
      hint: optional(text("What to do about it")),
      errno: optional(count("Linux errno")),
      syscall: optional(text("System call or ioctl that failed")),
    }),
  }, "The one line that a failed command prints to stderr under -j"),
};

/** All schemas by document name. */
export const SCHEMAS: Readonly<Record<string, JsonSchema>> = {
  ...DEVICE_SCHEMAS,
  ...RELAY_SCHEMAS,
  "svq.doctor/1": document("svq.doctor/1", "Readiness of this host", {
    purposes: list(choice(["user", "kernel", "vduse"]), "What the host was asked to be ready for"),
    ready: flag("Nothing required is missing"),
    checks: list(object({
      name: text("Stable name"),
      status: choice(["ok", "missing", "unknown"]),
      required: flag("Missing, it makes the host not ready"),
      found: text("What was found"),
      remedy: optional(text("What to do about it")),
    })),
  }),
  "svq.schemas/1": document("svq.schemas/1", "Names of the documents", {
    documents: list(object({ name: text(), description: text() })),
  }),
  "svq.version/1": document("svq.version/1", "Versions of svq and of the runtime under it", {
    version: text(),
    deno: text(),
    v8: text(),
    typescript: text(),
    packaging: choice(["source", "deno-compile", "packed"]),
    target: text("Target triple"),
  }),
  error,
};

/** The schema of a document by full name (`svq.probe/1`) or short name (`probe`, `bench.ring`). */
export function findSchema(name: string): JsonSchema | undefined {
  if (Object.hasOwn(SCHEMAS, name)) return SCHEMAS[name];
  const full = `svq.${name}/1`;
  return Object.hasOwn(SCHEMAS, full) ? SCHEMAS[full] : undefined;
}
