/**
 * Files of Ethernet frames in the classic pcap format, which DPDK's pcap driver reads and writes. Source: the
 * pcap-savefile(5) manual page.
 *
 * @module
 */
const MAGIC = 0xa1b2_c3d4;
const LINKTYPE_ETHERNET = 1;
const FILE_HEADER_BYTES = 24;
const RECORD_HEADER_BYTES = 16;

/** A file that holds the frames, in order. */
export function encodePcap(frames: readonly Uint8Array[]): Uint8Array {
  const bytes = new Uint8Array(FILE_HEADER_BYTES + frames.reduce((sum, frame) => sum + RECORD_HEADER_BYTES + frame.length, 0));
  const view = new DataView(bytes.buffer);
  view.setUint32(0, MAGIC, true);
  view.setUint16(4, 2, true);
  view.setUint16(6, 4, true);
  view.setUint32(16, 65_535, true);
  view.setUint32(20, LINKTYPE_ETHERNET, true);
  let at = FILE_HEADER_BYTES;
  for (const frame of frames) {
    view.setUint32(at + 8, frame.length, true);
    view.setUint32(at + 12, frame.length, true);
    bytes.set(frame, at + RECORD_HEADER_BYTES);
    at += RECORD_HEADER_BYTES + frame.length;
  }
  return bytes;
}

/** The frames of a file, which may still be growing: a frame that is not there to its end is left out. */
export function decodePcap(bytes: Uint8Array): Uint8Array[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const frames: Uint8Array[] = [];
  for (let at = FILE_HEADER_BYTES; at + RECORD_HEADER_BYTES <= bytes.length;) {
    const end = at + RECORD_HEADER_BYTES + view.getUint32(at + 8, true);
    if (end > bytes.length) break;
    frames.push(bytes.slice(at + RECORD_HEADER_BYTES, end));
    at = end;
  }
  return frames;
}
