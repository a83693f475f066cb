/* Executes programs of warp instructions, one program of the grid after another, one warp from barrier to barrier. */

#include "state.h"
#include "shared.h"
#include "global.h"
#include "matrix.h"
#include "wgmma.h"

enum {
#define ALU1(name, ...) OP_##name,
#define ALU2(name, ...) OP_##name,
#define ALU3(name, ...) OP_##name,
#define ALU4(name, ...) OP_##name,
#define COMPARE(name, ...) OP_##name,
#include "alu.h"
#undef ALU1
#undef ALU2
#undef ALU3
#undef ALU4
#undef COMPARE
#define CONTROL(X) X(pack16, "u32 u32 u32") X(pack32, "u64 u32 u32") X(redux, "") \
    X(select32, "u32 u32 u32 p") X(select64, "u64 u64 u64 p") X(and_p, "p p p") X(or_p, "p p p") X(xor_p, "p p p") \
    X(not_p, "p p") X(mov_p, "p p") X(true_p, "p") X(false_p, "p") \
    X(load_global, "") X(store_global, "") X(load_shared, "") X(store_shared, "") X(copy_async, "") X(add_global, "") \
    X(commit_copies, "") X(wait_copies, "") X(shuffle, "") X(mma, "") X(ldmatrix, "") X(stmatrix, "") \
    X(wgmma, "") X(wgmma_fence, "") X(wgmma_commit, "") X(wgmma_wait, "") X(proxy_fence, "") \
    X(barrier, "") X(warp_barrier, "") X(branch, "") X(call, "") X(ret, "") X(nothing, "") X(trap, "")
#define ENUM_OP(name, types) OP_##name,
    CONTROL(ENUM_OP)
    OP_count
};

/* "name types", in the order of the numbers. */
const char *const operations[] = {
#define ALU1(name, d, a, ...) #name " " #d " " #a,
#define ALU2(name, d, a, b, ...) #name " " #d " " #a " " #b,
#define ALU3(name, d, a, b, c, ...) #name " " #d " " #a " " #b " " #c,
#define ALU4(name, d, a, b, c, e, ...) #name " " #d " " #a " " #b " " #c " " #e,
#define COMPARE(name, a, ...) #name " p " #a " " #a,
#include "alu.h"
#undef ALU1
#undef ALU2
#undef ALU3
#undef ALU4
#undef COMPARE
#define NAME_OP(name, types) #name " " types,
    CONTROL(NAME_OP)
    NULL
};
#define NAME(name) #name,
const char *const faults[] = {FAULTS(NAME) NULL};

#define READ_u32(i) peek32(m, args[i], mask, &bad)
#define READ_f32(i) (const f32 *)peek32(m, args[i], mask, &bad)
#define READ_u64(i) peek64(m, args[i], mask, &bad)
#define READ_f64(i) (const f64 *)peek64(m, args[i], mask, &bad)
#define WRITE_u32 write32(m, args[0], mask, (const u32 *)t), w->undefined32[args[0]] |= bad
#define WRITE_f32 WRITE_u32
#define WRITE_u64 write64(m, args[0], mask, (const u64 *)t), w->undefined64[args[0]] |= bad
#define WRITE_f64 WRITE_u64

static void load(Machine *m, const i32 *args, u32 mask, int global)
{
    /* args: bytes of an element, elements, address, offset, registers */
    i32 bytes = args[0], count = args[1];
    u32 low[4][LANES];
    u64 wide[2][LANES];
    u8 value[16];
    const u64 *far = global ? read64(m, args[2], mask) : NULL;
    const u32 *near = global ? NULL : read32(m, args[2], mask);
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        if (global) load_global(m, far[l] + (i64)args[3], bytes * count, l, value);
        else load_shared(m, near[l] + args[3], bytes * count, l, value);
        for (int i = 0; i < count; i++) {
            u64 element = 0;
            memcpy(&element, value + i * bytes, bytes);
            if (bytes == 8) wide[i][l] = element;
            else low[i][l] = (u32)element;
        }
    }
    for (int i = 0; i < count; i++)
        if (bytes == 8) write64(m, args[4 + i], mask, wide[i]);
        else write32(m, args[4 + i], mask, low[i]);
}

