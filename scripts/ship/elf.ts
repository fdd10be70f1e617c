/**
 * What packing needs of ELF: where an executable begins, where the dynamic linker puts the address of a libc function, and
 * a way to add one segment. Only position-independent 64-bit little-endian executables, which every Deno build is.
 *
 * Layouts: System V gABI, chapters 4 and 5.
 *
 * @module
 */

/** Machines that a launcher exists for, by e_machine. */
export const MACHINES: Readonly<Record<number, "x86_64" | "aarch64">> = { 62: "x86_64", 183: "aarch64" };

const PT_LOAD = 1;
const PT_DYNAMIC = 2;
const PT_NOTE = 4;
const PF_X = 1;
const PF_R = 4;
const DT_NULL = 0;
const DT_PLTRELSZ = 2;
const DT_STRTAB = 5;
const DT_SYMTAB = 6;
const DT_RELA = 7;
const DT_RELASZ = 8;
const DT_JMPREL = 23;
const EHDR_SIZE = 64;
const PHDR_SIZE = 56;
const RELA_SIZE = 24;
const SYM_SIZE = 24;
// R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT; R_AARCH64_GLOB_DAT, R_AARCH64_JUMP_SLOT
const SLOT_RELOCATIONS = new Set([6, 7, 1025, 1026]);

interface Segment {
  /** Where its header lies in the file. */
  at: number;
  type: number;
  offset: number;
  vaddr: number;
  fileSize: number;
  memorySize: number;
}

/** A position-independent executable in memory. */
export class ElfImage {
  /** The file's bytes. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #view: DataView;
  readonly #segments: Segment[] = [];

  /** Reads the headers. @throws Error where the file is no executable of the kind described above */
  constructor(bytes: Uint8Array<ArrayBuffer>) {
    this.bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    if (bytes.length < EHDR_SIZE || this.#view.getUint32(0) !== 0x7f454c46) throw new Error("not an ELF file");
    if (bytes[4] !== 2 || bytes[5] !== 1 || this.#view.getUint16(16, true) !== 3) {
      throw new Error("not a position-independent 64-bit little-endian executable");
    }
    if (this.#view.getUint16(54, true) !== PHDR_SIZE) throw new Error("odd program headers");
    const table = this.#number(32);
    for (let i = 0; i < this.#view.getUint16(56, true); i++) {
      const at = table + i * PHDR_SIZE;
      this.#segments.push({
        at,
        type: this.#view.getUint32(at, true),
        offset: this.#number(at + 8),
        vaddr: this.#number(at + 16),
        fileSize: this.#number(at + 32),
        memorySize: this.#number(at + 40),
      });
    }
  }

  #number(at: number): number {
    return Number(this.#view.getBigUint64(at, true));
  }

  /** `x86_64` or `aarch64`. @throws Error for any other machine */
  get machine(): "x86_64" | "aarch64" {
    const machine = MACHINES[this.#view.getUint16(18, true)];
    if (machine === undefined) throw new Error(`no launcher for ELF machine ${this.#view.getUint16(18, true)}`);
    return machine;
  }

  /** Address of the first instruction, relative to the load address. */
  get entry(): number {
    return this.#number(24);
  }

  /** The first address, a multiple of `align`, behind everything that is loaded. */
  endAddress(align: number): number {
    const ends = this.#segments.filter(({ type }) => type === PT_LOAD).map(({ vaddr, memorySize }) => vaddr + memorySize);
    return Math.ceil(Math.max(...ends) / align) * align;
  }

  #offsetOf(vaddr: number): number {
    const segment = this.#segments.find((s) => s.type === PT_LOAD && vaddr >= s.vaddr && vaddr < s.vaddr + s.fileSize);
    if (segment === undefined) throw new Error(`nothing is loaded at 0x${vaddr.toString(16)}`);
    return segment.offset + vaddr - segment.vaddr;
  }

  /** Address of the slot in which the dynamic linker stores where the imported function `name` is. @throws Error if there is none */
  importSlot(name: string): number {
    const dynamic = this.#segments.find(({ type }) => type === PT_DYNAMIC);
    if (dynamic === undefined) throw new Error("a statically linked executable");
    const entries = new Map<number, number>();
    for (let at = dynamic.offset; this.#number(at) !== DT_NULL; at += 16) entries.set(this.#number(at), this.#number(at + 8));
    const strings = this.#offsetOf(entries.get(DT_STRTAB)!);
    const symbols = this.#offsetOf(entries.get(DT_SYMTAB)!);
    for (const [table, size] of [[DT_RELA, DT_RELASZ], [DT_JMPREL, DT_PLTRELSZ]] as const) {
      if (!entries.has(table)) continue;
      const begin = this.#offsetOf(entries.get(table)!);
      for (let at = begin; at < begin + entries.get(size)!; at += RELA_SIZE) {
        if (!SLOT_RELOCATIONS.has(this.#view.getUint32(at + 8, true))) continue;
        const symbol = symbols + this.#view.getUint32(at + 12, true) * SYM_SIZE;
        if (this.#text(strings + this.#view.getUint32(symbol, true)) === name) return this.#number(at);
      }
    }
    throw new Error(`does not import ${name}`);
  }

  #text(at: number): string {
    return new TextDecoder().decode(this.bytes.subarray(at, this.bytes.indexOf(0, at)));
  }

  /**
   * Makes `content`, which lies at `offset` of the final file, a readable and executable segment at `vaddr`, and the
   * program begin at `entry`. The header of the notes (the build id) is given up for it.
   *
   * @throws Error where there is no header to give up
   */
  addSegment({ offset, vaddr, size, align, entry }: { offset: number; vaddr: number; size: number; align: number; entry: number }): void {
    // Loadable segments must stay in the order of their addresses, and this one is the highest.
    const last = this.#segments.findLastIndex(({ type }) => type === PT_LOAD);
    const spare = this.#segments.findIndex(({ type }, index) => type === PT_NOTE && index > last);
    if (spare < 0) throw new Error("no program header to spare");
    const { at } = this.#segments[spare]!;
    this.#view.setUint32(at, PT_LOAD, true);
    this.#view.setUint32(at + 4, PF_R | PF_X, true);
    for (const [index, value] of [offset, vaddr, vaddr, size, size, align].entries()) {
      this.#view.setBigUint64(at + 8 + index * 8, BigInt(value), true);
    }
    this.#view.setBigUint64(24, BigInt(entry), true);
  }
}
