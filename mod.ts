/**
 * svq as a library: live migration of vhost and vDPA devices in software, through shadow virtqueues.
 *
 * @module
 */
export * from "./src/errors.ts";
export * from "./src/iova/mod.ts";
export * from "./src/memory/region.ts";
export * from "./src/vhost/backend.ts";
export * from "./src/vring/queue.ts";