static void store(Machine *m, const i32 *args, u32 mask, int global)
{
    i32 bytes = args[0], count = args[1];
    u8 value[16];
    const u64 *far = global ? read64(m, args[2], mask) : NULL, *wide[2];
    const u32 *near = global ? NULL : read32(m, args[2], mask), *low[4];
    for (int i = 0; i < count; i++)
        if (bytes == 8) wide[i] = read64(m, args[4 + i], mask);
        else low[i] = read32(m, args[4 + i], mask);
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        for (int i = 0; i < count; i++) memcpy(value + i * bytes, bytes == 8 ? (void *)&wide[i][l] : (void *)&low[i][l], bytes);
        if (global) store_global(m, far[l] + (i64)args[3], bytes * count, l, value);
        else store_shared(m, near[l] + args[3], bytes * count, l, value);
    }
}

/* args: target, its offset, source, its offset, bytes, register of the bytes to read or -1: zeros fill the rest */
static void copy_async(Machine *m, const i32 *args, u32 mask)
{
    const u32 *target = read32(m, args[0], mask);
    const u64 *source = read64(m, args[2], mask);
    const u32 *taken = args[5] < 0 ? NULL : read32(m, args[5], mask);
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        u8 data[16] = {0};
        u32 bytes = taken ? taken[l] : (u32)args[4];
        u64 from = source[l] + (i64)args[3];
        if (bytes > (u32)args[4]) fail(m, F_unsupported, l, bytes, 0, 0);
        if (bytes == (u32)args[4]) load_global(m, from, bytes, l, data);
        else for (u32 i = 0; i < bytes; i++) load_global(m, from + i, 1, l, data + i);
        start_copy(m, target[l] + args[1], args[4], l, data);
    }
}

/* args: mode (0 idx, 1 up, 2 down, 3 bfly), result, predicate or -1, value, lane, clamp, members */
static void shuffle(Machine *m, const i32 *args, u32 mask)
{
    const u32 *members = read32(m, args[6], mask);
    for (int l = 0; l < LANES; l++)
        if (mask >> l & 1 && members[l] != mask) fail(m, F_divergent, l, 0, 0, 0);
    u32 result[LANES], inside = 0, lost = 0, bad = 0;
    const u32 *value = peek32(m, args[3], mask, &lost), *which = read32(m, args[4], mask), *clamp = read32(m, args[5], mask);
    for (int l = 0; l < LANES; l++) {
        u32 segment = clamp[l] >> 8 & 31, limit = (l & segment) | ((clamp[l] & 31) & ~segment);
        u32 b = which[l] & 31, j;
        int in;
        if (args[0] == 0) j = (l & segment) | (b & ~segment), in = j <= limit;
        else if (args[0] == 1) j = l - b, in = (i32)j >= (i32)limit;
        else if (args[0] == 2) j = l + b, in = j <= limit;
        else j = l ^ b, in = j <= limit;
        if (!in) j = l;
        if (mask >> l & 1 && !(mask >> (j & 31) & 1)) fail(m, F_divergent, l, 0, 0, 0);
        result[l] = value[j & 31];
        bad |= (lost >> (j & 31) & 1) << l & mask;
        inside |= (u32)in << l;
    }
    write32(m, args[1], mask, result);
    m->warp->undefined32[args[1]] |= bad;
    if (args[2] >= 0) write_predicate(m, args[2], mask, inside);
}

