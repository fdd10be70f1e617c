/**
 * Survives memory that shrinks. Whoever shortens a file that this process has mapped takes its pages away: the next touch is
 * SIGBUS, and that ends a process. No JavaScript can run in a signal handler, so this one is machine code, written out below, in a
 * page of its own: it looks whether the address lies in memory that is registered here, puts a page of zeros in its place (mmap,
 * MAP_FIXED), counts, signals an eventfd, and returns to the instruction, which succeeds. For any other address, and for
 * broken memory modules, it puts back the handler that was there before.
 *
 * The signal's disposition belongs to the process: other threads find the table behind the handler's address.
 *
 * @module
 */
import { createEventfd, drainEventfd } from "./eventfd.ts";
import type { OwnedFd } from "./fd.ts";
import { bufferAt, libc, pointer } from "./libc.ts";
import { cancelWaits, ReactorCancelled, readable } from "./reactor.ts";

const SIGBUS = 7;
const SA_SIGINFO = 4;
const SA_RESTORER = 0x0400_0000;
const SA_ONSTACK = 0x0800_0000;
const SA_RESTART = 0x1000_0000;
/** struct sigaction of glibc: handler, 128 bytes of mask, flags, restorer. */
const SIGACTION_BYTES = 152;
const PAGE = 4096;
const READ_WRITE = 3;
const READ_EXEC = 5;
const PRIVATE_ANONYMOUS = 0x22;

// The page behind the code:
const MAGIC = 0x7376_7162_7573_0001n;
const FAULTS = 8;
const EVENT = 24;
const ONE = 32;
/** What the kernel's sigaction takes: handler, flags, restorer, mask. */
const BEFORE = 40;
const SLOTS = 128;
const SLOT_COUNT = 1024;
const DATA_BYTES = 5 * PAGE;

/*
 * In words, for both processors; `data` is the page behind the code, `info` the second argument (siginfo_t):
 *
 *     if info.si_code (offset 8) is not BUS_ADRERR (2): restore
 *     for each of 1024 slots (start, end) at data + 128: if start <= info.si_addr (offset 16) < end: found
 *     restore: rt_sigaction(SIGBUS, data + 40, NULL, 8); return
 *     found: data[8] += 1 (atomic); data[16] = si_addr
 *            mmap(si_addr & -4096, 4096, READ|WRITE, PRIVATE|ANONYMOUS|FIXED, -1, 0), on failure restore
 *            write(data[24], data + 32, 8); return
 */
const CODE: Partial<Record<typeof Deno.build.arch, string>> = {
  x86_64: "4c8d0df90f0000837e08027523488b7e104d8d9180000000b900040000493b3a7206493b7a0872214983c210ffc975edbf07000000498d712831d2" +
    "41ba08000000b80d0000000f05c3f041ff41084989791041514881e700f0ffffbe00100000ba0300000041ba3200000049c7c0ffffffff4531c9b8" +
    "090000000f0541594839f875ad418b7918498d7120ba08000000b8010000000f05c3",
  aarch64: "09800010230840b97f08007161010054200840f92a0102910b8080524c35c1a81f000ceb630000541f000deb430100546b05007141ffff54e00080d2" +
    "21a10091020080d2030180d2c81080d2010000d4c0035fd6200900f92a2100914c7d5f888c0500114c7d0d88adffff350ecc7492e0030eaa010082d2" +
    "620080d2430680d204008092050080d2c81b80d2010000d41f000eeb21fdff54201940b921810091020180d2080880d2010000d4c0035fd6",
};

/** The table behind the handler. */
class BusGuard {
  readonly #slots: BigUint64Array;
  readonly #words: Int32Array;

  constructor(data: number) {
    const buffer = bufferAt(data, DATA_BYTES);
    this.#slots = new BigUint64Array(buffer, SLOTS, 2 * SLOT_COUNT);
    this.#words = new Int32Array(buffer, 0, PAGE / 4);
  }

