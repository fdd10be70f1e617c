/**
 * The machine code that runs before the runtime's own first instruction. It finds the process as the kernel and the
 * dynamic linker left it, puts variables into the environment (with libc's setenv, which is ready by then) and words
 * between the program's name and the user's words, and goes on where the runtime begins. Nothing is unpacked and nothing is
 * started a second time, and the kernel goes on showing the command line as the user wrote it.
 *
 * On the stack at that point: argc, argv[0..argc-1], NULL, environment, NULL (System V ABI, process initialisation). The
 * words are put in by moving argc and argv[0] down: everything behind them stays in place.
 *
 * @module
 */

/** What a launcher is made for. Addresses are relative to the load address. */
export interface LauncherPlan {
  /** Where the launcher itself lies. */
  address: number;
  /** The runtime's own first instruction. */
  entry: number;
  /** Where the dynamic linker stores the address of setenv. */
  setenvSlot: number;
  /** Variables to set where the user has not set them. */
  env: Readonly<Record<string, string>>;
  /** Words between the program's name and the user's; their number is even, to keep the stack aligned. */
  words: readonly string[];
}

/** Machine code that refers to strings which are placed behind it. */
class Assembler {
  readonly #code: number[] = [];
  readonly #fixups: { at: number; text: string; patch: (at: number, address: number) => void }[] = [];

  constructor(readonly base: number) {}

  get here(): number {
    return this.base + this.#code.length;
  }

  bytes(...bytes: number[]): void {
    this.#code.push(...bytes);
  }

  word(value: number): void {
    for (let shift = 0; shift < 32; shift += 8) this.#code.push(value >>> shift & 0xff);
  }

  setWord(at: number, value: number): void {
    for (let i = 0; i < 4; i++) this.#code[at + i] = value >>> 8 * i & 0xff;
  }

  get length(): number {
    return this.#code.length;
  }

  /** Will be called with the place and the address of `text`. */
  refer(text: string, patch: (at: number, address: number) => void): void {
    this.#fixups.push({ at: this.#code.length, text, patch });
  }

