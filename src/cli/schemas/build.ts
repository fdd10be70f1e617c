/**
 * Building blocks of the documents' JSON schemas (draft 2020-12).
 *
 * @module
 */

/** The part of JSON schema that the documents use. */
export interface JsonSchema {
  /** Dialect, at the root only. */
  $schema?: string;
  /** Name of the document, at the root only. */
  title?: string;
  /** What it means. */
  description?: string;
  /** Type or types. */
  type?: string | readonly string[];
  /** The only value. */
  const?: string;
  /** The only values. */
  enum?: readonly (string | null)[];
  /** For strings. */
  pattern?: string;
  /** For numbers. */
  minimum?: number;
  /** For numbers. */
  maximum?: number;
  /** For arrays. */
  items?: JsonSchema;
  /** For objects. */
  properties?: Readonly<Record<string, JsonSchema>>;
  /** For objects: keys that are always there. */
  required?: readonly string[];
  /** For objects used as maps. */
  additionalProperties?: JsonSchema | boolean;
}

// Marks a key of an object as one that may be absent; JSON.stringify does not print it.
const OPTIONAL = Symbol("optional");
type Markable = JsonSchema & { [OPTIONAL]?: true };

/** Any text. */
export function text(description?: string): JsonSchema {
  return described({ type: "string" }, description);
}

/** A counter below 2^53. */
export function count(description?: string): JsonSchema {
  return described({ type: "integer", minimum: 0 }, description);
}

/** Any number. */
export function number(description?: string): JsonSchema {
  return described({ type: "number" }, description);
}

/** True or false. */
export function flag(description?: string): JsonSchema {
  return described({ type: "boolean" }, description);
}

/** A u64 as `0x…`. */
export function hex(description?: string): JsonSchema {
  return described({ type: "string", pattern: "^0x[0-9a-f]{1,16}$" }, description);
}

/** One of a few words. */
export function choice(values: readonly string[], description?: string): JsonSchema {
  return described({ type: "string", enum: values }, description);
}

/** A list. */
export function list(items: JsonSchema, description?: string): JsonSchema {
  return described({ type: "array", items }, description);
}

/** Keys whose names are data. */
export function map(values: JsonSchema | boolean, description?: string): JsonSchema {
  return described({ type: "object", additionalProperties: values }, description);
}

/** Keys that are known; further ones may be added within a version. */
export function object(properties: Record<string, JsonSchema>, description?: string): JsonSchema {
  const required = Object.keys(properties).filter((key) => (properties[key] as Markable)[OPTIONAL] !== true);
  return described({ type: "object", properties, required }, description);
}

/** A key that may be absent. */
export function optional(schema: JsonSchema): JsonSchema {
  return { ...schema, [OPTIONAL]: true } as Markable;
}

/** Or null: not known, or not applicable. */
export function nullable(schema: JsonSchema): JsonSchema {
  const types = typeof schema.type === "string" ? [schema.type] : schema.type ?? [];
  return { ...schema, type: [...types, "null"], ...(schema.enum === undefined ? {} : { enum: [...schema.enum, null] }) };
}

/** A document with its `schema` key. */
export function document(name: string, description: string, properties: Record<string, JsonSchema>): JsonSchema {
  const body = object({ schema: { const: name }, ...properties }, description);
  return { $schema: "https://json-schema.org/draft/2020-12/schema", title: name, ...body };
}

function described(schema: JsonSchema, description: string | undefined): JsonSchema {
  return description === undefined ? schema : { description, ...schema };
}
