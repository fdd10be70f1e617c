/**
 * A control group with little memory, for a process that is to run out of it.
 *
 * @module
 */
import { waitUntil } from "./wait.ts";

/** A control group; it must be empty when it is disposed of. */
export class MemoryLimit implements AsyncDisposable {
  private constructor(
    /** Its folder. */
    readonly path: string,
  ) {}

  /** @returns undefined where none can be made: no root, or no memory controller here */
  static async create(bytes: number): Promise<MemoryLimit | undefined> {
    for (
      const [parent, limit, swap] of [["memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"], [
        "",
        "memory.max",
        "memory.swap.max",
      ]]
    ) {
      const path = `/sys/fs/cgroup/${parent}/svq-${Deno.pid}`;
      try {
        Deno.mkdirSync(path);
      } catch {
        continue;
      }
      const group = new MemoryLimit(path);
      try {
        Deno.writeTextFileSync(`${path}/${limit}`, String(bytes), { create: false });
      } catch {
        await group[Symbol.asyncDispose]();
        continue;
      }
      try {
        Deno.writeTextFileSync(`${path}/${swap}`, parent === "" ? "0" : String(bytes), { create: false });
      } catch { /* swap is not counted here */ }
      return group;
    }
    return undefined;
  }

  /** The words in front of a command that is to run in it. */
  get words(): string[] {
    return ["sh", "-c", `echo $$ > ${this.path}/cgroup.procs; exec "$@"`, "sh"];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // The kernel counts out who has ended a little later.
    await waitUntil("an empty control group", () => {
      try {
        Deno.removeSync(this.path);
        return true;
      } catch {
        return false;
      }
    }, 10_000);
  }
}
