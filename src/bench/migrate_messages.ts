/**
 * What `svq bench migrate` and its worker tell each other.
 *
 * @module
 */

/** The worker takes a stream until its end: throws the bytes away, or receives pages as a destination does. */
export interface TakeCommand {
  /** A connected stream socket, taken over. */
  fd: number;
  /** Bytes of guest memory to receive into; 0: throw everything away. */
  memory: number;
}

/** What came of it. */
export interface TakeReply {
  /** Bytes that came; 0 where pages were received. */
  bytes: number;
}
