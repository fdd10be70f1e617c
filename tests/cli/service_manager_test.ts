import assert from "node:assert/strict";
import { passedFds, ServiceManager } from "../../src/cli/service_manager.ts";
import { OwnedFd, sendDatagram, SysError, unixAddress } from "../../src/ffi/mod.ts";
import { libc, retrying } from "../../src/ffi/libc.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

/** A datagram socket that keeps what it is sent. */
class Receiver implements Disposable {
  readonly #fd: OwnedFd;

  constructor(path: string) {
    // AF_UNIX, SOCK_DGRAM with SOCK_NONBLOCK
    this.#fd = new OwnedFd(libc().socket(1, 2 | 0x800, 0));
    const address = unixAddress(path);
    retrying(() => libc().bind(this.#fd.fd, address, address.length), "bind", path);
  }

  next(): string | undefined {
    const bytes = new Uint8Array(4096);
    const length = libc().read(this.#fd.fd, bytes, 4096n);
    return length < 0 ? undefined : new TextDecoder().decode(bytes.subarray(0, length));
  }

  [Symbol.dispose](): void {
    this.#fd.close();
  }
}

function environment(values: Record<string, string>): (name: string) => string | undefined {
  return (name) => values[name];
}

Deno.test("the service manager is told of readiness, status on one line, and the stop", () => {
  using folder = new TempDir();
  for (const path of [folder.join("notify"), `@${folder.join("abstract")}`]) {
    using receiver = new Receiver(path);
    using manager = new ServiceManager(environment({ NOTIFY_SOCKET: path }));
    manager.ready("waiting");
    assert.equal(receiver.next(), "READY=1\nSTATUS=waiting");
    manager.status("a device\nREADY=1 named\x07");
    assert.equal(receiver.next(), "STATUS=a device READY=1 named ");
    manager.stopping();
    assert.equal(receiver.next(), "STOPPING=1");
    manager.watch(() => Promise.resolve());
    assert.equal(receiver.next(), undefined, "no watchdog was asked for");
  }
});

Deno.test("signs of life stop when the service does not answer any more", async () => {
  using folder = new TempDir();
  using receiver = new Receiver(folder.join("notify"));
  using manager = new ServiceManager(
    environment({ NOTIFY_SOCKET: folder.join("notify"), WATCHDOG_USEC: "20000", WATCHDOG_PID: String(Deno.pid) }),
  );
  let asked = 0;
  let alive = true;
  manager.watch(() => {
    asked++;
    return alive ? Promise.resolve() : Promise.reject(new Error("stuck"));
  });
  await waitUntil("signs of life", () => receiver.next() === "WATCHDOG=1");
  alive = false;
  const since = asked;
  await waitUntil("questions without a sign", () => asked > since + 2);
  while (receiver.next() !== undefined);
  const silent = asked;
  await waitUntil("more questions", () => asked > silent + 1);
  assert.equal(receiver.next(), undefined);
});

Deno.test("a watchdog for another process is not ours", async () => {
  using folder = new TempDir();
  using receiver = new Receiver(folder.join("notify"));
  using manager = new ServiceManager(environment({ NOTIFY_SOCKET: folder.join("notify"), WATCHDOG_USEC: "1000", WATCHDOG_PID: "1" }));
  let asked = 0;
  manager.watch(() => Promise.resolve(asked++));
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.deepEqual([asked, receiver.next()], [0, undefined]);
});

Deno.test("without a service manager, and with one that went away, nothing happens", () => {
  using folder = new TempDir();
  for (const path of [undefined, "", "vsock:2:1", folder.join("gone")]) {
    using manager = new ServiceManager((name) => name === "NOTIFY_SOCKET" ? path : undefined);
    manager.ready("x");
    manager.stopping();
  }
  assert.throws(() => sendDatagram(folder.join("gone"), new Uint8Array(1)), SysError);
});

Deno.test("sockets are taken when they were passed to this process", () => {
  const pid = String(Deno.pid);
  assert.deepEqual(passedFds(environment({ LISTEN_PID: pid, LISTEN_FDS: "2" })), [3, 4]);
  assert.deepEqual(passedFds(environment({ LISTEN_PID: "1", LISTEN_FDS: "2" })), []);
  assert.deepEqual(passedFds(environment({ LISTEN_PID: pid, LISTEN_FDS: "-1" })), []);
  assert.deepEqual(passedFds(environment({ LISTEN_PID: pid, LISTEN_FDS: "many" })), []);
  assert.deepEqual(passedFds(environment({})), []);
});
