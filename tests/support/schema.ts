/**
 * Holds documents against the schemas that `svq schema` prints.
 *
 * @module
 */
import assert from "node:assert/strict";
import { findSchema, type JsonSchema } from "../../src/cli/schemas/mod.ts";

/**
 * Fails, naming each place, when `document` does not have the shape of `name`.
 *
 * @param name `probe`, `svq.probe/1`, or `error`
 * @param document parsed JSON, or its text
 */
export function assertMatchesSchema(name: string, document: unknown): void {
  const schema = findSchema(name);
  assert.ok(schema !== undefined, `There is no schema named ${name}`);
  const problems = schemaProblems(schema, typeof document === "string" ? JSON.parse(document) : document);
  assert.deepEqual(problems, [], `Not a ${schema.title} document`);
}

/** What is wrong with `value`, with paths; empty when nothing is. Knows the keywords of {@linkcode JsonSchema} only. */
export function schemaProblems(schema: JsonSchema, value: unknown, path = "$"): string[] {
  const problems: string[] = [];
  const types = schema.type === undefined ? [] : typeof schema.type === "string" ? [schema.type] : schema.type;
  const actual = typeOf(value);
  if (types.length > 0 && !types.includes(actual) && !(actual === "integer" && types.includes("number"))) {
    return [`${path} is ${actual}, not ${types.join(" or ")}`];
  }
  if (schema.const !== undefined && value !== schema.const) problems.push(`${path} is ${JSON.stringify(value)}, not ${schema.const}`);
  if (schema.enum !== undefined && !schema.enum.includes(value as string | null)) {
    problems.push(`${path} is ${JSON.stringify(value)}, not one of ${schema.enum.join(", ")}`);
  }
  if (typeof value === "string" && schema.pattern !== undefined && !new RegExp(schema.pattern).test(value)) {
    problems.push(`${path} is ${JSON.stringify(value)}, not like ${schema.pattern}`);
  }
  if (typeof value === "number") {
    if (schema.minimum !== undefined && value < schema.minimum) problems.push(`${path} is below ${schema.minimum}`);
    if (schema.maximum !== undefined && value > schema.maximum) problems.push(`${path} is above ${schema.maximum}`);
  }
  if (Array.isArray(value) && schema.items !== undefined) {
    value.forEach((item, index) => problems.push(...schemaProblems(schema.items!, item, `${path}[${index}]`)));
  }
  if (actual === "object") {
    const record = value as Record<string, unknown>;
    for (const key of schema.required ?? []) if (!(key in record)) problems.push(`${path}.${key} is missing`);
    for (const [key, item] of Object.entries(record)) {
      const known = schema.properties?.[key] ?? (typeof schema.additionalProperties === "object" ? schema.additionalProperties : undefined);
      if (known !== undefined) problems.push(...schemaProblems(known, item, `${path}.${key}`));
    }
  }
  return problems;
}

function typeOf(value: unknown): string {
  if (value === null) return "null";
  if (Array.isArray(value)) return "array";
  if (typeof value === "number") return Number.isSafeInteger(value) ? "integer" : "number";
  return typeof value;
}
