/** Writes the archive format of an initramfs ("newc": ASCII headers of 110 bytes, everything padded to 4 bytes). */
export class CpioWriter {
  readonly #pieces: Uint8Array<ArrayBuffer>[] = [];
  #inode = 1;

  #entry(name: string, mode: number, content: Uint8Array<ArrayBuffer>, major = 0, minor = 0): void {
    const encoded = new TextEncoder().encode(name + "\0");
    const fields = [this.#inode++, mode, 0, 0, 1, 0, content.length, 0, 0, major, minor, encoded.length, 0];
    const header = new TextEncoder().encode("070701" + fields.map((value) => value.toString(16).padStart(8, "0")).join(""));
    this.#pieces.push(header, encoded, new Uint8Array(-(header.length + encoded.length) & 3), content, new Uint8Array(-content.length & 3));
  }

  /** Adds a folder. */
  directory(name: string): void {
    this.#entry(name, 0o040755, new Uint8Array(0));
  }

  /** Adds a file. @param mode permission bits */
  file(name: string, content: Uint8Array<ArrayBuffer>, mode: number): void {
    this.#entry(name, 0o100000 | mode, content);
  }

  /** Adds a character device. */
  device(name: string, major: number, minor: number): void {
    this.#entry(name, 0o020600, new Uint8Array(0), major, minor);
  }

  /** Ends the archive and returns it. */
  finish(): Uint8Array<ArrayBuffer> {
    this.#entry("TRAILER!!!", 0, new Uint8Array(0));
    const total = new Uint8Array(this.#pieces.reduce((sum, piece) => sum + piece.length, 0));
    let at = 0;
    for (const piece of this.#pieces) {
      total.set(piece, at);
      at += piece.length;
    }
    return total;
  }
}