/* Half of a pair may be of what nobody wrote; it is NaN in every format then. */
static void pack(Machine *m, const i32 *args, u32 mask, int wide)
{
    Warp *w = m->warp;
    u32 none[2], narrow[LANES], garbage = wide ? 0x7FBAFFAB : 0xFFAB;
    u64 t[LANES];
    for (int i = 0; i < 2; i++) {
        none[i] = w->undefined32[args[1 + i]];
        if (none[i] & mask && w->accumulating[args[1 + i]]) read32(m, args[1 + i], mask);
    }
    const u32 *a = w->r + (size_t)args[1] * LANES, *b = w->r + (size_t)args[2] * LANES;
    for (int l = 0; l < LANES; l++) {
        u32 low = none[0] >> l & 1 ? garbage : a[l], high = none[1] >> l & 1 ? garbage : b[l];
        if (wide) t[l] = (u64)high << 32 | low;
        else narrow[l] = high << 16 | (low & 0xFFFF);
    }
    if (wide) write64(m, args[0], mask, t), w->undefined64[args[0]] |= none[0] & none[1] & mask;
    else write32(m, args[0], mask, narrow), w->undefined32[args[0]] |= none[0] & none[1] & mask;
}

/* args: operation (0 add, 1 and, 2 or, 3 xor, 4 to 7 min and max, signed and unsigned), result, value, members */
static void redux(Machine *m, const i32 *args, u32 mask)
{
    const u32 *members = read32(m, args[3], mask), *value = read32(m, args[2], mask);
    u32 result = 0, t[LANES], first = 1;
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        if (members[l] != mask) fail(m, F_divergent, l, 0, 0, 0);
        u32 v = value[l];
        switch (args[0]) {
        case 0: result += v; break;
        case 1: result = first ? v : result & v; break;
        case 2: result |= v; break;
        case 3: result ^= v; break;
        case 4: result = first || (i32)v < (i32)result ? v : result; break;
        case 5: result = first || v < result ? v : result; break;
        case 6: result = first || (i32)v > (i32)result ? v : result; break;
        default: result = first || v > result ? v : result;
        }
        first = 0;
    }
    for (int l = 0; l < LANES; l++) t[l] = result;
    write32(m, args[1], mask, t);
}

