/** A temporary folder that goes away with its scope. Its path is short: a unix socket's path has 107 bytes at most. */
export class TempDir implements Disposable {
  readonly path: string;

  constructor() {
    this.path = Deno.makeTempDirSync({ prefix: "svq-" });
  }

  /** The path of `name` in the folder. */
  join(name: string): string {
    return `${this.path}/${name}`;
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.path, { recursive: true });
  }
}
