/**
 * The symbols of libc that svq calls, each with its C declaration beside it. `Deno.dlopen` and `Deno.Unsafe*` are used in
 * this room only.
 *
 * Return values of `ssize_t` functions are declared i32: every length passed in is below 2 GiB, and an i32 result costs no
 * bigint. 64-bit parameters want a bigint (a number costs ten times as much).
 *
 * @module
 */
import { ERRNO, SysError } from "./errno.ts";

const symbols = {
  // int *__errno_location(void)
  __errno_location: { parameters: [], result: "pointer" },
  // int close(int fd)
  close: { parameters: ["i32"], result: "i32" },
  // int open(const char *path, int flags, mode_t mode)
  open: { parameters: ["buffer", "i32", "u32"], result: "i32" },
  // ssize_t read(int fd, void *buf, size_t count)
  read: { parameters: ["i32", "buffer", "usize"], result: "i32" },
  // ssize_t write(int fd, const void *buf, size_t count)
  write: { parameters: ["i32", "buffer", "usize"], result: "i32" },
  // the same, on a thread of Deno's pool: for what may take long. Its errno is out of reach.
  write_on_pool: { name: "write", parameters: ["i32", "buffer", "usize"], result: "i32", nonblocking: true },
  // ssize_t pread(int fd, void *buf, size_t count, off_t offset)
  pread: { parameters: ["i32", "pointer", "usize", "i64"], result: "i32" },
  // ssize_t pwrite(int fd, const void *buf, size_t count, off_t offset)
  pwrite: { parameters: ["i32", "pointer", "usize", "i64"], result: "i32" },
  // ssize_t preadv(int fd, const struct iovec *iov, int iovcnt, off_t offset)
  preadv: { parameters: ["i32", "buffer", "i32", "i64"], result: "i32" },
  // ssize_t pwritev(int fd, const struct iovec *iov, int iovcnt, off_t offset)
  pwritev: { parameters: ["i32", "buffer", "i32", "i64"], result: "i32" },
  // ssize_t readv(int fd, const struct iovec *iov, int iovcnt)
  readv: { parameters: ["i32", "buffer", "i32"], result: "i32" },
  // ssize_t writev(int fd, const struct iovec *iov, int iovcnt)
  writev: { parameters: ["i32", "buffer", "i32"], result: "i32" },
  // int fdatasync(int fd)
  fdatasync: { parameters: ["i32"], result: "i32" },
  // int fallocate(int fd, int mode, off_t offset, off_t len)
  fallocate: { parameters: ["i32", "i32", "i64", "i64"], result: "i32" },
  // int fcntl(int fd, int cmd, long arg)
  fcntl: { parameters: ["i32", "i32", "i64"], result: "i32" },
  // off_t lseek(int fd, off_t offset, int whence)
  lseek: { parameters: ["i32", "i64", "i32"], result: "i64" },
  // int ftruncate(int fd, off_t length)
  ftruncate: { parameters: ["i32", "i64"], result: "i32" },
  // int memfd_create(const char *name, unsigned flags)
  memfd_create: { parameters: ["buffer", "u32"], result: "i32" },
  // void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
  mmap: { parameters: ["pointer", "usize", "i32", "i32", "i32", "i64"], result: "pointer" },
  // int munmap(void *addr, size_t length)
  munmap: { parameters: ["pointer", "usize"], result: "i32" },
  // int mprotect(void *addr, size_t length, int prot)
  mprotect: { parameters: ["pointer", "usize", "i32"], result: "i32" },
  // void *mremap(void *old, size_t old_size, size_t new_size, int flags, void *new_address)
  mremap: { parameters: ["pointer", "usize", "usize", "i32", "pointer"], result: "pointer" },
  // void *memcpy(void *dest, const void *src, size_t n)
  memcpy: { parameters: ["pointer", "pointer", "usize"], result: "void" },
  // int memcmp(const void *a, const void *b, size_t n)
  memcmp: { parameters: ["pointer", "pointer", "usize"], result: "i32" },
  // sighandler_t signal(int signum, sighandler_t handler)
  signal: { parameters: ["i32", "usize"], result: "usize" },
  // int sigaction(int signum, const struct sigaction *new, struct sigaction *old)
  sigaction: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  // int eventfd(unsigned initval, int flags)
  eventfd: { parameters: ["u32", "i32"], result: "i32" },
  // int eventfd_read(int fd, eventfd_t *value)
  eventfd_read: { parameters: ["i32", "buffer"], result: "i32" },
  // int eventfd_write(int fd, eventfd_t value)
  eventfd_write: { parameters: ["i32", "u64"], result: "i32" },
  // int epoll_create1(int flags)
  epoll_create1: { parameters: ["i32"], result: "i32" },
  // int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event)
  epoll_ctl: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
  // int epoll_wait(int epfd, struct epoll_event *events, int maxevents, int timeout)
  epoll_wait: { parameters: ["i32", "buffer", "i32", "i32"], result: "i32" },
  // the same, on a thread of Deno's pool: for the reactor only (control paths)
  epoll_wait_on_pool: { name: "epoll_wait", parameters: ["i32", "buffer", "i32", "i32"], result: "i32", nonblocking: true },
  // int poll(struct pollfd *fds, nfds_t nfds, int timeout)
  poll: { parameters: ["buffer", "u64", "i32"], result: "i32" },
  // int madvise(void *addr, size_t length, int advice)
  madvise: { parameters: ["pointer", "u64", "i32"], result: "i32" },
  // int ioctl(int fd, unsigned long request, void *arg)
  ioctl: { parameters: ["i32", "u64", "buffer"], result: "i32" },
  // the same, for requests whose argument is a value
  ioctl_value: { name: "ioctl", parameters: ["i32", "u64", "i64"], result: "i32" },
  // int socket(int domain, int type, int protocol)
  socket: { parameters: ["i32", "i32", "i32"], result: "i32" },
  // int socketpair(int domain, int type, int protocol, int sv[2])
  socketpair: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
  // int bind(int fd, const struct sockaddr *addr, socklen_t len)
  bind: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  // int listen(int fd, int backlog)
  listen: { parameters: ["i32", "i32"], result: "i32" },
  // int connect(int fd, const struct sockaddr *addr, socklen_t len)
  connect: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  // int accept4(int fd, struct sockaddr *addr, socklen_t *len, int flags)
  accept4: { parameters: ["i32", "pointer", "pointer", "i32"], result: "i32" },
  // int getsockopt(int fd, int level, int name, void *value, socklen_t *len)
  getsockopt: { parameters: ["i32", "i32", "i32", "buffer", "buffer"], result: "i32" },
  // int setsockopt(int fd, int level, int name, const void *value, socklen_t len)
  setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
  // int getsockname(int fd, struct sockaddr *addr, socklen_t *len)
  getsockname: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  // int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **res), on Deno's pool:
  // a name server may take its time
  getaddrinfo: { parameters: ["buffer", "buffer", "buffer", "buffer"], result: "i32", nonblocking: true },
  // void freeaddrinfo(struct addrinfo *res)
  freeaddrinfo: { parameters: ["pointer"], result: "void" },
  // int shutdown(int fd, int how)
  shutdown: { parameters: ["i32", "i32"], result: "i32" },
  // ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
  sendmsg: { parameters: ["i32", "buffer", "i32"], result: "i32" },
  // ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
  recvmsg: { parameters: ["i32", "buffer", "i32"], result: "i32" },
  // int sched_setaffinity(pid_t pid, size_t size, const cpu_set_t *mask); pid 0 is the calling thread
  sched_setaffinity: { parameters: ["i32", "usize", "buffer"], result: "i32" },
  // int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *mask)
  sched_getaffinity: { parameters: ["i32", "usize", "buffer"], result: "i32" },
  // int clock_gettime(clockid_t clock, struct timespec *time)
  clock_gettime: { parameters: ["i32", "buffer"], result: "i32" },
  // int sched_yield(void)
  sched_yield: { parameters: [], result: "i32" },
  // int prctl(int option, unsigned long arg2, 0, 0, 0)
  prctl: { parameters: ["i32", "u64", "u64", "u64", "u64"], result: "i32" },
  // int getrlimit(int resource, struct rlimit *rlim)
  getrlimit: { parameters: ["i32", "buffer"], result: "i32" },
  // uid_t geteuid(void)
  geteuid: { parameters: [], result: "u32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The functions of libc that svq calls. */
export type Libc = Deno.DynamicLibrary<typeof symbols>["symbols"];

/**
 * Where tests put a function from {@linkcode Libc} to {@linkcode Libc} before a thread's first call: it may exchange functions
 * for some that fail, or that lay guard pages around memory. Only code of this thread can put it there, and it is looked for once.
 */
export const LIBC_HOOK: unique symbol = Symbol.for("svq.libc") as never;

let library: Libc | undefined;

/** libc's symbols, loaded at first use so that commands without FFI need no permission for it. */
export function libc(): Libc {
  return library ??= load();
}

function load(): Libc {
  const functions = Deno.dlopen("libc.so.6", symbols).symbols;
  const hook = (globalThis as { [LIBC_HOOK]?: (functions: Libc) => Libc })[LIBC_HOOK];
  return hook === undefined ? functions : hook(functions);
}

let errnoView: Deno.UnsafePointerView | undefined;

/** errno of the calling thread, as the last call of this thread left it. */
export function errno(): number {
  errnoView ??= new Deno.UnsafePointerView(libc().__errno_location()!);
  return errnoView.getInt32();
}

/**
 * Turns a return value into itself or a {@linkcode SysError}.
 *
 * @param result what the call returned; negative means failure
 * @param syscall its name
 * @param what what it was done to, for the message
 */
export function unwrap(result: number, syscall: string, what?: string): number {
  if (result >= 0) return result;
  throw new SysError(syscall, errno(), what);
}

/** Runs `call` again while it fails with EINTR, then {@linkcode unwrap}s. */
export function retrying(call: () => number, syscall: string, what?: string): number {
  for (;;) {
    const result = call();
    if (result >= 0) return result;
    const number = errno();
    if (number !== ERRNO.EINTR) throw new SysError(syscall, number, what);
  }
}

/** Like {@linkcode retrying}, but EAGAIN gives `undefined` instead of an error. */
export function retryingUnlessAgain(call: () => number, syscall: string, what?: string): number | undefined {
  for (;;) {
    const result = call();
    if (result >= 0) return result;
    const number = errno();
    if (number === ERRNO.EAGAIN) return undefined;
    if (number !== ERRNO.EINTR) throw new SysError(syscall, number, what);
  }
}

/** A NUL-terminated copy of `text` for `const char *` parameters. */
export function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(text + "\0");
}

/** The pointer for a plain address (bytes, below 2^53); `null` for 0. */
export function pointer(address: number): Deno.PointerValue {
  return Deno.UnsafePointer.create(BigInt(address));
}

/** The address of a typed array's first byte. It stays valid while the array is referenced. */
export function addressOf(bytes: Uint8Array<ArrayBuffer>): number {
  return Number(Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes)));
}

/** An ArrayBuffer over `length` bytes at `address`. The caller keeps the memory mapped for as long as the buffer is used. */
export function bufferAt(address: number, length: number): ArrayBuffer {
  return Deno.UnsafePointerView.getArrayBuffer(pointer(address)!, length);
}