/* The warp runs until a barrier or its end. */
static void run_warp(Machine *m)
{
    Warp *w = m->warp;
    const Program *program = m->program;
    for (;;) {
        while (w->top > w->frames[w->frame] && (w->stack[w->top].pc == w->stack[w->top].join)) w->top--;
        Path *path = w->stack + w->top;
        const Instruction *x = program->code + path->pc;
        const i32 *args = program->args + x->args;
        u32 mask = path->mask;
        m->pc = path->pc;
        m->executed++;
        if (m->executed > m->launch->limit) fail(m, F_endless, 0, 0, 0, 0);
        if (x->guard >= 0) {
            u32 guard = read_predicate(m, x->guard, mask);
            mask &= x->negate ? ~guard : guard;
        }
        path->pc++;
        u32 bad = 0;
        if (!mask && x->op != OP_branch) continue;
        switch (x->op) {
#define ALU1(name, D, A, ...) case OP_##name: { const A *x0 = READ_##A(1); \
    D t[LANES]; for (int l = 0; l < LANES; l++) { A a = x0[l]; t[l] = (D)(__VA_ARGS__); } WRITE_##D; break; }
#define ALU2(name, D, A, B, ...) case OP_##name: { const A *x0 = READ_##A(1); const B *x1 = READ_##B(2); \
    D t[LANES]; for (int l = 0; l < LANES; l++) { A a = x0[l]; B b = x1[l]; t[l] = (D)(__VA_ARGS__); } WRITE_##D; break; }
#define ALU3(name, D, A, B, C, ...) case OP_##name: { \
    const A *x0 = READ_##A(1); const B *x1 = READ_##B(2); const C *x2 = READ_##C(3); D t[LANES]; \
    for (int l = 0; l < LANES; l++) { A a = x0[l]; B b = x1[l]; C c = x2[l]; t[l] = (D)(__VA_ARGS__); } WRITE_##D; break; }
#define ALU4(name, D, A, B, C, E, ...) case OP_##name: { \
    const A *x0 = READ_##A(1); const B *x1 = READ_##B(2); const C *x2 = READ_##C(3); const E *x3 = READ_##E(4); D t[LANES]; \
    for (int l = 0; l < LANES; l++) { A a = x0[l]; B b = x1[l]; C c = x2[l]; E d = x3[l]; t[l] = (D)(__VA_ARGS__); } \
    WRITE_##D; break; }
#define COMPARE(name, A, ...) case OP_##name: { const A *x0 = READ_##A(1), *x1 = READ_##A(2); \
    u32 t = 0; for (int l = 0; l < LANES; l++) { A a = x0[l], b = x1[l]; t |= (u32)(__VA_ARGS__) << l; } \
    write_predicate(m, args[0], mask, t); w->undefined_p[args[0]] |= bad; break; }
#include "alu.h"
        case OP_pack16: pack(m, args, mask, 0); break;
        case OP_pack32: pack(m, args, mask, 1); break;
        case OP_redux: redux(m, args, mask); w->meeting++; break;
        case OP_select32: {
            u32 p = w->p[args[3]], t[LANES];
            const u32 *a = peek32(m, args[1], mask & p, &bad), *b = peek32(m, args[2], mask & ~p, &bad);
            for (int l = 0; l < LANES; l++) t[l] = p >> l & 1 ? a[l] : b[l];
            bad |= w->undefined_p[args[3]] & mask;
            WRITE_u32;
            break;
        }
        case OP_select64: {
            u32 p = w->p[args[3]];
            const u64 *a = peek64(m, args[1], mask & p, &bad), *b = peek64(m, args[2], mask & ~p, &bad);
            u64 t[LANES];
            for (int l = 0; l < LANES; l++) t[l] = p >> l & 1 ? a[l] : b[l];
            bad |= w->undefined_p[args[3]] & mask;
            WRITE_u64;
            break;
        }
        case OP_and_p:
        case OP_or_p: {
            /* one false, or one true, decides */
            i32 a = args[1], b = args[2];
            u32 decides = x->op == OP_or_p ? 0 : ~0u;
            bad = (w->undefined_p[a] | w->undefined_p[b]) & mask;
            bad &= ~(~w->undefined_p[a] & (w->p[a] ^ decides)) & ~(~w->undefined_p[b] & (w->p[b] ^ decides));
            write_predicate(m, args[0], mask, x->op == OP_or_p ? w->p[a] | w->p[b] : w->p[a] & w->p[b]);
            w->undefined_p[args[0]] |= bad;
            break;
        }
        case OP_xor_p:
        case OP_not_p:
        case OP_mov_p: {
            i32 a = args[1], b = x->op == OP_xor_p ? args[2] : a;
            bad = (w->undefined_p[a] | w->undefined_p[b]) & mask;
            write_predicate(m, args[0], mask, x->op == OP_xor_p ? w->p[a] ^ w->p[b] : x->op == OP_not_p ? ~w->p[a] : w->p[a]);
            w->undefined_p[args[0]] |= bad;
            break;
        }
        case OP_true_p: write_predicate(m, args[0], mask, ~0u); break;
        case OP_false_p: write_predicate(m, args[0], mask, 0); break;
        case OP_load_global: load(m, args, mask, 1); break;
        case OP_load_shared: load(m, args, mask, 0); break;
        case OP_store_global: store(m, args, mask, 1); break;
        case OP_store_shared: store(m, args, mask, 0); break;
        case OP_copy_async: copy_async(m, args, mask); break;
        case OP_add_global: {
            u32 t[LANES] = {0};
            const u64 *address = read64(m, args[1], mask);
            const u32 *value = read32(m, args[3], mask);
            for (int l = 0; l < LANES; l++)
                if (mask >> l & 1) t[l] = add_global(m, address[l] + (i64)args[2], l, value[l]);
            write32(m, args[0], mask, t);
            break;
        }
        case OP_commit_copies: need_all(m, mask); w->copy_group++; break;
        case OP_wait_copies: need_all(m, mask); finish_copies(m, args[0] < 0 ? w->copy_group + 1 : w->copy_group - args[0]); break;
        case OP_shuffle: shuffle(m, args, mask); w->meeting++; break;
        case OP_mma: mma(m, args, mask); break;
        case OP_ldmatrix: ldmatrix(m, args, mask); break;
        case OP_stmatrix: stmatrix(m, args, mask); break;
        case OP_wgmma: wgmma(m, args, mask); break;
        case OP_wgmma_fence: need_all(m, mask); w->fences++; break;
        case OP_wgmma_commit: need_all(m, mask); w->wgmma_group++; break;
        case OP_wgmma_wait: need_all(m, mask); wgmma_wait(m, args[0]); break;
        case OP_proxy_fence: need_all(m, mask); w->proxy_fences++; w->proxy_epoch = m->epoch + 1; break;
        case OP_warp_barrier: need_all(m, mask); w->step++, w->meeting++; break;
        case OP_barrier:
            need_all(m, mask);
            w->status = WAITING, w->barrier = args[0], w->step++, w->meeting++;
            return;
        case OP_branch: {
            /* args: target, where both ways meet (-1: nowhere) */
            u32 rest = path->mask & ~mask;
            if (!mask) break;
            if (!rest) {
                path->pc = args[0];
                break;
            }
            if (w->top + 2 >= MAX_DEPTH) fail(m, F_too_deep, 0, 0, 0, 0);
            i32 next = path->pc;
            path->pc = args[1];
            w->stack[++w->top] = (Path){next, args[1], rest};
            w->stack[++w->top] = (Path){args[0], args[1], mask};
            break;
        }
        case OP_call:
            if (mask != path->mask || w->frame + 1 >= MAX_DEPTH || w->top + 1 >= MAX_DEPTH) fail(m, F_too_deep, 0, 0, 0, 0);
            w->stack[++w->top] = (Path){args[0], -2, mask};
            w->frames[++w->frame] = w->top;
            break;
        case OP_ret:
            if (mask != path->mask || w->top != w->frames[w->frame]) fail(m, F_divergent, 0, 0, 0, 0);
            if (w->frame == 0) {
                if (w->copy_count || w->hold_count) fail(m, F_copies_at_exit, 0, 0, w->copy_count, 0);
                w->status = DONE;
                return;
            }
            w->top--, w->frame--;
            break;
        case OP_nothing: break;
        case OP_trap: fail(m, F_trap, __builtin_ctz(mask), 0, 0, 0);
        default: fail(m, F_unsupported, 0, 0, x->op, 0);
        }
    }
}

