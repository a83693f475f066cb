/* Shared memory. Each grain of it (the smallest access of the kernel) knows who wrote and read it last, between which
   barriers, so that two accesses that nothing orders are found whatever order the warps ran in. */

static inline u8 *shared_at(Machine *m, u32 address, i32 bytes, i32 lane)
{
    u32 offset = address - SHARED_BASE;
    if (address < SHARED_BASE || offset + bytes > (u32)m->program->shared_bytes)
        fail(m, F_shared_outside, lane, address, bytes, 0);
    if (address & (bytes - 1)) fail(m, F_shared_misaligned, lane, address, bytes, 0);
    return m->shared + offset;
}

static inline Grain *grain_at(Machine *m, u32 address) { return m->grains + ((address - SHARED_BASE) >> m->program->grain); }

static void check_read(Machine *m, Grain *g, u32 address, i32 lane)
{
    u32 step = m->warp->step;
    if (g->state != WRITTEN)
        fail(m, g->state == IN_FLIGHT ? F_shared_in_flight : F_shared_unwritten, lane, address, 0, 0);
    if (g->write_epoch == m->epoch && g->write_warp != m->warp_index)
        fail(m, F_shared_race, lane, address, g->write_warp, 1);
    if (g->write_warp == m->warp_index && g->write_epoch == m->epoch && g->write_step == step && g->write_lane != lane)
        fail(m, F_shared_race_in_warp, lane, address, g->write_lane, 1);
}

static void note_read(Machine *m, Grain *g, i32 lane)
{
    if (g->read_epoch != m->epoch) g->read_epoch = m->epoch, g->readers = 0;
    g->readers |= 1u << m->warp_index;
    if (g->read_warp != m->warp_index || g->read_step != m->warp->meeting)
        g->read_warp = m->warp_index, g->read_step = m->warp->meeting, g->read_lane = lane;
    else if (g->read_lane != lane)
        g->read_lane = MANY;
}

/* A read before the lanes of a warp meet (a barrier, a shuffle, a reduction) has taken place when one of them writes
   after it: the write is issued later, by the same warp. What is written before a meeting needs a barrier to be seen.

   same: whether the bytes stay as they are, which makes two writes harmless. */
static void check_write(Machine *m, Grain *g, u32 address, i32 lane, int same)
{
    u32 step = m->warp->step;
    if (g->held) fail(m, F_shared_held_by_wgmma, lane, address, 0, 0);
    if (g->state == IN_FLIGHT) fail(m, F_shared_in_flight, lane, address, 1, 0);
    if (g->read_epoch == m->epoch && g->readers & ~(1u << m->warp_index))
        fail(m, F_shared_race, lane, address, __builtin_ctz(g->readers & ~(1u << m->warp_index)), 0);
    if (g->readers && g->read_epoch == m->epoch && g->read_warp == m->warp_index && g->read_step == m->warp->meeting && g->read_lane != lane)
        fail(m, F_shared_race_in_warp, lane, address, g->read_lane, 0);
    if (same || g->state == UNWRITTEN || g->write_epoch != m->epoch) return;
    if (g->write_warp != m->warp_index) fail(m, F_shared_race, lane, address, g->write_warp, 2);
    if (g->write_step == step && g->write_lane != lane) fail(m, F_shared_race_in_warp, lane, address, g->write_lane, 2);
}

static void note_write(Machine *m, Grain *g, i32 lane, u8 state)
{
    g->write_epoch = m->epoch, g->write_step = m->warp->step, g->write_warp = m->warp_index, g->write_lane = lane;
    g->write_proxy = m->warp->proxy_fences, g->state = state;
}

static void load_shared(Machine *m, u32 address, i32 bytes, i32 lane, void *value)
{
    u8 *at = shared_at(m, address, bytes, lane);
    Grain *g = grain_at(m, address);
    for (i32 i = 0; i < bytes >> m->program->grain; i++) {
        check_read(m, g + i, address + (i << m->program->grain), lane);
        note_read(m, g + i, lane);
    }
    memcpy(value, at, bytes);
}

static void store_shared(Machine *m, u32 address, i32 bytes, i32 lane, const void *value)
{
    u8 *at = shared_at(m, address, bytes, lane);
    Grain *g = grain_at(m, address);
    i32 unit = 1 << m->program->grain;
    for (i32 i = 0; i < bytes; i += unit, g++) {
        int same = g->state == WRITTEN && !memcmp(at + i, (const u8 *)value + i, unit);
        check_write(m, g, address + i, lane, same);
        note_write(m, g, lane, WRITTEN);
    }
    memcpy(at, value, bytes);
}

/* cp.async: the bytes are taken now, and arrive when their group is waited for; until then nobody may look. */
static void start_copy(Machine *m, u32 address, i32 bytes, i32 lane, const u8 *data)
{
    Warp *w = m->warp;
    shared_at(m, address, bytes, lane);
    Grain *g = grain_at(m, address);
    for (i32 i = 0; i < bytes >> m->program->grain; i++) {
        check_write(m, g + i, address + (i << m->program->grain), lane, 0);
        note_write(m, g + i, lane, IN_FLIGHT);
    }
    if (w->copy_count == w->copy_room) {
        w->copy_room = w->copy_room ? 2 * w->copy_room : 256;
        w->copies = realloc(w->copies, w->copy_room * sizeof(Copy));
    }
    Copy *copy = w->copies + w->copy_count++;
    copy->group = w->copy_group, copy->lane = lane, copy->bytes = bytes, copy->target = address;
    memcpy(copy->data, data, bytes);
}

static void finish_copies(Machine *m, i32 below)
{
    Warp *w = m->warp;
    i32 left = 0;
    for (i32 i = 0; i < w->copy_count; i++) {
        Copy *copy = w->copies + i;
        if (copy->group >= below) {
            w->copies[left++] = *copy;
            continue;
        }
        Grain *g = grain_at(m, copy->target);
        for (i32 j = 0; j < copy->bytes >> m->program->grain; j++) note_write(m, g + j, copy->lane, WRITTEN);
        memcpy(m->shared + (copy->target - SHARED_BASE), copy->data, copy->bytes);
    }
    w->copy_count = left;
}
