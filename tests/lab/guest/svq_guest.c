/*
 * The checked disk workload of the lab's guest; a static program, so it also checks an image on the host.
 *
 *   svq_guest dev=/dev/vda [depth=16] [mode=mixed|readonly|writeonly|verify] [bs=4096] [span=8] [blocks=4096]
 *             [start=0] [reads=50] [flush=256] [ops=0] [seconds=0] [seed=1] [report=1000] [hold=1024]
 *
 * Every block holds its own number, the generation of its last write and a stream derived from both. A table in RAM says
 * which generation each block must have. Requests are kernel AIO with O_DIRECT, `depth` in flight, each over 1..span
 * neighbouring blocks that no other request touches. Before a read every sector of the buffer is poisoned, so that a read that
 * completes without its data is seen even where the buffer held the right content before.
 *
 * A device's write to guest memory that a migration forgets (it is not in the dirty log) shows only where the page was copied
 * between the last write of the processor and the device's, and the data is looked at after the switch. So random reads go
 * through `hold` buffers in turn: a buffer is poisoned half a round before it is read into, and what was read stays untouched
 * for the other half, then is verified once more ("late").
 *
 * Modes: `mixed`, `readonly` and `writeonly` first write every block once and read everything back, then print `SVQ READY` and
 * run until `ops`, `seconds` or the command `stop`; then everything is verified again. `verify` only reads: each block must be
 * consistent with the generation that it claims. Commands on stdin, one per line: stop, status, mode NAME, pause, resume.
 *
 * Output: `SVQ phase=...`, each `report` ms `SVQ ops=... errors=... maxms=... gen=...`, first 20 errors in words,
 * and `SVQ DONE ok ...` or `SVQ DONE FAILED ...`. `digest` covers every block's number and generation.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x3147545351565371ull
#define POISON 0xdeadfeedbadc0ffeull
#define SECTOR_WORDS 64
#define MAX_DEPTH 256

enum kind { READ, WRITE, FLUSH };
enum mode { MIXED, READONLY, WRITEONLY, VERIFY };

struct request {
  struct iocb iocb;
  enum kind kind;
  uint64_t block, count, started_us;
  int busy;
  uint64_t *buffer; /* its own */
  struct held *held; /* of a random read */
};

/* A buffer of random reads. */
struct held {
  uint64_t *buffer;
  uint64_t block, count; /* count 0: poisoned, or being read into */
  uint32_t *generations;
  int busy;
};

static const char *device = "/dev/vda";
static uint64_t depth = 16, block_size = 4096, span = 8, blocks = 4096, start, reads_percent = 50, flush_every = 256, limit_ops,
                limit_seconds, seed = 1, report_ms = 1000, hold = 1024;
static enum mode mode = MIXED;

static int fd;
static aio_context_t context;
static struct request requests[MAX_DEPTH];
static struct held *pool;
static uint64_t next_held;
static uint64_t in_flight;
static uint32_t *generations;
static uint8_t *taken;

static uint64_t reads, writes, flushes, errors, max_us, interval_us, max_generation, next_report_us, started_us, interval_ops;
static int stopping, paused;
static uint64_t random_state;

static uint64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

static uint64_t pick(uint64_t below) {
  random_state += 0x9e3779b97f4a7c15ull;
  return mix(random_state) % below;
}

static void fail(const char *format, ...) {
  if (++errors > 20) return;
  va_list list;
  va_start(list, format);
  printf("SVQ ERROR ");
  vprintf(format, list);
  printf("\n");
  va_end(list);
}

/* Words 0..3 of a block: magic, number, generation, sum of the stream; the rest is the stream. */
static void stamp(uint64_t *words, uint64_t block, uint32_t generation) {
  uint64_t state = mix(block * 0x9e3779b97f4a7c15ull + generation) ^ seed, sum = 0;
  for (uint64_t i = 4; i < block_size / 8; i++) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    words[i] = state;
    sum += state ^ i;
  }
  words[0] = MAGIC;
  words[1] = block;
  words[2] = generation;
  words[3] = sum;
}