static void start_warp(Machine *m, i32 index, const i32 ctaid[3])
{
    const Program *p = m->program;
    Warp *w = m->warps + index;
    i32 fixed32 = SPECIALS + p->constants32;
    memset(w->undefined32 + fixed32, 255, 4 * (size_t)(p->n32 - fixed32));
    memset(w->undefined64 + p->constants64, 255, 4 * (size_t)(p->n64 - p->constants64));
    memset(w->undefined_p, 255, 4 * (size_t)p->predicates);
    memset(w->held, 0, p->n32);
    memset(w->accumulating, 0, 4 * (size_t)p->n32);
    memset(w->fence_at, 0, 4 * (size_t)p->n32);
    for (int l = 0; l < LANES; l++) {
        w->r[TID * LANES + l] = index * LANES + l;
        w->r[LANEID * LANES + l] = l;
        w->r[WARPID * LANES + l] = index;
        w->r[NTID * LANES + l] = p->warps * LANES;
        for (int i = 0; i < 3; i++) {
            w->r[(CTAID + i) * LANES + l] = ctaid[i];
            w->r[(NCTAID + i) * LANES + l] = m->launch->grid[i];
        }
    }
    w->stack[0] = (Path){p->entry, -1, 0xFFFFFFFF};
    w->top = w->frame = w->frames[0] = 0;
    w->status = RUNNING;
    w->step = w->meeting = w->fences = 1, w->proxy_fences = w->proxy_epoch = 0;
    w->copy_count = w->hold_count = w->copy_group = w->wgmma_group = 0;
}

