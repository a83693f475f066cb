/* Global memory: a list of tensors. Nothing outside of them exists, and what nobody wrote may not be read.

   Programs run one after another, which hides that they could run at once. So each written element knows its program,
   barrier and warp, and another may read it only after atomics with release and acquire. Which counter they were on is
   not looked at. */

static const Region *region_of(Machine *m, u64 address, i32 bytes, i32 lane)
{
    const Region *all = m->launch->regions, *r = m->last;
    if (!r || address - r->address >= r->bytes) {
        i32 low = 0, high = m->launch->region_count;
        while (low < high) {
            i32 middle = (low + high) / 2;
            if (all[middle].address <= address) low = middle + 1;
            else high = middle;
        }
        if (!low) fail(m, F_global_outside, lane, address, bytes, -1);
        r = m->last = all + low - 1;
    }
    if (address - r->address + bytes > r->bytes) fail(m, F_global_outside, lane, address, bytes, (i32)(r - all));
    if (address & (bytes - 1)) fail(m, F_global_misaligned, lane, address, bytes, (i32)(r - all));
    return r;
}

static u64 signature(const Machine *m) { return (u64)m->number << 32 | (u64)m->epoch << 8 | m->warp_index; }

/* Whether what was written with this signature comes before us: a barrier or the own warp within a program; between
   programs an atomic after it, and one of ours that a barrier or the own warp puts before us. */
static int ordered(const Machine *m, u64 written)
{
    u32 number = (u32)(written >> 32), epoch = (u32)written >> 8, warp = written & 255;
    if (number == m->number) return epoch < m->epoch || warp == (u32)m->warp_index;
    Release release = m->releases[number - 1];
    int before = release.epoch && (epoch < release.epoch - 1 || (epoch == release.epoch - 1 && warp == release.warp));
    int after = m->acquired.epoch && (m->epoch > m->acquired.epoch - 1 || m->acquired.warp == (u32)m->warp_index);
    return before && after;
}

static void check_owner(Machine *m, const Region *r, u64 offset, i32 bytes, i32 lane)
{
    if (!r->writer) return;
    for (u64 i = offset >> 1; i < (offset + bytes + 1) >> 1; i++)
        if (r->writer[i] && !ordered(m, r->writer[i]))
            fail(m, F_global_race, lane, r->address + offset, (i32)(r - m->launch->regions), (i32)(r->writer[i] >> 32) - 1);
}

static void load_global(Machine *m, u64 address, i32 bytes, i32 lane, void *value)
{
    const Region *r = region_of(m, address, bytes, lane);
    u64 offset = address - r->address;
    if (r->written)
        for (i32 i = 0; i < bytes; i++)
            if (!r->written[offset + i])
                fail(m, F_global_unwritten, lane, address, bytes, (i32)(r - m->launch->regions));
    check_owner(m, r, offset, bytes, lane);
    memcpy(value, r->host + offset, bytes);
}

static void store_global(Machine *m, u64 address, i32 bytes, i32 lane, const void *value)
{
    const Region *r = region_of(m, address, bytes, lane);
    u64 offset = address - r->address;
    if (!r->writer) fail(m, F_global_read_only, lane, address, bytes, (i32)(r - m->launch->regions));
    if (memcmp(r->host + offset, value, bytes)) check_owner(m, r, offset, bytes, lane);
    memcpy(r->host + offset, value, bytes);
    if (r->written) memset(r->written + offset, 1, bytes);
    for (u64 i = offset >> 1; i < (offset + bytes + 1) >> 1; i++) r->writer[i] = signature(m);
}

/* Adds with acquire and release. */
static u32 add_global(Machine *m, u64 address, i32 lane, u32 value)
{
    const Region *r = region_of(m, address, 4, lane);
    u64 offset = address - r->address;
    u32 old, sum;
    if (!r->writer) fail(m, F_global_read_only, lane, address, 4, (i32)(r - m->launch->regions));
    if (r->written && !r->written[offset]) fail(m, F_global_unwritten, lane, address, 4, (i32)(r - m->launch->regions));
    check_owner(m, r, offset, 4, lane);
    memcpy(&old, r->host + offset, 4);
    sum = old + value;
    memcpy(r->host + offset, &sum, 4);
    m->acquired = m->releases[m->number - 1] = (Release){m->epoch + 1, m->warp_index};
    return old;
}
