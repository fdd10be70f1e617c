/**
 * IOVA: ranges, the allocator, the layout of guest memory and shadow rings, translation, memory maps.
 *
 * @module
 */
export * from "./allocation.ts";
export * from "./allocator.ts";
export * from "./document.ts";
export * from "./memory_map.ts";
export * from "./plan.ts";
export * from "./range.ts";
export * from "./translation.ts";
