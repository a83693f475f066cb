/* What a launch and its programs consist of. The structures up to Fault are mirrored in machine.py. */

#include <setjmp.h>
#include <stdlib.h>
#include "numbers.h"

enum { LANES = 32, MAX_WARPS = 32, MAX_DEPTH = 64, COLLECTIVE = 32, MANY = 33, SHARED_BASE = 1024 };
enum { TID, CTAID, NCTAID = CTAID + 3, NTID = NCTAID + 3, LANEID, WARPID, SPECIALS };

#define FAULTS(X) X(none) X(undefined_register) X(undefined_predicate) X(global_outside) X(global_misaligned) \
    X(global_unwritten) X(global_read_only) X(shared_outside) X(shared_misaligned) X(shared_unwritten) \
    X(shared_in_flight) X(shared_race) X(shared_race_in_warp) X(shared_held_by_wgmma) X(divergent) \
    X(barrier_mismatch) X(barrier_after_exit) X(copies_at_exit) X(register_held_by_wgmma) X(wgmma_without_fence) \
    X(proxy_without_fence) X(global_race) X(too_deep) X(unsupported) X(trap) X(endless)
#define ENUM(name) F_##name,
enum { FAULTS(ENUM) };

typedef struct {
    i32 op, guard, negate, args; /* guard: a predicate or -1; args: where the operands begin */
} Instruction;

typedef struct {
    const Instruction *code;
    const i32 *args;
    i32 entry, n32, n64, predicates;
    i32 constants32, constants64; /* the registers after the special ones that hold constants */
    const u32 *values32;
    const u64 *values64;
    i32 warps, shared_bytes, grain; /* grain: log2 of the smallest access to shared memory */
} Program;

typedef struct {
    u64 address, bytes; /* as the kernel sees it */
    u8 *host;
    u8 *written; /* one byte for each; NULL if all was */
    u64 *writer; /* for each 2 bytes: who wrote them in this launch (global.h), or 0; NULL if nobody may */
} Region;

typedef struct {
    const Region *regions;
    i32 region_count;
    i32 grid[3];
    const i64 *order;
    i64 programs;
    u64 seed; /* of the order of warps; 0: ascending */
    u64 executed, limit; /* warp instructions; the most of one program */
} Launch;

typedef struct {
    i32 kind, pc, warp, lane, program[3], detail, other;
    u64 address;
} Fault;

typedef struct {
    u32 write_epoch, write_step, read_epoch, read_step, readers, write_proxy;
    u8 write_warp, write_lane, read_warp, read_lane;
    u8 state;
    u16 held; /* by how many reads of wgmma in flight */
} Grain;
enum { UNWRITTEN, WRITTEN, IN_FLIGHT };

typedef struct {
    i32 group, lane, bytes, filled;
    u32 target;
    u8 data[16];
} Copy;

typedef struct {
    i32 group, what; /* a grain, a result or an operand of a wgmma (wgmma.h) */
    u32 which;
} Hold;

typedef struct {
    i32 pc, join;
    u32 mask;
} Path;

typedef struct {
    u32 *r, *p, *undefined32, *undefined64, *undefined_p, *fence_at;
    u64 *d;
    u8 *held;
    Path stack[MAX_DEPTH];
    i32 top, frames[MAX_DEPTH], frame;
    enum { RUNNING, WAITING, DONE } status;
    i32 barrier;
    u32 step, meeting, proxy_fences, proxy_epoch, fences;
    Copy *copies;
    i32 copy_count, copy_room, copy_group;
    Hold *holds;
    i32 hold_count, hold_room, wgmma_group;
    i32 *accumulating; /* for each 32-bit register: 1 + the group that accumulates into it */
} Warp;

typedef struct {
    u32 epoch, warp; /* 1 + epoch; 0: none yet */
} Release;

typedef struct {
    const Program *program;
    Launch *launch;
    Fault *fault;
    jmp_buf out;
    Warp warps[MAX_WARPS];
    Warp *warp;
    i32 warp_index, pc;
    u8 *shared;
    Grain *grains;
    u32 epoch;
    i32 ctaid[3];
    u32 number; /* 1 + program in order of the grid */
    const Region *last;
    Release acquired, *releases; /* of this program; of all */
    u64 executed;
} Machine;

