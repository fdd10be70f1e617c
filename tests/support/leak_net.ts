/**
 * Tells of descriptors that nobody closed: src/ffi/fd.ts closes them when their owner is collected, which hides a leak from whoever
 * counts descriptors. Import it before anything of src.
 *
 * @module
 */
const Plain = globalThis.FinalizationRegistry;
const traced = Deno.env.get("SVQ_TRACE_LEAKS") !== undefined;

/** What was collected without having been closed, in the order in which that was noticed. */
export const collected: string[] = [];

globalThis.FinalizationRegistry = class<T> extends Plain<T> {
  readonly #origins = new Map<T, string>();

  constructor(callback: (value: T) => void) {
    super((value) => {
      collected.push(`${value} ${this.#origins.get(value) ?? ""}`);
      callback(value);
    });
  }

  override register(target: WeakKey, value: T, token?: WeakKey): void {
    if (traced) this.#origins.set(value, new Error().stack ?? "");
    super.register(target, value, token);
  }
};