/* Checks a block against the generation it must have; in mode verify against the one it claims. */
static void check(const uint64_t *words, uint64_t block, uint32_t *expected, const char *late) {
  static uint64_t *wanted;
  if (!wanted) wanted = malloc(block_size);
  if (words[0] != MAGIC) {
    fail("kind=%s%s block=%llu word=%llx", late, words[0] == POISON ? "not-read" : "corrupt", (unsigned long long)block,
         (unsigned long long)words[0]);
    return;
  }
  if (words[1] != block) {
    fail("kind=%smisplaced block=%llu holds=%llu", late, (unsigned long long)block, (unsigned long long)words[1]);
    return;
  }
  if (mode == VERIFY) *expected = (uint32_t)words[2];
  if (words[2] != *expected) {
    fail("kind=%s%s block=%llu want=%u got=%llu", late, words[2] < *expected ? "lost-write" : "wrong-generation", (unsigned long long)block,
         *expected, (unsigned long long)words[2]);
    return;
  }
  stamp(wanted, block, *expected);
  if (memcmp(wanted, words, block_size) == 0) return;
  for (uint64_t i = 0; i < block_size / 8; i++) {
    if (wanted[i] == words[i]) continue;
    fail("kind=%s%s block=%llu generation=%u byte=%llu got=%llx", late, words[i] == POISON ? "partly-read" : "corrupt",
         (unsigned long long)block, *expected, (unsigned long long)i * 8, (unsigned long long)words[i]);
    return;
  }
}

static void poison(uint64_t *buffer, uint64_t count) {
  for (uint64_t i = 0; i < count * block_size / 8; i += SECTOR_WORDS) buffer[i] = POISON;
}

/* Verifies what a held buffer was given long ago, and makes it ready to be read into, long from now. */
static void recycle(struct held *h) {
  for (uint64_t i = 0; i < h->count; i++) check(h->buffer + i * block_size / 8, h->block + i, &h->generations[i], "late-");
  if (h->count) poison(h->buffer, span);
  h->count = 0;
}

/* The next buffer for a random read; none while the one that must be verified by now is still being read into. */
static struct held *take_held(void) {
  struct held *due = &pool[(next_held + hold / 2) % hold];
  if (due->busy || pool[next_held].busy) return NULL;
  recycle(due);
  struct held *h = &pool[next_held];
  recycle(h);
  next_held = (next_held + 1) % hold;
  return h;
}

static void submit(struct request *r, enum kind kind, uint64_t block, uint64_t count, struct held *held) {
  uint64_t *buffer = held ? held->buffer : r->buffer;
  r->held = held;
  r->kind = kind;
  r->block = block;
  r->count = count;
  r->busy = 1;
  memset(&r->iocb, 0, sizeof r->iocb);
  r->iocb.aio_data = (uint64_t)(uintptr_t)r;
  r->iocb.aio_fildes = (uint32_t)fd;
  r->iocb.aio_buf = (uint64_t)(uintptr_t)buffer;
  r->iocb.aio_nbytes = count * block_size;
  r->iocb.aio_offset = (int64_t)((start + block) * block_size);
  r->iocb.aio_lio_opcode = kind == READ ? IOCB_CMD_PREAD : kind == WRITE ? IOCB_CMD_PWRITE : IOCB_CMD_FDSYNC;
  if (kind == FLUSH) r->iocb.aio_buf = r->iocb.aio_nbytes = 0, r->iocb.aio_offset = 0;
  memset(taken + block, 1, count);
  if (kind == WRITE) {
    for (uint64_t i = 0; i < count; i++) stamp(r->buffer + i * block_size / 8, block + i, generations[block + i] + 1);
  } else if (held) {
    held->busy = 1;
  } else if (kind == READ) {
    poison(buffer, count);
  }
  r->started_us = now_us();
  struct iocb *list[1] = {&r->iocb};
  if (syscall(SYS_io_submit, context, 1L, list) != 1) {
    printf("SVQ DONE FAILED io_submit: %s\n", strerror(errno));
    exit(1);
  }
  in_flight++;
}

static void complete(struct request *r, int64_t result) {
  uint64_t took = now_us() - r->started_us;
  if (took > max_us) max_us = took;
  if (took > interval_us) interval_us = took;
  in_flight--;
  interval_ops++;
  r->busy = 0;
  memset(taken + r->block, 0, r->count);
  int64_t want = r->kind == FLUSH ? 0 : (int64_t)(r->count * block_size);
  if (r->kind == READ) reads++;
  else if (r->kind == WRITE) writes++;
  else flushes++;
  if (result != want)
    fail("kind=io-error op=%s block=%llu count=%llu result=%lld", r->kind == READ ? "read" : r->kind == WRITE ? "write" : "flush",
         (unsigned long long)r->block, (unsigned long long)r->count, (long long)result);
  uint64_t *buffer = r->held ? r->held->buffer : r->buffer;
  for (uint64_t i = 0; i < r->count; i++) {
    /* A write counts even when it failed: what it left is then reported by the next read. */
    if (r->kind == WRITE && ++generations[r->block + i] > max_generation) max_generation = generations[r->block + i];
    if (r->kind == READ && result == want) check(buffer + i * block_size / 8, r->block + i, &generations[r->block + i], "");
  }
  if (!r->held) return;
  r->held->busy = 0;
  r->held->block = r->block;
  r->held->count = result == want ? r->count : 0;
  memcpy(r->held->generations, generations + r->block, r->count * sizeof *generations);
}