  /** The code with its strings behind it. */
  finish(): Uint8Array<ArrayBuffer> {
    const places = new Map<string, number>();
    const strings: Uint8Array[] = [];
    let end = this.#code.length;
    for (const { text } of this.#fixups) {
      if (places.has(text)) continue;
      places.set(text, this.base + end);
      const bytes = new TextEncoder().encode(text + "\0");
      strings.push(bytes);
      end += bytes.length;
    }
    for (const { at, text, patch } of this.#fixups) patch(at, places.get(text)!);
    const result = new Uint8Array(end);
    result.set(this.#code);
    let at = this.#code.length;
    for (const bytes of strings) {
      result.set(bytes, at);
      at += bytes.length;
    }
    return result;
  }
}

function checked(value: number, bits: number, what: string): number {
  const limit = 2 ** (bits - 1);
  if (value < -limit || value >= limit) throw new Error(`${what} is out of reach`);
  return value;
}

function x86(plan: LauncherPlan): Uint8Array<ArrayBuffer> {
  const { entry, setenvSlot, env, words } = plan;
  const code = new Assembler(plan.address);
  // Displacements count from the end of the instruction; here the displacement is its last part.
  const relative = (opcode: number[], target: number) => {
    code.bytes(...opcode);
    code.word(checked(target - (code.here + 4), 32, "an address"));
  };
  const lea = (opcode: number[], text: string) => {
    code.bytes(...opcode);
    code.refer(text, (at, address) => code.setWord(at, address - (code.base + at + 4)));
    code.word(0);
  };
  code.bytes(0x52); // push rdx: the linker's function for the end of the process
  code.bytes(0x48, 0x83, 0xec, 0x08); // sub rsp, 8
  for (const [name, value] of Object.entries(env)) {
    lea([0x48, 0x8d, 0x3d], name); // lea rdi, [rip + name]
    lea([0x48, 0x8d, 0x35], value); // lea rsi, [rip + value]
    code.bytes(0x31, 0xd2); // xor edx, edx: do not overwrite
    relative([0xff, 0x15], setenvSlot); // call [rip + slot]
  }
  code.bytes(0x48, 0x83, 0xc4, 0x08); // add rsp, 8
  code.bytes(0x5a); // pop rdx
  code.bytes(0x48, 0x8b, 0x04, 0x24); // mov rax, [rsp]
  code.bytes(0x48, 0x8b, 0x4c, 0x24, 0x08); // mov rcx, [rsp + 8]
  code.bytes(0x48, 0x81, 0xec); // sub rsp, 8 * words
  code.word(8 * words.length);
  code.bytes(0x48, 0x83, 0xc0, words.length); // add rax, words
  code.bytes(0x48, 0x89, 0x04, 0x24); // mov [rsp], rax
  code.bytes(0x48, 0x89, 0x4c, 0x24, 0x08); // mov [rsp + 8], rcx
  for (const [index, word] of words.entries()) {
    lea([0x48, 0x8d, 0x05], word); // lea rax, [rip + word]
    code.bytes(0x48, 0x89, 0x84, 0x24); // mov [rsp + 16 + 8 * index], rax
    code.word(16 + 8 * index);
  }
  relative([0xe9], entry); // jmp entry
  return code.finish();
}

function arm(plan: LauncherPlan): Uint8Array<ArrayBuffer> {
  const { entry, setenvSlot, env, words } = plan;
  const code = new Assembler(plan.address);
  const adr = (register: number, text: string) => {
    code.refer(text, (at, address) => {
      const distance = checked(address - (code.base + at), 21, "a string");
      code.setWord(at, (0x10000000 | (distance & 3) << 29 | (distance >> 2 & 0x7ffff) << 5 | register) >>> 0);
    });
    code.word(0);
  };
  code.word(0xd10043ff); // sub sp, sp, 16
  code.word(0xf90003e0); // str x0, [sp]: the linker's function for the end of the process
  for (const [name, value] of Object.entries(env)) {
    adr(0, name);
    adr(1, value);
    code.word(0x52800002); // mov w2, 0: do not overwrite
    const pages = checked(Math.floor(setenvSlot / 4096) - Math.floor(code.here / 4096), 21, "setenv");
    code.word((0x90000010 | (pages & 3) << 29 | (pages >> 2 & 0x7ffff) << 5) >>> 0); // adrp x16, slot
    code.word((0xf9400210 | (setenvSlot % 4096 / 8) << 10) >>> 0); // ldr x16, [x16, slot]
    code.word(0xd63f0200); // blr x16
  }
  code.word(0xf94003e0); // ldr x0, [sp]
  code.word(0x910043ff); // add sp, sp, 16
  code.word(0xf94003e1); // ldr x1, [sp]
  code.word(0xf94007e2); // ldr x2, [sp, 8]
  code.word((0xd10003ff | 8 * words.length << 10) >>> 0); // sub sp, sp, 8 * words
  code.word((0x91000021 | words.length << 10) >>> 0); // add x1, x1, words
  code.word(0xf90003e1); // str x1, [sp]
  code.word(0xf90007e2); // str x2, [sp, 8]
  for (const [index, word] of words.entries()) {
    adr(3, word);
    code.word((0xf90003e3 | (2 + index) << 10) >>> 0); // str x3, [sp, 16 + 8 * index]
  }
  const distance = checked((entry - code.here) / 4, 26, "the runtime");
  code.word((0x14000000 | distance & 0x3ffffff) >>> 0); // b entry
  return code.finish();
}

/** The launcher's bytes, its first instruction first. @throws Error where something is out of reach */
export function assembleLauncher(machine: "x86_64" | "aarch64", plan: LauncherPlan): Uint8Array<ArrayBuffer> {
  if (plan.words.length % 2 !== 0 || plan.words.length > 120) throw new Error("the number of words must be even, and at most 120");
  return machine === "x86_64" ? x86(plan) : arm(plan);
}
