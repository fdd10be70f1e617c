/*
 * What the benchmark compares the relay cores with: a tight relay of split rings in C, with the same checks and the same
 * dirty log, and the bound: the bytes that any relay has to move, unchecked.
 *
 *     cc -O2 -shared -fPIC -o reference.so reference.c
 *
 * config, 64-bit words: num, guest desc, guest avail, guest used, device desc, device avail, device used (addresses of this
 * process), first and last+1 guest address of the one memory region, address of the dirty log (0: none), its bytes.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, PAGE_SHIFT = 12 };
enum { E_JUMP = 1, E_HEAD, E_FLIGHT, E_NEXT, E_LOOP, E_MEMORY, E_ORDER, E_LOG, E_USED };

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};
struct used_elem {
    uint32_t id;
    uint32_t len;
};
struct avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[];
};
struct used {
    uint16_t flags;
    uint16_t idx;
    struct used_elem ring[];
};
struct segment {
    uint64_t addr;
    uint32_t len;
    uint16_t next;
    uint16_t flags;
};

struct relay {
    uint32_t num;
    uint16_t mask;
    uint16_t guest_avail, guest_used, device_avail, device_used;
    uint16_t free_head;
    uint32_t free_count;
    const struct desc *guest_desc;
    struct avail *guest_avail_ring;
    struct used *guest_used_ring;
    struct desc *desc;
    struct avail *avail_ring;
    struct used *used_ring;
    uint64_t first, end;
    uint32_t *log;
    uint64_t log_pages;
    struct segment *segment; /* by shadow descriptor: the private copy */
    int32_t *guest_head;     /* by shadow head; -1: not at the device */
    uint8_t *taken;          /* by guest head */
    int kick_wanted, call_wanted;
};

void svq_reference_free(void *opaque) {
    struct relay *r = opaque;
    if (!r) return;
    free(r->segment);
    free(r->guest_head);
    free(r->taken);
    free(r);
}

void *svq_reference_new(const uint64_t *config) {
    struct relay *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->num = (uint32_t)config[0];
    r->mask = (uint16_t)(r->num - 1);
    r->guest_desc = (const struct desc *)(uintptr_t)config[1];
    r->guest_avail_ring = (struct avail *)(uintptr_t)config[2];
    r->guest_used_ring = (struct used *)(uintptr_t)config[3];
    r->desc = (struct desc *)(uintptr_t)config[4];
    r->avail_ring = (struct avail *)(uintptr_t)config[5];
    r->used_ring = (struct used *)(uintptr_t)config[6];
    r->first = config[7];
    r->end = config[8];
    r->log = (uint32_t *)(uintptr_t)config[9];
    r->log_pages = config[10] * 8;
    r->segment = calloc(r->num, sizeof *r->segment);
    r->guest_head = malloc(r->num * sizeof *r->guest_head);
    r->taken = calloc(r->num, 1);
    if (!r->segment || !r->guest_head || !r->taken) {
        svq_reference_free(r);
        return NULL;
    }
    for (uint32_t i = 0; i < r->num; i++) {
        r->segment[i].next = (uint16_t)((i + 1) & r->mask);
        r->guest_head[i] = -1;
    }
    r->free_count = r->num;
    return r;
}

static int mark(struct relay *r, uint64_t addr, uint32_t len) {
    uint64_t last = (addr + len - 1) >> PAGE_SHIFT;
    if (last >= r->log_pages) return -1;
    for (uint64_t page = addr >> PAGE_SHIFT; page <= last; page++) {
        uint32_t bit = 1u << (page & 31);
        uint32_t *word = &r->log[page >> 5];
        if (!(__atomic_load_n(word, __ATOMIC_SEQ_CST) & bit)) __atomic_fetch_or(word, bit, __ATOMIC_SEQ_CST);
    }
    return 0;
}

