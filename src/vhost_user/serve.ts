/**
 * A listening vhost-user back-end: one front-end after the other.
 *
 * @module
 */
import type { UnixListener, UnixStream } from "../ffi/unix_socket.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { BackendServer, type ServerOptions } from "./server.ts";

/** What {@linkcode serve} makes for each connection. */
export interface ServerHandlers {
  /** The device for this connection. */
  backend: VhostBackend;
  /** How it is served. */
  options?: ServerOptions;
}

/**
 * Accepts one front-end after the other and serves each until it disconnects; others wait in the listener's queue.
 * Ends when `listener` is closed.
 *
 * @param makeHandlers called for each connection; when it rejects, the connection is closed
 * @param onError gets what `makeHandlers` rejects with
 */
export async function serve(
  listener: UnixListener,
  makeHandlers: (stream: UnixStream) => ServerHandlers | Promise<ServerHandlers>,
  onError?: (error: unknown) => void,
): Promise<void> {
  while (!listener.closed) {
    let stream: UnixStream;
    try {
      stream = await listener.accept();
    } catch (error) {
      if (listener.closed) return;
      throw error;
    }
    let handlers: ServerHandlers;
    try {
      handlers = await makeHandlers(stream);
    } catch (error) {
      stream.close();
      onError?.(error);
      continue;
    }
    await new BackendServer(stream, handlers.backend, handlers.options).run();
  }
}
