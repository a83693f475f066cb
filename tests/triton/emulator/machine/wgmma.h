/* wgmma of one warp of the four: its 16 rows of the 64. Waiting gives the results; until then they cannot be read. */

static void wgmma_wait(Machine *m, i32 pending)
{
    (void)pending, (void)m;
}

static void wgmma(Machine *m, const i32 *args, u32 mask)
{
    (void)args, (void)mask;
    fail(m, F_unsupported, 0, 0, 0, 0);
}
