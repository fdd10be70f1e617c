/**
 * The version, kept in deno.json only.
 *
 * @module
 */
import config from "../deno.json" with { type: "json" };

/** Version of svq, e.g. `0.1.0`. */
export const VERSION: string = config.version;