static void heartbeat(int force) {
  uint64_t now = now_us();
  if (!force && now < next_report_us) return;
  next_report_us = now + report_ms * 1000;
  uint64_t oldest = 0;
  for (uint64_t i = 0; i < depth; i++)
    if (requests[i].busy && now - requests[i].started_us > oldest) oldest = now - requests[i].started_us;
  if (oldest > max_us) max_us = oldest;
  printf("SVQ ops=%llu errors=%llu maxms=%llu gen=%llu reads=%llu writes=%llu flushes=%llu inflight=%llu oldestms=%llu lastmaxms=%llu "
         "lastops=%llu ms=%llu\n",
         (unsigned long long)(reads + writes + flushes), (unsigned long long)errors, (unsigned long long)max_us / 1000,
         (unsigned long long)max_generation, (unsigned long long)reads, (unsigned long long)writes, (unsigned long long)flushes,
         (unsigned long long)in_flight, (unsigned long long)oldest / 1000, (unsigned long long)interval_us / 1000,
         (unsigned long long)interval_ops, (unsigned long long)(now - started_us) / 1000);
  interval_us = interval_ops = 0;
}

static int parse_mode(const char *name) {
  if (!strcmp(name, "mixed")) mode = MIXED;
  else if (!strcmp(name, "readonly")) mode = READONLY;
  else if (!strcmp(name, "writeonly")) mode = WRITEONLY;
  else if (!strcmp(name, "verify")) mode = VERIFY;
  else return 0;
  return 1;
}

static void command(char *line) {
  if (!*line) return;
  if (!strcmp(line, "stop")) stopping = 1;
  else if (!strcmp(line, "pause")) paused = 1;
  else if (!strcmp(line, "resume")) paused = 0;
  else if (!strcmp(line, "status")) heartbeat(1);
  else if (strncmp(line, "mode ", 5) || !strcmp(line + 5, "verify") || !parse_mode(line + 5)) {
    printf("SVQ unknown command %s\n", line);
    return;
  }
  printf("SVQ command %s\n", line);
}

static void commands(void) {
  static char line[128];
  static size_t length;
  static int ended;
  struct pollfd p = {.fd = 0, .events = POLLIN};
  while (!ended && poll(&p, 1, 0) > 0 && (p.revents & POLLIN)) {
    char c;
    if (read(0, &c, 1) != 1) ended = 1;
    else if (c == '\n' || c == '\r') line[length] = 0, length = 0, command(line);
    else if (length + 1 < sizeof line) line[length++] = c;
  }
}

/* Takes completions, waiting at most a little while, so that heartbeats and commands go on when the device does not answer. */
static void reap(void) {
  struct io_event events[MAX_DEPTH];
  struct timespec patience = {.tv_nsec = 20000000};
  long n = syscall(SYS_io_getevents, context, in_flight ? 1L : 0L, (long)MAX_DEPTH, events, &patience);
  if (n < 0 && errno != EINTR) {
    printf("SVQ DONE FAILED io_getevents: %s\n", strerror(errno));
    exit(1);
  }
  if (!in_flight && n <= 0) nanosleep(&patience, NULL);
  for (long i = 0; i < n; i++) {
    struct request *r = (struct request *)(uintptr_t)events[i].data;
    if (!r->busy) fail("kind=completed-twice block=%llu", (unsigned long long)r->block);
    else complete(r, events[i].res);
  }
  heartbeat(0);
}

static struct request *idle(void) {
  for (uint64_t i = 0; i < depth; i++)
    if (!requests[i].busy) return &requests[i];
  return NULL;
}

static void drain(void) {
  while (in_flight) reap();
}

/* Every block once, in order. */
static void sweep(enum kind kind) {
  for (uint64_t at = 0; at < blocks;) {
    struct request *r = idle();
    if (!r) {
      reap();
      continue;
    }
    uint64_t count = blocks - at < span ? blocks - at : span;
    submit(r, kind, at, count, NULL);
    at += count;
  }
  drain();
}

