/* wgmma of one warp of the four: its 16 rows of the 64.

   The instruction is asynchronous. Until its group is waited for, nobody may read its results, write the registers of
   its left operand or write the shared memory it reads; registers that something else wrote need a wgmma.fence before
   it, and shared memory that threads wrote needs a fence.proxy.async. */

enum { HOLD_GRAIN, HOLD_RESULT, HOLD_OPERAND };

static void hold(Machine *m, i32 what, u32 which)
{
    Warp *w = m->warp;
    if (w->hold_count == w->hold_room) {
        w->hold_room = w->hold_room ? 2 * w->hold_room : 1024;
        w->holds = realloc(w->holds, w->hold_room * sizeof(Hold));
    }
    w->holds[w->hold_count++] = (Hold){w->wgmma_group, what, which};
}

static void wgmma_wait(Machine *m, i32 pending)
{
    Warp *w = m->warp;
    i32 left = 0, below = w->wgmma_group - pending;
    for (i32 i = 0; i < w->hold_count; i++) {
        Hold *h = w->holds + i;
        if (h->group >= below) w->holds[left++] = *h;
        else if (h->what == HOLD_GRAIN) m->grains[h->which].held--;
        else if (h->what == HOLD_OPERAND) w->held[h->which]--;
        else if (w->accumulating[h->which] - 1 < below) w->accumulating[h->which] = 0, w->undefined32[h->which] = 0;
    }
    w->hold_count = left;
}

static void need_fence(Machine *m, i32 r)
{
    if (m->warp->fence_at[r] >= m->warp->fences) fail(m, F_wgmma_without_fence, 0, 0, r, 32);
}

/* The 16-bit value at a byte address of shared memory, which stays held until the wait. */
static u16 held_value(Machine *m, u32 address)
{
    u16 value;
    Warp *w = m->warp;
    Grain *g = grain_at(m, address & ~((1u << m->program->grain) - 1));
    memcpy(&value, shared_at(m, address, 2, COLLECTIVE), 2);
    check_read(m, g, address, COLLECTIVE);
    note_read(m, g, COLLECTIVE);
    if (m->warps[g->write_warp].proxy_fences <= g->write_proxy && w->proxy_epoch <= g->write_epoch + 1)
        fail(m, F_proxy_without_fence, COLLECTIVE, address, g->write_warp, 0);
    return value;
}

/* Address of element (row, k), row along M or N, of a matrix that a descriptor describes (PTX ISA, "matrix descriptor").
   Swizzle modes exclusive-or address bits 4..6 with bits 7..9, or fewer of them. */
static u32 descriptor_address(Machine *m, u64 descriptor, i32 row, i32 k, i32 row_major)
{
    u32 start = (u32)(descriptor & 0x3FFF) << 4, leading = (u32)(descriptor >> 16 & 0x3FFF) << 4;
    u32 stride = (u32)(descriptor >> 32 & 0x3FFF) << 4, mode = (u32)(descriptor >> 62), at;
    if (descriptor >> 49 & 7) fail(m, F_unsupported, 0, descriptor, 0, 0);
    u32 wide = mode ? 256 >> mode : 16; /* bytes of a row of the pattern */
    if (!row_major)
        at = (row / 8) * stride + (row % 8) * wide + (mode ? k * 2 : (k / 8) * leading + (k % 8) * 2);
    else if (mode)
        at = row / (wide / 2) * leading + row % (wide / 2) * 2 + (k / 8) * stride + (k % 8) * wide;
    else
        at = (row / 8) * stride + row % 8 * 2 + (k / 8) * leading + (k % 8) * 16;
    at += start;
    if (mode) at ^= (at >> 7 & ((16 >> mode) - 1)) << 4;
    return at;
}

/* rows [first, first + count) times 16 k, to out[k * width + row - first], or out[(row - first) * 16 + k] */
static void described(Machine *m, u64 descriptor, i32 first, i32 count, i32 row_major, int half, f32 *out, int by_row)
{
    for (i32 row = 0; row < count; row++)
        for (i32 k = 0; k < 16; k++) {
            u32 at = descriptor_address(m, descriptor, first + row, k, row_major);
            out[by_row ? row * 16 + k : k * count + row] = element(held_value(m, at), half);
            if (at % (1u << m->program->grain) == 0 || m->program->grain < 1) {
                Grain *g = grain_at(m, at);
                g->held++;
                hold(m, HOLD_GRAIN, (u32)(g - m->grains));
            }
        }
}

/* args: half, columns, add: predicate, -1 always or -2 never; descriptor of the right operand, whether it is row major;
   0 and 4 registers, or 1, descriptor and row major, of the left operand; registers of the result */
static void wgmma(Machine *m, const i32 *args, u32 mask)
{
    static f32 right[16 * 256], sums[16 * 256];
    f32 left[16][16];
    Warp *w = m->warp;
    i32 half = args[0], width = args[1], add = 1;
    u32 result[LANES];
    need_all(m, mask);
    if (args[2] == -2) add = 0;
    else if (args[2] >= 0) {
        u32 p = read_predicate(m, args[2], mask);
        if (p && !full(p)) fail(m, F_divergent, 0, 0, 0, 0);
        add = p != 0;
    }
    u64 descriptor = read64(m, args[3], mask)[0];
    described(m, descriptor, 0, width, args[4], half, right, 0);
    const i32 *rest = args + 6;
    if (args[5]) {
        described(m, read64(m, rest[0], mask)[0], 16 * (m->warp_index % 4), 16, rest[1], half, left[0], 1);
        rest += 2;
    } else {
        const u32 *a[4];
        for (int i = 0; i < 4; i++) {
            a[i] = read32(m, rest[i], mask);
            need_fence(m, rest[i]);
        }
        left_fragment(a, half, left);
        for (int i = 0; i < 4; i++) w->held[rest[i]]++, hold(m, HOLD_OPERAND, rest[i]);
        rest += 4;
    }
    for (int i = 0; i < width / 2; i++) {
        i32 r = rest[i];
        const u32 *c = w->r + (size_t)r * LANES;
        if (!w->accumulating[r]) {
            if (add) read32(m, r, mask);
            if (w->held[r]) fail(m, F_register_held_by_wgmma, 0, 0, r, 32);
            need_fence(m, r);
        }
        for (int l = 0; l < LANES; l++) sums[result_place(l, i / 4, i % 4, width)] = add ? float_of(c[l]) : 0;
    }
    multiply(left, right, sums, width);
    for (int i = 0; i < width / 2; i++) {
        i32 r = rest[i];
        for (int l = 0; l < LANES; l++) result[l] = bits_of(sums[result_place(l, i / 4, i % 4, width)]);
        memcpy(w->r + (size_t)r * LANES, result, sizeof result);
        w->undefined32[r] = ~0u;
        w->accumulating[r] = w->wgmma_group + 1;
        hold(m, HOLD_RESULT, r);
    }
}
