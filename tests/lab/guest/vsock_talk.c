/*
 * The lab guest's end of a vsock connection: `vsock_talk PORT`. Connects to PORT of the host (CID 2), whose end sends back what it
 * gets. For each line on stdin it sends bytes, reads as many and compares them; the answer is `VSOCK ok bytes=N` (of all lines so
 * far) or, in the end, `VSOCK failed: why`.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum { CHUNK = 16384, CHUNKS = 16 };

static int fail(const char *what) {
  printf("VSOCK failed: %s: %s\n", what, strerror(errno));
  return 1;
}

static int all(int s, unsigned char *bytes, int writing) {
  for (size_t done = 0; done < CHUNK;) {
    ssize_t n = writing ? write(s, bytes + done, CHUNK - done) : read(s, bytes + done, CHUNK - done);
    if (n <= 0) return -1;
    done += (size_t)n;
  }
  return 0;
}

int main(int argc, char **argv) {
  char line[16];
  if (argc != 2) return 2;
  setlinebuf(stdout);
  struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = (unsigned)atoi(argv[1])};
  static unsigned char sent[CHUNK], came[CHUNK];
  unsigned long long bytes = 0;
  unsigned seed = 1;
  int s = socket(AF_VSOCK, SOCK_STREAM, 0);
  if (s < 0) return fail("socket");
  if (connect(s, (struct sockaddr *)&host, sizeof host) < 0) return fail("connect");
  while (fgets(line, sizeof line, stdin) != NULL) {
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      for (int i = 0; i < CHUNK; i++) sent[i] = (unsigned char)((seed = seed * 1103515245u + 12345u) >> 16);
      if (all(s, sent, 1) < 0) return fail("write");
      if (all(s, came, 0) < 0) return fail("read");
      errno = 0;
      if (memcmp(sent, came, CHUNK) != 0) return fail("other bytes came back");
      bytes += CHUNK;
    }
    printf("VSOCK ok bytes=%llu\n", bytes);
  }
  return 0;
}