static void __attribute__((noreturn)) fail(Machine *m, i32 kind, i32 lane, u64 address, i32 detail, i32 other)
{
    Fault *f = m->fault;
    f->kind = kind, f->pc = m->pc, f->warp = m->warp_index, f->lane = lane;
    memcpy(f->program, m->ctaid, sizeof f->program);
    f->address = address, f->detail = detail, f->other = other;
    longjmp(m->out, 1);
}

static inline int full(u32 mask) { return mask == 0xFFFFFFFF; }

static inline void need_all(Machine *m, u32 mask)
{
    if (!full(mask)) fail(m, F_divergent, __builtin_ctz(~mask), 0, 0, 0);
}

/* What nobody wrote may be moved and computed with, as long as nothing comes of it: compilers do that with lanes that
   they do not need. bad gathers the lanes whose result is undefined. */
static inline const u32 *peek32(Machine *m, i32 r, u32 mask, u32 *bad)
{
    u32 undefined = m->warp->undefined32[r] & mask;
    if (undefined) {
        if (m->warp->accumulating[r]) fail(m, F_register_held_by_wgmma, __builtin_ctz(undefined), 0, r, 32);
        *bad |= undefined;
    }
    return m->warp->r + (size_t)r * LANES;
}

static inline const u64 *peek64(Machine *m, i32 d, u32 mask, u32 *bad)
{
    *bad |= m->warp->undefined64[d] & mask;
    return m->warp->d + (size_t)d * LANES;
}

/* For what has an effect: addresses, what is stored, operands of matrix instructions. */
static inline const u32 *read32(Machine *m, i32 r, u32 mask)
{
    u32 bad = m->warp->undefined32[r] & mask;
    if (bad) {
        i32 kind = m->warp->accumulating[r] ? F_register_held_by_wgmma : F_undefined_register;
        fail(m, kind, __builtin_ctz(bad), 0, r, 32);
    }
    return m->warp->r + (size_t)r * LANES;
}

static inline const u64 *read64(Machine *m, i32 d, u32 mask)
{
    u32 bad = m->warp->undefined64[d] & mask;
    if (bad) fail(m, F_undefined_register, __builtin_ctz(bad), 0, d, 64);
    return m->warp->d + (size_t)d * LANES;
}

static inline u32 read_predicate(Machine *m, i32 p, u32 mask)
{
    u32 bad = m->warp->undefined_p[p] & mask;
    if (bad) fail(m, F_undefined_predicate, __builtin_ctz(bad), 0, p, 1);
    return m->warp->p[p];
}

static inline void before_write32(Machine *m, i32 r)
{
    if (m->warp->held[r] || m->warp->accumulating[r]) fail(m, F_register_held_by_wgmma, 0, 0, r, 32);
    m->warp->fence_at[r] = m->warp->fences;
}

static inline void write32(Machine *m, i32 r, u32 mask, const u32 *values)
{
    before_write32(m, r);
    u32 *to = m->warp->r + (size_t)r * LANES;
    if (full(mask))
        memcpy(to, values, 4 * LANES);
    else
        for (int l = 0; l < LANES; l++) to[l] = mask >> l & 1 ? values[l] : to[l];
    m->warp->undefined32[r] &= ~mask;
}

static inline void write64(Machine *m, i32 d, u32 mask, const u64 *values)
{
    u64 *to = m->warp->d + (size_t)d * LANES;
    if (full(mask))
        memcpy(to, values, 8 * LANES);
    else
        for (int l = 0; l < LANES; l++) to[l] = mask >> l & 1 ? values[l] : to[l];
    m->warp->undefined64[d] &= ~mask;
}

static inline void write_predicate(Machine *m, i32 p, u32 mask, u32 value)
{
    m->warp->p[p] = (m->warp->p[p] & ~mask) | (value & mask);
    m->warp->undefined_p[p] &= ~mask;
}
