/**
 * The C relay that the benchmark compares with (tests/bench/reference.c), loaded when a run asks for it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

const symbols = {
  // void *svq_reference_new(const uint64_t *config)
  svq_reference_new: { parameters: ["buffer"], result: "pointer" },
  // void svq_reference_free(void *relay)
  svq_reference_free: { parameters: ["pointer"], result: "void" },
  // int32_t svq_reference_forward(void *relay), negative: a rule was broken
  svq_reference_forward: { parameters: ["pointer"], result: "i32" },
  // int32_t svq_reference_return(void *relay)
  svq_reference_return: { parameters: ["pointer"], result: "i32" },
  // int32_t svq_bound_forward(void *relay)
  svq_bound_forward: { parameters: ["pointer"], result: "i32" },
  // int32_t svq_bound_return(void *relay)
  svq_bound_return: { parameters: ["pointer"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Which of the two: a whole relay, or what moving the bytes alone costs. */
export type ReferenceKind = "c" | "bound";

/** One queue relayed by the C reference. Split rings on both sides. */
export class Reference implements Disposable {
  readonly #library: Deno.DynamicLibrary<typeof symbols>;
  readonly #relay: Deno.PointerValue;
  readonly #forward: (relay: Deno.PointerValue) => number;
  readonly #return: (relay: Deno.PointerValue) => number;

  /**
   * @param path of the shared library
   * @param kind which of the two
   * @param config as the C source describes it: addresses of this process and sizes, bytes
   * @throws SvqError NO_REFERENCE when the library cannot be loaded
   */
  constructor(path: string, kind: ReferenceKind, config: readonly number[]) {
    try {
      this.#library = Deno.dlopen(path, symbols);
    } catch (cause) {
      throw new SvqError("NO_REFERENCE", `The C reference ${path} cannot be loaded`, {
        cause,
        hint: "deno task bench:ring builds it where there is a C compiler.",
      });
    }
    const { symbols: calls } = this.#library;
    this.#relay = calls.svq_reference_new(BigUint64Array.from(config, BigInt));
    if (this.#relay === null) throw new SvqError("NO_REFERENCE", "The C reference has no memory");
    this.#forward = kind === "c" ? calls.svq_reference_forward : calls.svq_bound_forward;
    this.#return = kind === "c" ? calls.svq_reference_return : calls.svq_bound_return;
  }

  /** Offers the guest's chains to the device. @returns chains moved. @throws SvqError REFERENCE_FAILED */
  forward(): number {
    return this.#checked(this.#forward(this.#relay));
  }

  /** Returns used chains to the guest. @returns chains moved. @throws SvqError REFERENCE_FAILED */
  returnUsed(): number {
    return this.#checked(this.#return(this.#relay));
  }

  #checked(count: number): number {
    if (count < 0) throw new SvqError("REFERENCE_FAILED", `The C reference found rule ${-count} broken`);
    return count;
  }

  /** Frees the relay; the library stays loaded, as a library with code in use does. */
  [Symbol.dispose](): void {
    this.#library.symbols.svq_reference_free(this.#relay);
  }
}