  get faults(): number {
    return Atomics.load(this.#words, FAULTS / 4);
  }

  set event(fd: number) {
    Atomics.store(this.#words, EVENT / 4, fd);
  }

  /** @returns false when all slots are taken: the memory is used without a guard */
  add(start: number, size: number): boolean {
    const slots = this.#slots;
    for (let i = 0; i < slots.length; i += 2) {
      // A slot that starts at 1 and ends at 0 holds no address: it is taken, and not valid yet.
      if (Atomics.load(slots, i) !== 0n || Atomics.compareExchange(slots, i, 0n, 1n) !== 0n) continue;
      Atomics.store(slots, i + 1, BigInt(start + size));
      Atomics.store(slots, i, BigInt(start));
      return true;
    }
    return false;
  }

  remove(start: number): void {
    const slots = this.#slots;
    for (let i = 0; i < slots.length; i += 2) {
      if (Atomics.load(slots, i) !== BigInt(start)) continue;
      Atomics.store(slots, i + 1, 0n);
      Atomics.store(slots, i, 0n);
      return;
    }
  }
}

let guard: BusGuard | null | undefined;

function handlerNow(): { address: number; record: DataView<ArrayBuffer> } {
  const record = new Uint8Array(SIGACTION_BYTES);
  libc().sigaction(SIGBUS, null, record);
  const view = new DataView(record.buffer);
  return { address: Number(view.getBigUint64(0, true)), record: view };
}

/** Is `[address, address + PAGE)` private memory of these rights? The kernel shows neighbours of equal rights as one: any line may hold it. */
function isAnonymous(maps: readonly string[], address: number, rights: string): boolean {
  return maps.some((line) => {
    const [range = "", mode, , device] = line.split(" ", 4);
    const [start = 0, end = 0] = range.split("-").map((part) => parseInt(part, 16));
    return mode === rights && device === "00:00" && start <= address && address + PAGE <= end;
  });
}

/** Has another thread installed the handler at `address`? Then it fills a page of its own, and the page behind it begins with the magic number. */
function isOurs(address: number): boolean {
  if (address % PAGE !== 0 || address === 0) return false;
  const maps = Deno.readTextFileSync("/proc/self/maps").split("\n");
  if (!isAnonymous(maps, address, "r-xp") || !isAnonymous(maps, address + PAGE, "rw-p")) return false;
  return new BigUint64Array(bufferAt(address + PAGE, 8))[0] === MAGIC;
}

function install(): BusGuard | null {
  const code = CODE[Deno.build.arch];
  if (code === undefined || Deno.build.os !== "linux") return null;
  const before = handlerNow();
  if (isOurs(before.address)) return new BusGuard(before.address + PAGE);
  const mapped = libc().mmap(null, BigInt(PAGE + DATA_BYTES), READ_WRITE, PRIVATE_ANONYMOUS, -1, 0n);
  const base = Number(Deno.UnsafePointer.value(mapped));
  if (base <= 0 || base > 2 ** 52) return null;
  const bytes = new Uint8Array(bufferAt(base, PAGE + DATA_BYTES));
  bytes.set(Uint8Array.fromHex(code));
  const data = new DataView(bytes.buffer, PAGE);
  data.setBigUint64(0, MAGIC, true);
  data.setInt32(EVENT, -1, true);
  data.setBigUint64(ONE, 1n, true);
  data.setBigUint64(BEFORE, before.record.getBigUint64(0, true), true);
  data.setBigUint64(BEFORE + 8, BigInt(before.record.getUint32(136, true) | SA_RESTORER), true);
  data.setBigUint64(BEFORE + 16, before.record.getBigUint64(144, true), true);
  data.setBigUint64(BEFORE + 24, before.record.getBigUint64(8, true), true);
  const record = new Uint8Array(SIGACTION_BYTES);
  const view = new DataView(record.buffer);
  view.setBigUint64(0, BigInt(base), true);
  view.setUint32(136, SA_SIGINFO | SA_ONSTACK | SA_RESTART, true);
  const replaced = new Uint8Array(SIGACTION_BYTES);
  const usable = libc().mprotect(pointer(base), BigInt(PAGE), READ_EXEC) === 0 && libc().sigaction(SIGBUS, record, replaced) === 0;
  const other = Number(new DataView(replaced.buffer).getBigUint64(0, true));
  if (usable && other !== before.address && isOurs(other)) {
    // Another thread was faster by a moment: its table holds for both. This page stays mapped, some thread may be in it.
    libc().sigaction(SIGBUS, replaced, null);
    return new BusGuard(other + PAGE);
  }
  if (usable) return new BusGuard(base + PAGE);
  libc().munmap(pointer(base), BigInt(PAGE + DATA_BYTES));
  return null;
}

/** Is there a guard on this machine? Not where the kernel refuses pages that can be executed, or for another processor. */
export function busGuardWorks(): boolean {
  return (guard ??= install()) !== null;
}

/** From now on touching a page of `[start, start + size)` whose file has no such page any more gives zeros. */
export function guardMemory(start: number, size: number): void {
  if (guard === undefined) guard = install();
  guard?.add(start, size);
}

/** The inverse of {@linkcode guardMemory}: before or right after the memory is unmapped. */
export function unguardMemory(start: number): void {
  guard?.remove(start);
}

/** Pages that were replaced in this process so far. */
export function busFaults(): number {
  return guard?.faults ?? 0;
}

let event: OwnedFd | undefined;
const listeners = new Set<() => void>();

let listening = false;

async function listen(fd: number): Promise<void> {
  listening = true;
  try {
    while (listeners.size > 0) {
      await readable(fd);
      drainEventfd(fd);
      for (const listener of [...listeners]) listener();
    }
  } catch (error) {
    if (!(error instanceof ReactorCancelled)) throw error;
  } finally {
    listening = false;
    // Somebody came while the last one left.
    if (listeners.size > 0) listen(fd).catch(() => {});
  }
}

/**
 * Calls `listener` soon after pages were replaced. The first use keeps an eventfd for the life of the process: the handler may
 * write to it at any time.
 */
export function onBusFault(listener: () => void): Disposable {
  if (guard === undefined) guard = install();
  if (event === undefined && guard !== null) {
    event = createEventfd();
    guard.event = event.fd;
  }
  listeners.add(listener);
  if (event !== undefined && !listening) listen(event.fd).catch(() => {});
  return {
    [Symbol.dispose]: () => {
      if (listeners.delete(listener) && listeners.size === 0 && event !== undefined) cancelWaits(event.fd);
    },
  };
}
