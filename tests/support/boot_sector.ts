/**
 * A boot sector of 512 bytes: a guest that writes disk sectors 1 to N through the BIOS, reads each back and compares. It
 * writes a dot per sector to the first serial port, then K (all were right) or F, and ends its QEMU through isa-debug-exit.
 * An endless one does rounds, each with the next fill byte, and ends after the round in which a character comes at the
 * serial port.
 */

/** What QEMU exits with after K: (0x10 << 1) | 1. */
export const BOOT_OK = 33;

type Piece = number | { label: string } | { near: string } | { short: string };

const label = (name: string): Piece => ({ label: name });
const call = (name: string): Piece[] => [0xe8, { near: name }];
const jump = (opcode: number, name: string): Piece[] => [opcode, { short: name }];
const storeWord = (address: number, value: number): Piece[] => [0xc7, 0x06, address & 255, address >> 8, value & 255, value >> 8];

const DRIVE = 0x600;
const ROUND = 0x602;
const PACKET = 0x610;
const FILL = 0xa5;

/** Byte at every odd offset of a sector that the guest wrote (in its first round); the even ones hold the sector's number. */
export const FILL_BYTE = FILL;

// Unless a character waits: the next fill byte, from sector 1 again.
const ANOTHER_ROUND: Piece[] = [
  ...[0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01],
  ...jump(0x75, "done"),
  ...[0xfe, 0x06, ROUND & 255, ROUND >> 8, 0xbb, 0x01, 0x00],
  ...jump(0xeb, "next"),
];

function program(sectors: number, endless: boolean): Piece[] {
  return [
    // Segments, stack, upwards; the BIOS gives the drive in DL.
    ...[0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfc],
    ...[0x88, 0x16, DRIVE & 255, DRIVE >> 8, 0xc6, 0x06, ROUND & 255, ROUND >> 8, FILL],
    // BX: sector.
    ...[0xbb, 0x01, 0x00],
    label("next"),
    // 256 words of fill:BL at 0x8000.
    ...[0xbf, 0x00, 0x80, 0xb9, 0x00, 0x01, 0x88, 0xd8, 0x8a, 0x26, ROUND & 255, ROUND >> 8, 0xf3, 0xab],
    // Write them (43h), read them (42h) to 0x8200.
    ...[0xb8, 0x00, 0x80, 0xb6, 0x43],
    ...call("disk"),
    ...jump(0x72, "fail"),
    ...[0xb8, 0x00, 0x82, 0xb6, 0x42],
    ...call("disk"),
    ...jump(0x72, "fail"),
    ...[0xbe, 0x00, 0x80, 0xbf, 0x00, 0x82, 0xb9, 0x00, 0x01, 0xf3, 0xa7],
    ...jump(0x75, "fail"),
    ...[0xb0, 0x2e],
    ...call("put"),
    ...[0x43, 0x80, 0xfb, sectors + 1],
    ...jump(0x75, "next"),
    ...(endless ? ANOTHER_ROUND : []),
    label("done"),
    ...[0xb0, 0x4b],
    ...call("put"),
    ...[0xb0, 0x10],
    ...jump(0xeb, "exit"),
    label("fail"),
    ...[0xb0, 0x46],
    ...call("put"),
    ...[0xb0, 0x11],
    label("exit"),
    ...[0xe6, 0xf4, 0xf4],
    ...jump(0xeb, "exit"),
    // One sector, number BX, at AX; function DH of INT 13h with its packet at DS:SI.
    label("disk"),
    ...[0xa3, (PACKET + 4) & 255, PACKET >> 8],
    ...storeWord(PACKET, 0x10),
    ...storeWord(PACKET + 2, 1),
    ...storeWord(PACKET + 6, 0),
    ...[0x89, 0x1e, (PACKET + 8) & 255, PACKET >> 8],
    ...storeWord(PACKET + 10, 0),
    ...storeWord(PACKET + 12, 0),
    ...storeWord(PACKET + 14, 0),
    ...[0xbe, PACKET & 255, PACKET >> 8, 0x88, 0xf4, 0x8a, 0x16, DRIVE & 255, DRIVE >> 8, 0xb0, 0x00],
    ...[0x53, 0xcd, 0x13, 0x5b, 0xc3],
    // AL to the serial port.
    label("put"),
    ...[0xba, 0xf8, 0x03, 0xee, 0xc3],
  ];
}

/** The boot sector. @param sectors how many are written, 1 to 254 */
export function bootSector(sectors: number, endless = false): Uint8Array<ArrayBuffer> {
  const places = new Map<string, number>();
  const pieces = program(sectors, endless);
  let at = 0;
  for (const piece of pieces) {
    if (typeof piece === "number") at += 1;
    else if ("label" in piece) places.set(piece.label, at);
    else at += "near" in piece ? 2 : 1;
  }
  const bytes = new Uint8Array(512);
  const view = new DataView(bytes.buffer);
  at = 0;
  for (const piece of pieces) {
    if (typeof piece === "number") bytes[at++] = piece;
    else if ("near" in piece) {
      view.setInt16(at, places.get(piece.near)! - (at + 2), true);
      at += 2;
    } else if ("short" in piece) {
      view.setInt8(at, places.get(piece.short)! - (at + 1));
      at += 1;
    }
  }
  bytes[510] = 0x55;
  bytes[511] = 0xaa;
  return bytes;
}