static u64 next_random(u64 *seed)
{
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return *seed >> 33;
}

static void run_program(Machine *m, i64 index)
{
    const Program *p = m->program;
    const i32 *grid = m->launch->grid;
    m->ctaid[0] = (i32)(index % grid[0]);
    m->ctaid[1] = (i32)(index / grid[0] % grid[1]);
    m->ctaid[2] = (i32)(index / grid[0] / grid[1]);
    m->number = (u32)index + 1;
    m->epoch = 1;
    m->executed = 0;
    m->acquired = (Release){0, 0};
    memset(m->grains, 0, ((p->shared_bytes >> p->grain) + 1) * sizeof(Grain));
    for (i32 i = 0; i < p->warps; i++) start_warp(m, i, m->ctaid);
    for (;;) {
        i32 order[MAX_WARPS], done = 0, waiting = 0;
        for (i32 i = 0; i < p->warps; i++) order[i] = i;
        if (m->launch->seed)
            for (i32 i = p->warps - 1; i > 0; i--) {
                i32 j = (i32)(next_random(&m->launch->seed) % (i + 1)), swap = order[i];
                order[i] = order[j], order[j] = swap;
            }
        for (i32 i = 0; i < p->warps; i++) {
            m->warp_index = order[i];
            m->warp = m->warps + m->warp_index;
            if (m->warp->status == RUNNING) run_warp(m);
            done += m->warp->status == DONE;
            waiting += m->warp->status == WAITING;
        }
        if (done == p->warps) break;
        if (done) fail(m, F_barrier_after_exit, 0, 0, 0, 0);
        for (i32 i = 0; i < p->warps; i++) {
            if (m->warps[i].barrier != m->warps[0].barrier) fail(m, F_barrier_mismatch, 0, 0, i, 0);
            m->warps[i].status = RUNNING;
        }
        m->epoch++;
    }
    m->launch->executed += m->executed;
}

static void *zeroed(size_t count, size_t size) { return calloc(count ? count : 1, size); }

/* Runs the programs of a launch in its order. 0, or 1 with the fault filled in. */
int run(const Program *p, Launch *launch, Fault *fault)
{
    Machine *m = zeroed(1, sizeof(Machine));
    m->program = p, m->launch = launch, m->fault = fault;
    m->shared = zeroed(p->shared_bytes + 16, 1);
    m->grains = zeroed((p->shared_bytes >> p->grain) + 1, sizeof(Grain));
    m->releases = zeroed((size_t)launch->grid[0] * launch->grid[1] * launch->grid[2], sizeof(Release));
    for (i32 i = 0; i < p->warps; i++) {
        Warp *w = m->warps + i;
        w->r = zeroed((size_t)p->n32 * LANES, 4), w->d = zeroed((size_t)p->n64 * LANES, 8), w->p = zeroed(p->predicates, 4);
        w->undefined32 = zeroed(p->n32, 4), w->undefined64 = zeroed(p->n64, 4), w->undefined_p = zeroed(p->predicates, 4);
        w->fence_at = zeroed(p->n32, 4), w->held = zeroed(p->n32, 1), w->accumulating = zeroed(p->n32, 4);
        for (int l = 0; l < LANES; l++) {
            for (i32 c = 0; c < p->constants32; c++) w->r[(SPECIALS + c) * LANES + l] = p->values32[c];
            for (i32 c = 0; c < p->constants64; c++) w->d[c * LANES + l] = p->values64[c];
        }
    }
    int failed = setjmp(m->out);
    if (!failed)
        for (i64 i = 0; i < launch->programs; i++) run_program(m, launch->order[i]);
    for (i32 i = 0; i < p->warps; i++) {
        Warp *w = m->warps + i;
        free(w->r), free(w->d), free(w->p), free(w->undefined32), free(w->undefined64), free(w->undefined_p);
        free(w->fence_at), free(w->held), free(w->accumulating), free(w->copies), free(w->holds);
    }
    free(m->shared), free(m->grains), free(m->releases), free(m);
    return failed;
}
