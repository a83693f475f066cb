/* Matrix instructions: fragments as the PTX ISA lays them out over the lanes of a warp.

   Products are exact; a sum of 16 products and the addend is taken in float64 and rounded once to float32. Tensor
   cores round otherwise, which nobody documents: results agree within the bounds of float32 sums, not to the bit. */

static f32 element(u32 bits, int half) { return half ? from_f16(bits & 0xFFFF) : from_bf16(bits & 0xFFFF); }

/* Rows 0..15 and k 0..15 of the left operand: 4 registers of 2 values. */
static void left_fragment(const u32 *const a[4], int half, f32 out[16][16])
{
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 2; j++)
                out[l / 4 + 8 * (i & 1)][2 * (l % 4) + j + 8 * (i >> 1)] = element(a[i][l] >> 16 * j, half);
}

/* k 0..15 and columns 0..7 of the right operand: 2 registers of 2 values. */
static void right_fragment(const u32 *const b[2], int half, f32 *out, int width)
{
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++)
                out[(2 * (l % 4) + j + 8 * i) * width + l / 4] = element(b[i][l] >> 16 * j, half);
}

/* sums [16, width] += left [16, 16] right [16, width] */
static void multiply(f32 left[16][16], const f32 *right, f32 *sums, int width)
{
    f64 total[256];
    for (int row = 0; row < 16; row++) {
        for (int n = 0; n < width; n++) total[n] = sums[row * width + n];
        for (int k = 0; k < 16; k++) {
            f64 factor = left[row][k];
            for (int n = 0; n < width; n++) total[n] += factor * right[k * width + n];
        }
        for (int n = 0; n < width; n++) sums[row * width + n] = (f32)total[n];
    }
}

/* Where lane l has value i of the columns 8 at .. 8 at + 7 of a result with 16 rows. */
static inline int result_place(int l, int at, int i, int width)
{
    return (l / 4 + 8 * (i >> 1)) * width + 8 * at + 2 * (l % 4) + (i & 1);
}

/* args: half, 4 results, 4 + 2 registers of the operands, 4 addends */
static void mma(Machine *m, const i32 *args, u32 mask)
{
    f32 left[16][16], right[16 * 8], sums[16 * 8];
    const u32 *a[4], *b[2], *c[4];
    u32 result[LANES];
    need_all(m, mask);
    for (int i = 0; i < 4; i++) a[i] = read32(m, args[5 + i], mask), c[i] = read32(m, args[11 + i], mask);
    for (int i = 0; i < 2; i++) b[i] = read32(m, args[9 + i], mask);
    left_fragment(a, args[0], left);
    right_fragment(b, args[0], right, 8);
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++) sums[result_place(l, 0, i, 8)] = float_of(c[i][l]);
    multiply(left, right, sums, 8);
    for (int i = 0; i < 4; i++) {
        for (int l = 0; l < LANES; l++) result[l] = bits_of(sums[result_place(l, 0, i, 8)]);
        write32(m, args[1 + i], mask, result);
    }
}

/* args: number of 8x8 matrices, transposed, address, offset, registers. Lane l has the address of row l. */
static void ldmatrix(Machine *m, const i32 *args, u32 mask)
{
    u16 rows[8][8];
    u32 result[LANES];
    need_all(m, mask);
    const u32 *address = read32(m, args[2], args[0] == 4 ? mask : args[0] == 2 ? 0xFFFF : 0xFF);
    u32 at[LANES];
    memcpy(at, address, sizeof at);
    for (int i = 0; i < args[0]; i++) {
        for (int r = 0; r < 8; r++) load_shared(m, at[8 * i + r] + args[3], 16, COLLECTIVE, rows[r]);
        for (int l = 0; l < LANES; l++) {
            int x = l / 4, y = 2 * (l % 4);
            result[l] = args[1] ? rows[y][x] | (u32)rows[y + 1][x] << 16 : rows[x][y] | (u32)rows[x][y + 1] << 16;
        }
        write32(m, args[4 + i], mask, result);
    }
}

static void stmatrix(Machine *m, const i32 *args, u32 mask)
{
    u16 rows[8][8];
    need_all(m, mask);
    const u32 *at = read32(m, args[2], args[0] == 4 ? mask : args[0] == 2 ? 0xFFFF : 0xFF);
    for (int i = 0; i < args[0]; i++) {
        const u32 *value = read32(m, args[4 + i], mask);
        for (int l = 0; l < LANES; l++) {
            int x = l / 4, y = 2 * (l % 4);
            u16 low = (u16)value[l], high = (u16)(value[l] >> 16);
            if (args[1]) rows[y][x] = low, rows[y + 1][x] = high;
            else rows[x][y] = low, rows[x][y + 1] = high;
        }
        for (int r = 0; r < 8; r++) store_shared(m, at[8 * i + r] + args[3], 16, COLLECTIVE, rows[r]);
    }
}