int32_t svq_reference_forward(void *opaque) {
    struct relay *r = opaque;
    uint16_t idx = __atomic_load_n(&r->guest_avail_ring->idx, __ATOMIC_ACQUIRE);
    uint16_t at = r->guest_avail;
    uint16_t out = r->device_avail;
    if ((uint16_t)(idx - at) > r->num) return -E_JUMP;
    uint16_t begin = at;
    for (; at != idx; at++) {
        uint16_t head = r->guest_avail_ring->ring[at & r->mask];
        if (head >= r->num) return -E_HEAD;
        if (r->taken[head]) return -E_FLIGHT;
        uint16_t free_at = r->free_head;
        uint16_t shadow_head = free_at;
        uint16_t index = head;
        uint32_t count = 0;
        int writing = 0;
        for (;;) {
            struct desc d = r->guest_desc[index];
            if (count == r->free_count) goto full;
            if (++count > r->num) return -E_LOOP;
            if (d.len == 0 || d.addr < r->first || d.addr + d.len > r->end || d.addr + d.len < d.addr) return -E_MEMORY;
            if (d.flags & INDIRECT) return -E_NEXT;
            if (d.flags & WRITE) writing = 1;
            else if (writing) return -E_ORDER;
            struct segment *s = &r->segment[free_at];
            s->addr = d.addr;
            s->len = d.len;
            s->flags = d.flags & (NEXT | WRITE);
            r->desc[free_at] = (struct desc){d.addr, d.len, s->flags, s->next};
            free_at = s->next;
            if (!(d.flags & NEXT)) break;
            if (d.next >= r->num) return -E_NEXT;
            index = d.next;
        }
        r->free_head = free_at;
        r->free_count -= count;
        r->guest_head[shadow_head] = head;
        r->taken[head] = 1;
        r->avail_ring->ring[out & r->mask] = shadow_head;
        out++;
    }
full:
    r->guest_avail = at;
    r->device_avail = out;
    if (at == begin) return 0;
    __atomic_store_n(&r->avail_ring->idx, out, __ATOMIC_SEQ_CST);
    r->kick_wanted = !(__atomic_load_n(&r->used_ring->flags, __ATOMIC_SEQ_CST) & 1);
    return (uint16_t)(at - begin);
}

int32_t svq_reference_return(void *opaque) {
    struct relay *r = opaque;
    uint16_t idx = __atomic_load_n(&r->used_ring->idx, __ATOMIC_ACQUIRE);
    uint16_t at = r->device_used;
    uint16_t begin = at;
    if ((uint16_t)(idx - at) > (uint16_t)(r->device_avail - at)) return -E_JUMP;
    for (; at != idx; at++) {
        struct used_elem e = r->used_ring->ring[at & r->mask];
        if (e.id >= r->num || r->guest_head[e.id] < 0) return -E_USED;
        uint16_t index = (uint16_t)e.id;
        uint32_t count = 1;
        uint64_t writable = 0;
        for (;; count++) {
            struct segment *s = &r->segment[index];
            if (s->flags & WRITE) {
                writable += s->len;
                if (r->log && mark(r, s->addr, s->len)) return -E_LOG;
            }
            if (!(s->flags & NEXT)) break;
            index = s->next;
        }
        r->segment[index].next = r->free_head;
        r->free_head = (uint16_t)e.id;
        r->free_count += count;
        uint16_t head = (uint16_t)r->guest_head[e.id];
        r->guest_head[e.id] = -1;
        r->taken[head] = 0;
        struct used_elem *to = &r->guest_used_ring->ring[r->guest_used & r->mask];
        to->id = head;
        to->len = e.len < writable ? e.len : (uint32_t)writable;
        r->guest_used++;
    }
    r->device_used = at;
    if (at == begin) return 0;
    __atomic_store_n(&r->guest_used_ring->idx, r->guest_used, __ATOMIC_SEQ_CST);
    r->call_wanted = !(__atomic_load_n(&r->guest_avail_ring->flags, __ATOMIC_SEQ_CST) & 1);
    return (uint16_t)(at - begin);
}

/* The bound: every byte that has to get from one ring to the other, and nothing else. */
int32_t svq_bound_forward(void *opaque) {
    struct relay *r = opaque;
    uint16_t idx = __atomic_load_n(&r->guest_avail_ring->idx, __ATOMIC_ACQUIRE);
    uint16_t begin = r->guest_avail;
    for (uint16_t at = begin; at != idx; at++) {
        uint16_t head = r->guest_avail_ring->ring[at & r->mask];
        for (uint16_t index = head;; index = r->desc[index].next & r->mask) {
            r->desc[index] = r->guest_desc[index];
            if (!(r->desc[index].flags & NEXT)) break;
        }
        r->avail_ring->ring[at & r->mask] = head;
    }
    r->guest_avail = idx;
    __atomic_store_n(&r->avail_ring->idx, idx, __ATOMIC_SEQ_CST);
    return (uint16_t)(idx - begin);
}

int32_t svq_bound_return(void *opaque) {
    struct relay *r = opaque;
    uint16_t idx = __atomic_load_n(&r->used_ring->idx, __ATOMIC_ACQUIRE);
    uint16_t begin = r->device_used;
    for (uint16_t at = begin; at != idx; at++) r->guest_used_ring->ring[at & r->mask] = r->used_ring->ring[at & r->mask];
    r->device_used = idx;
    __atomic_store_n(&r->guest_used_ring->idx, idx, __ATOMIC_SEQ_CST);
    return (uint16_t)(idx - begin);
}
