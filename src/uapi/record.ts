/**
 * What the record decoders of this room share.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/**
 * A view over a private copy of `bytes`, padded with zeros to `size`.
 *
 * @param what for the message
 * @param bytes as received
 * @param size bytes that the record has
 * @param least fewest bytes accepted
 * @throws SvqError BAD_RECORD when there are too few bytes, or more than 4096
 */
export function checkRecord(what: string, bytes: Uint8Array, size: number, least: number): DataView<ArrayBuffer> {
  if (bytes.length < least || bytes.length > 4096) {
    throw new SvqError("BAD_RECORD", `A ${what} has ${size} bytes, not ${bytes.length}`);
  }
  const copy = new Uint8Array(Math.max(size, bytes.length));
  copy.set(bytes);
  return new DataView(copy.buffer);
}

/** Bytes of an unsigned little-endian field. */
export type FieldBytes = 1 | 2 | 4 | 8;

/** Reads a field. 64-bit values beyond 2^53 lose low bits: they stay out of every range that is checked. */
export function getField(view: DataView, offset: number, bytes: FieldBytes): number {
  switch (bytes) {
    case 1:
      return view.getUint8(offset);
    case 2:
      return view.getUint16(offset, true);
    case 4:
      return view.getUint32(offset, true);
    case 8:
      return view.getUint32(offset, true) + 0x1_0000_0000 * view.getUint32(offset + 4, true);
  }
}

/** Writes a field, a non-negative integer below 2^53. */
export function putField(view: DataView, offset: number, bytes: FieldBytes, value: number): void {
  switch (bytes) {
    case 1:
      return view.setUint8(offset, value);
    case 2:
      return view.setUint16(offset, value, true);
    case 4:
      return view.setUint32(offset, value, true);
    case 8:
      return view.setBigUint64(offset, BigInt(value), true);
  }
}

/** Name, offset and width of every number in a record. */
export type FieldTable<T> = readonly (readonly [keyof T & string, number, FieldBytes])[];

/** Reads all fields of a table. */
export function getFields<T>(view: DataView, fields: FieldTable<T>): Record<string, number> {
  return Object.fromEntries(fields.map(([name, offset, bytes]) => [name, getField(view, offset, bytes)]));
}

/** Writes all fields of a table; what `values` leaves out is 0. */
export function putFields<T>(view: DataView, fields: FieldTable<T>, values: Partial<T>): void {
  for (const [name, offset, bytes] of fields) putField(view, offset, bytes, Number(values[name] ?? 0));
}
