/**
 * The boundary to the operating system: owned descriptors, memory maps, eventfd, epoll, ioctl, unix sockets.
 *
 * @module
 */
export * from "./errno.ts";
export { busFaults, busGuardWorks, onBusFault } from "./bus_guard.ts";
export { bufferAt } from "./libc.ts";
export * from "./fd.ts";
export * from "./mapping.ts";
export * from "./eventfd.ts";
export * from "./epoll.ts";
export * from "./reactor.ts";
export * from "./ioctl.ts";
export * from "./iovec.ts";
export * from "./netlink_socket.ts";
export * from "./unix_socket.ts";
export * from "./datagram.ts";
export * from "./tcp_socket.ts";
export * from "./thread.ts";
export * from "./worker_link.ts";
export * from "./reference.ts";
export * from "./socket_buffer.ts";
export * from "./window.ts";