/* False when nothing can be started now. */
static int random_request(struct request *r) {
  static uint64_t issued;
  if (flush_every && mode != READONLY && ++issued % flush_every == 0) {
    submit(r, FLUSH, 0, 0, NULL);
    return 1;
  }
  int reading = mode == READONLY || (mode == MIXED && pick(100) < reads_percent);
  struct held *held = NULL;
  if (reading && !(held = take_held())) return 0;
  for (;;) {
    uint64_t count = 1 + pick(span), block = pick(blocks - count + 1);
    if (memchr(taken + block, 1, count)) continue;
    submit(r, reading ? READ : WRITE, block, count, held);
    return 1;
  }
}

static uint64_t digest(void) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < blocks; i++) sum += mix(i * 0x9e3779b97f4a7c15ull ^ generations[i]);
  return sum;
}

static void set(const char *arg) {
  struct { const char *name; uint64_t *value; } numbers[] = {
    {"depth", &depth}, {"bs", &block_size}, {"span", &span}, {"blocks", &blocks}, {"start", &start}, {"reads", &reads_percent},
    {"flush", &flush_every}, {"ops", &limit_ops}, {"seconds", &limit_seconds}, {"seed", &seed}, {"report", &report_ms},
    {"hold", &hold},
  };
  const char *equals = strchr(arg, '=');
  size_t length = equals ? (size_t)(equals - arg) : strlen(arg);
  if (equals) {
    if (length == 3 && !strncmp(arg, "dev", 3)) {
      device = equals + 1;
      return;
    }
    if (length == 4 && !strncmp(arg, "mode", 4) && parse_mode(equals + 1)) return;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
      if (strlen(numbers[i].name) != length || strncmp(numbers[i].name, arg, length)) continue;
      char *end;
      *numbers[i].value = strtoull(equals + 1, &end, 10);
      if (*end == 0 && end != equals + 1) return;
    }
  }
  printf("SVQ DONE FAILED bad argument %s\n", arg);
  exit(2);
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  for (int i = 1; i < argc; i++) set(argv[i]);
  if (depth < 1 || depth > MAX_DEPTH || block_size < 512 || block_size % 512 || span < 1 || blocks < span * (depth + 1)) {
    printf("SVQ DONE FAILED depth 1..%d, bs a multiple of 512, blocks at least span * (depth + 1)\n", MAX_DEPTH);
    return 2;
  }
  if (hold < 2) hold = 2;
  fd = open(device, (mode == VERIFY ? O_RDONLY : O_RDWR) | O_DIRECT);
  if (fd < 0 && errno == EINVAL) fd = open(device, mode == VERIFY ? O_RDONLY : O_RDWR);
  if (fd < 0 || syscall(SYS_io_setup, (long)MAX_DEPTH, &context) < 0) {
    printf("SVQ DONE FAILED %s: %s\n", device, strerror(errno));
    return 1;
  }
  generations = calloc(blocks, sizeof *generations);
  taken = calloc(blocks + 1, 1);
  for (uint64_t i = 0; i < depth; i++) {
    if (posix_memalign((void **)&requests[i].buffer, 4096, span * block_size)) return 1;
  }
  random_state = seed;
  started_us = now_us();
  next_report_us = started_us + report_ms * 1000;

  if (mode == VERIFY) {
    sweep(READ);
  } else {
    pool = calloc(hold, sizeof *pool);
    for (uint64_t i = 0; i < hold; i++) {
      if (posix_memalign((void **)&pool[i].buffer, 4096, span * block_size)) return 1;
      pool[i].generations = calloc(span, sizeof *generations);
      poison(pool[i].buffer, span);
    }
    printf("SVQ phase=fill\n");
    sweep(WRITE);
    sweep(READ);
    printf("SVQ READY ops=%llu errors=%llu\n", (unsigned long long)(reads + writes), (unsigned long long)errors);
    uint64_t first = reads + writes + flushes, ready_us = now_us();
    while (!stopping) {
      commands();
      if (limit_ops && reads + writes + flushes - first >= limit_ops) break;
      if (limit_seconds && now_us() - ready_us >= limit_seconds * 1000000) break;
      struct request *r;
      while (!paused && !stopping && (r = idle()) && random_request(r)) {}
      reap();
    }
    printf("SVQ phase=final\n");
    drain();
    for (uint64_t i = 0; i < hold; i++) recycle(&pool[i]);
    submit(idle(), FLUSH, 0, 0, NULL);
    drain();
    sweep(READ);
  }
  heartbeat(1);
  printf("SVQ DONE %s ops=%llu errors=%llu maxms=%llu gen=%llu digest=%016llx\n", errors ? "FAILED" : "ok",
         (unsigned long long)(reads + writes + flushes), (unsigned long long)errors, (unsigned long long)max_us / 1000,
         (unsigned long long)max_generation, (unsigned long long)digest());
  return errors ? 1 : 0;
}
