/**
 * Stores that another thread or process orders by. Sequentially consistent: whoever sees one sees what was stored before it.
 * The test of the in-flight record builds the module with another version of this file, which can stop it in front of each.
 */

// @ts-ignore: decorator
@inline
export function store8(at: u32, value: u32): void {
  atomic.store<u8>(at, <u8>value);
}

// @ts-ignore: decorator
@inline
export function store16(at: u32, value: u32): void {
  atomic.store<u16>(at, <u16>value);
}

// @ts-ignore: decorator
@inline
export function store32(at: u32, value: u32): void {
  atomic.store<u32>(at, value);
}
