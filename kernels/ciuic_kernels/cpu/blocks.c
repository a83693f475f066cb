/* Block codecs on a CPU: encode, dequantize, and matrix-vector products that decode on the fly.
 *
 * Values are computed with the same float32 roundings as the torch reference (compile with -ffp-contract=off), so
 * encode and dequantize agree with it bit for bit. */

#include "blocks.h"

/* ---- decode ------------------------------------------------------------------------------------------------- */

/* Bytes of a row of a plane in its first tile. */
INLINE int64_t tile_bytes(int64_t cols, int bits) { return min64(2 * TILE_WORDS, plane_bytes(cols, bits)); }

INLINE struct row row_of(const uint8_t *record, int k, int64_t rows, int64_t cols, int group, int64_t r) {
    const int b = low_plane(k);
    const uint8_t *high = record + rows * plane_bytes(cols, b), *scales = high + rows * plane_bytes(cols, k - b);
    return (struct row){record + r * tile_bytes(cols, b), high + r * tile_bytes(cols, k - b),
                        scales + r * ceil_div(cols, group), 2 * TILE_WORDS * rows};
}

/* The same for the row after it. */
INLINE struct row row_after(struct row row, int k, int64_t cols) {
    const int b = low_plane(k);
    return (struct row){row.low + tile_bytes(cols, b), row.high + tile_bytes(cols, k - b), row.scales, row.tile};
}

/* A loop that compilers vectorise, unlike the same arithmetic inside the loops over rows. */
INLINE void decode_scales(const uint8_t *bytes, uint8_t exponent, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = scale_value(bytes[i], exponent);
}

/* Rows first .. first + count of a block to out, in float32 or bfloat16. */
INLINE void decode_even(const uint8_t *record, uint8_t exponent, int64_t rows, int k, int cols, int group,
                        int64_t first, int64_t count, const struct grid *g, int dtype, void *out, int64_t at,
                        int64_t stride) {
    const int groups = cols / group;
    struct row row = row_of(record, k, rows, cols, group, first);
    float scales[ROWS * COLS / 32];
    decode_scales(row.scales, exponent, count * groups, scales);
    for (int64_t r = 0; r < count; r++, at += stride, row = row_after(row, k, cols)) {
#pragma GCC unroll 8
        for (int j = 0; j < cols / LANES; j++) {
            f32v level = levels16(codes16(row, k, cols, j), k, g);
            store(out, dtype, at + LANES * j, splat(scales[r * groups + LANES * j / group]) * level);
        }
    }
}

/* Adds a plane's bits of row r to its codes, from bit ``shift`` on. Tiles may have any number of words: 8 codes are
 * written at a time, and what lies past a word that exists is zero. */
static void unpack_row(const uint8_t *plane, int64_t rows, int64_t cols, int64_t r, int bits, int shift,
                       uint8_t *codes) {
    int64_t left = plane_bytes(cols, bits) / 2; /* words */
    for (; left > 0; left -= TILE_WORDS, plane += 2 * TILE_WORDS * rows) {
        int64_t words = min64(TILE_WORDS, left);
        u16v8 v = {0};
        memcpy(&v, plane + 2 * words * r, (size_t)(2 * words));
        for (int j = 0; j < 16 / bits; j++, codes += words) {
            u16v8 fields = (v >> (4 * (j % 4) + bits * (j / 4))) & (uint16_t)((1 << bits) - 1);
            u8v8 sum;
            memcpy(&sum, codes, 8);
            sum |= __builtin_convertvector(fields << shift, u8v8);
            memcpy(codes, &sum, 8);
        }
    }
}

static void decode_row_ragged(const uint8_t *record, uint8_t exponent, int k, int group, int64_t rows, int64_t cols,
                              int64_t r, const struct grid *g, float *out) {
    const int b = low_plane(k);
    const uint8_t *high = record + rows * plane_bytes(cols, b);
    const uint8_t *scales = high + rows * plane_bytes(cols, k - b) + r * ceil_div(cols, group);
    uint8_t codes[COLS + TILE_WORDS] = {0};
    unpack_row(record, rows, cols, r, b, 0, codes);
    if (k > b) unpack_row(high, rows, cols, r, k - b, b, codes);
    for (int64_t c = 0; c < cols; c++) out[c] = scale_value(scales[c / group], exponent) * g->levels[codes[c]];
}

/* Integer arithmetic: exact, needs no hardware support, and does not depend on the treatment of subnormals. */
static inline float half_value(uint16_t half) {
    uint32_t rest = half & 0x7fffu, bits = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
    uint32_t subnormal = as_bits((float)(int32_t)rest * 0x1p-24f);
    return as_float((rest < 0x400u ? subnormal : bits) | (uint32_t)(half & 0x8000u) << 16);
}

static void widen_row(const uint16_t *src, int dtype, int64_t cols, float *out) {
    if (dtype == BF16) for (int64_t c = 0; c < cols; c++) out[c] = as_float((uint32_t)src[c] << 16);
    else for (int64_t c = 0; c < cols; c++) out[c] = half_value(src[c]);
}

static void load_line(const void *src, int dtype, int64_t at, int64_t cols, float *out) {
    if (dtype == F32) memcpy(out, (const float *)src + at, (size_t)cols * sizeof(float));
    else widen_row((const uint16_t *)src + at, dtype, cols, out);
}

static void store_line(const float *line, int64_t cols, int dtype, void *out, int64_t at) {
    if (dtype == F32) memcpy((float *)out + at, line, (size_t)cols * sizeof(float));
    else for (int64_t c = 0; c < cols; c++) ((uint16_t *)out)[at + c] = to_bf16(line[c]);
}

/* Columns 64 j .. 64 j + 63 of a row of a bitmap, the first in the lowest bit; nothing past the last column. */
static inline uint64_t stored_columns(const uint8_t *row, int64_t cols, int64_t j) {
    uint64_t bits = 0;
    int64_t left = cols - 64 * j;
    if (left >= 64) {
        memcpy(&bits, row + 8 * j, 8);
        return bits;
    }
    memcpy(&bits, row + 8 * j, (size_t)ceil_div(left, 8));
    return bits & ((1ull << left) - 1);
}

/* Field i of a plane in natural order. */
static inline int slot(const uint8_t *plane, int bits, int64_t i) {
    uint64_t at = (uint64_t)i * (unsigned)bits;
    return (plane[at / 8] >> (at % 8)) & ((1 << bits) - 1);
}

static void decode_sparse(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols, int64_t first,
                          int64_t count, const struct grid *g, int dtype, void *out, int64_t at, int64_t stride) {
    const int k = codec_width(id), b = low_plane(k);
    const struct sparse s = sparse_of(id, rows, cols);
    int64_t row_bytes = ceil_div(cols, 8), words = ceil_div(cols, 64), i = 0;
    for (int64_t r = 0; r < first; r++)
        for (int64_t j = 0; j < words; j++) i += __builtin_popcountll(stored_columns(record + r * row_bytes, cols, j));
    for (int64_t r = first; r < first + count; r++, at += stride) {
        float line[COLS] = {0}, scale = scale_value(record[s.scales + r], exponent);
        for (int64_t j = 0; j < words; j++) {
            uint64_t bits = stored_columns(record + r * row_bytes, cols, j);
            for (; bits && i < s.slots; bits &= bits - 1, i++) { /* no slot, no weight */
                int q = slot(record + s.low, b, i);
                if (k > b) q |= slot(record + s.high, k - b, i) << b;
                line[64 * j + __builtin_ctzll(bits)] = scale * g->levels[q];
            }
        }
        store_line(line, cols, dtype, out, at);
    }
}

/* Whether a block is a grid of 128 or 64 columns: those have fast paths. */
static inline int is_even(int id, int64_t cols) {
    return id > RAW_FP16 && id < SPARSE && (cols == COLS || cols == COLS / 2);
}

static void decode_any(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols, int64_t first,
                       int64_t count, const struct grid *grids, int dtype, void *out, int64_t at, int64_t stride) {
    int k = codec_width(id), group = codec_group(id);
    float line[COLS] = {0};
    if (id >= SPARSE) {
        decode_sparse(record, id, exponent, rows, cols, first, count, grids + k, dtype, out, at, stride);
        return;
    }
    for (int64_t r = first; r < first + count; r++, at += stride) {
        if (id == RAW_BF16 || id == RAW_FP16)
            widen_row((const uint16_t *)record + r * cols, id == RAW_BF16 ? BF16 : F16, cols, line);
        else if (id != ZERO)
            decode_row_ragged(record, exponent, k, group, rows, cols, r, grids + k, line);
        store_line(line, cols, dtype, out, at);
    }
}

/* For blocks of 128 or 64 columns and groups of 32 or 64, as constants C and G. */
#define FOR_SHAPES(CALL, K)                                                                                  \
    if (cols == COLS && group == 32) { CALL(K, COLS, 32); }                                                    \
    else if (cols == COLS) { CALL(K, COLS, 64); }                                                              \
    else if (group == 32) { CALL(K, (COLS / 2), 32); }                                                         \
    else { CALL(K, (COLS / 2), 64); }

static void decode_block(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols, int64_t first,
                         int64_t count, const struct grid *grids, int dtype, void *out, int64_t at, int64_t stride) {
    int k = codec_width(id), group = codec_group(id);
    const struct grid *g = grids + k;
    if (!is_even(id, cols)) {
        decode_any(record, id, exponent, rows, cols, first, count, grids, dtype, out, at, stride);
        return;
    }
#define DECODE(K, C, G)                                                                                      \
    if (dtype == F32) decode_even(record, exponent, rows, K, C, G, first, count, g, F32, out, at, stride);   \
    else decode_even(record, exponent, rows, K, C, G, first, count, g, BF16, out, at, stride)
#define CASE(K) case K: FOR_SHAPES(DECODE, K) break;
    switch (k) { FOR_WIDTHS(CASE) }
#undef CASE
#undef DECODE
}

static void dequantize_strip(const struct matrix *m, int64_t strip, int64_t first, int64_t count,
                             const struct grid *grids, int dtype, void *out) {
    int64_t kblocks = ceil_div(m->cols, COLS), rows = min64(ROWS, m->rows - strip * ROWS);
    const uint8_t *record = m->arena + m->strip_offsets[strip];
    for (int64_t kb = 0; kb < kblocks; kb++) {
        const uint8_t *tag = m->tags + 2 * (strip * kblocks + kb);
        int64_t cols = min64(COLS, m->cols - kb * COLS);
        decode_block(record, tag[0], tag[1], rows, cols, first, count, grids, dtype, out, kb * COLS, m->cols);
        record += record_nbytes(tag[0], rows, cols);
    }
}

/* Rows [first_strip * 64, ...) of a matrix as float32 or bfloat16, row-major. */
void ciuic_dequantize(const uint8_t *arena, const uint8_t *tags, const int64_t *strip_offsets, int64_t rows,
                      int64_t cols, int64_t first_strip, int64_t last_strip, const struct grid *grids, int dtype,
                      void *out) {
    struct matrix m = {arena, tags, strip_offsets, rows, cols};
    int64_t size = dtype == F32 ? 4 : 2;
#pragma omp parallel for schedule(static) if (rows * cols > SERIAL_WEIGHTS)
    for (int64_t s = first_strip; s < last_strip; s++)
        dequantize_strip(&m, s, 0, min64(ROWS, rows - s * ROWS), grids, dtype,
                         (uint8_t *)out + (s - first_strip) * ROWS * cols * size);
}

/* Single rows of a matrix (an embedding): out [count, cols] float32 or bfloat16. */
void ciuic_gather(const uint8_t *arena, const uint8_t *tags, const int64_t *strip_offsets, int64_t rows,
                  int64_t cols, const int64_t *ids, int64_t count, const struct grid *grids, int dtype, void *out) {
    struct matrix m = {arena, tags, strip_offsets, rows, cols};
#pragma omp parallel for schedule(static) if (count > 16)
    for (int64_t i = 0; i < count; i++)
        dequantize_strip(&m, ids[i] / ROWS, ids[i] % ROWS, 1, grids, dtype,
                         (uint8_t *)out + i * cols * (dtype == F32 ? 4 : 2));
}

/* ---- products ----------------------------------------------------------------------------------------------- */

/* A vector of partial sums for each row and token of a band of rows, added up when the band is done. Bands are
 * short when tokens are many, so that the sums stay in the first-level cache. */
enum { BAND_SUMS = 256 };

/* sums[r] += row first + r . x, for one token. */
INLINE void product_one(const uint8_t *record, uint8_t exponent, int64_t rows, int k, int cols, int group,
                        int64_t first, int64_t count, const struct grid *g, const float *x, f32v *sums) {
    const int groups = cols / group;
    struct row row = row_of(record, k, rows, cols, group, first);
    float scales[ROWS * COLS / 32];
    decode_scales(row.scales, exponent, count * groups, scales);
    for (int64_t r = 0; r < count; r++, row = row_after(row, k, cols)) {
        f32v total = sums[r];
#pragma GCC unroll 4
        for (int n = 0; n < groups; n++) {
            f32v part = splat(0);
#pragma GCC unroll 4
            for (int j = n * group / LANES; j < (n + 1) * group / LANES; j++)
                part = multiply_add(levels16(codes16(row, k, cols, j), k, g),
                                    load(x + LANES * j), part);
            total = multiply_add(splat(scales[r * groups + n]), part, total);
        }
        sums[r] = total;
    }
}

INLINE void decode_weights(struct row row, const float *scales, int k, int cols, int group, const struct grid *g,
                           f32v *out) {
#pragma GCC unroll 8
    for (int j = 0; j < cols / LANES; j++)
        out[j] = splat(scales[LANES * j / group]) * levels16(codes16(row, k, cols, j), k, g);
}

/* sums[r * tokens + t] += row first + r . x[t]. Two rows stay decoded in registers while the tokens pass by, so
 * each load of x serves two multiply-adds. */
INLINE void product_many(const uint8_t *record, uint8_t exponent, int64_t rows, int k, int cols, int group,
                         int64_t first, int64_t count, int tokens, const struct grid *g, const float *const *x,
                         int64_t at, f32v *sums) {
    const int groups = cols / group;
    struct row row = row_of(record, k, rows, cols, group, first);
    float scales[ROWS * COLS / 32];
    decode_scales(row.scales, exponent, count * groups, scales);
    for (int64_t r = 0; r < count; r += 2) {
        int64_t second = min64(r + 1, count - 1); /* an odd last row is its own partner, and counts once */
        f32v a[COLS / LANES], b[COLS / LANES];
        decode_weights(row, scales + r * groups, k, cols, group, g, a);
        if (second > r) row = row_after(row, k, cols);
        decode_weights(row, scales + second * groups, k, cols, group, g, b);
        row = row_after(row, k, cols);
        f32v *out = sums + r * tokens, *partner = sums + second * tokens;
        for (int t = 0; t < tokens; t++) {
            f32v one = splat(0), two = splat(0), three = splat(0), four = splat(0);
#pragma GCC unroll 4
            for (int j = 0; j < cols / LANES; j += 2) {
                f32v even = load(x[t] + at + LANES * j), odd = load(x[t] + at + LANES * (j + 1));
                one = multiply_add(a[j], even, one);
                two = multiply_add(b[j], even, two);
                three = multiply_add(a[j + 1], odd, three);
                four = multiply_add(b[j + 1], odd, four);
            }
            f32v mine = out[t] + (one + three);
            partner[t] += two + four;
            out[t] = mine;
        }
    }
}

/* Any block: a few rows at a time are decoded, as a row of a sparse block is found by counting those before it. */
static void product_any(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols, int64_t first,
                        int64_t count, int tokens, const struct grid *grids, const float *const *x, int64_t at,
                        f32v *sums) {
    enum { PART = 16 };
    float lines[PART][COLS] = {{0}};
    for (int64_t r = 0; r < count; r++) {
        if (r % PART == 0)
            decode_block(record, id, exponent, rows, cols, first + r, min64(PART, count - r), grids, F32, lines, 0,
                         COLS);
        const float *line = lines[r % PART];
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < COLS / LANES; j++)
                sums[r * tokens + t] =
                    multiply_add(load(line + LANES * j), load(x[t] + at + LANES * j), sums[r * tokens + t]);
    }
}

/* One function for each width: together they would be too long for a compiler to treat well. */
#define PRODUCT(K, C, G)                                                                                     \
    if (tokens == 1) product_one(record, exponent, rows, K, C, G, first, count, g, *x + at, sums);           \
    else product_many(record, exponent, rows, K, C, G, first, count, tokens, g, x, at, sums)
#define PRODUCTS(K)                                                                                          \
    static void products_##K(const uint8_t *record, uint8_t exponent, int64_t rows, int64_t cols, int group, \
                             int64_t first, int64_t count, int tokens, const struct grid *g,                 \
                             const float *const *x, int64_t at, f32v *sums) {                                \
        FOR_SHAPES(PRODUCT, K)                                                                               \
    }
FOR_WIDTHS(PRODUCTS)

static void block_product(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols, int64_t first,
                          int64_t count, int tokens, const struct grid *grids, const float *const *x, int64_t at,
                          f32v *sums) {
    int k = codec_width(id), group = codec_group(id);
    if (!is_even(id, cols)) {
        product_any(record, id, exponent, rows, cols, first, count, tokens, grids, x, at, sums);
        return;
    }
#define CASE(K)                                                                                              \
    case K: products_##K(record, exponent, rows, cols, group, first, count, tokens, grids + k, x, at, sums); break;
    switch (k) { FOR_WIDTHS(CASE) }
#undef CASE
}

/* y[y_rows[t], rows of the strip] = W[rows of the strip, :] . x[t]; x is padded with zeros to whole blocks. */
static void strip_product(const struct matrix *m, int64_t strip, int tokens, const struct grid *grids,
                          const float *const *x, int dtype, void *y, const int64_t *y_rows) {
    int64_t kblocks = ceil_div(m->cols, COLS), rows = min64(ROWS, m->rows - strip * ROWS);
    int64_t band = min64(ROWS, BAND_SUMS / tokens & ~1);
    f32v sums[BAND_SUMS];
    for (int64_t first = 0; first < rows; first += band) {
        const uint8_t *record = m->arena + m->strip_offsets[strip], *tag = m->tags + 2 * strip * kblocks;
        int64_t count = min64(band, rows - first);
        memset(sums, 0, (size_t)(count * tokens) * sizeof(f32v));
        for (int64_t kb = 0; kb < kblocks; kb++, tag += 2) {
            int64_t cols = min64(COLS, m->cols - kb * COLS);
            if (tag[0] != ZERO)
                block_product(record, tag[0], tag[1], rows, cols, first, count, tokens, grids, x, kb * COLS, sums);
            record += record_nbytes(tag[0], rows, cols);
        }
        for (int t = 0; t < tokens; t++)
            for (int64_t r = 0; r < count; r++) {
                int64_t at = y_rows[t] * m->rows + strip * ROWS + first + r;
                if (dtype == F32) ((float *)y)[at] = sum(sums[r * tokens + t]);
                else ((uint16_t *)y)[at] = to_bf16(sum(sums[r * tokens + t]));
            }
    }
}

static float *padded_float(const void *x, int dtype, int64_t count, int64_t cols, int64_t width) {
    float *out = aligned_alloc(64, (size_t)(count * width) * sizeof(float)); /* width is a multiple of 128 */
    if (!out) return NULL;
    for (int64_t r = 0; r < count; r++) {
        float *line = out + r * width;
        load_line(x, dtype, r * cols, cols, line);
        memset(line + cols, 0, (size_t)(width - cols) * sizeof(float));
    }
    return out;
}

/* Grouped products. Group i multiplies the output rows order[starts[i] .. starts[i + 1]) (at most MAX_TOKENS) with
 * matrix experts[i]: y[r] = W[experts[i]] . x[r / fan]. x [count, cols] and y [*, rows] are float32 or bfloat16.
 * Returns 0, or 1 when there is no memory for x as float32. */
int ciuic_products(const uint8_t *arena, const uint8_t *tags, const int64_t *strip_offsets, int64_t rows,
                   int64_t cols, const struct grid *grids, const void *x, int dtype, int64_t count, int64_t fan,
                   const int64_t *order, const int64_t *starts, const int64_t *experts, int64_t groups, void *y) {
    int64_t strips = ceil_div(rows, ROWS), kblocks = ceil_div(cols, COLS);
    /* An odd multiple of 512 bytes from row to row: in steps of 4096 all would share a few sets of the cache. */
    int64_t width = (ceil_div(kblocks - 1, 8) * 8 + 1) * COLS;
    float *padded = padded_float(x, dtype, count, cols, width);
    if (!padded) return 1;
#pragma omp parallel for schedule(static) if (groups * rows * cols > SERIAL_WEIGHTS)
    for (int64_t task = 0; task < groups * strips; task++) {
        int64_t i = task / strips, e = experts[i];
        struct matrix m = {arena, tags + e * strips * kblocks * 2, strip_offsets + e * strips, rows, cols};
        const float *xs[MAX_TOKENS];
        int tokens = (int)(starts[i + 1] - starts[i]);
        for (int t = 0; t < tokens; t++) xs[t] = padded + order[starts[i] + t] / fan * width;
        strip_product(&m, task % strips, tokens, grids, xs, dtype, y, order + starts[i]);
    }
    free(padded);
    return 0;
}

/* ---- FP8 ---------------------------------------------------------------------------------------------------- */

/* Rows [first, last) of an 8-bit float matrix [*, cols] with one scale for each block [block_rows, block_cols], as
 * float32. values [256] is what each byte stands for; scales [*, ceil(cols / block_cols)]. */
void ciuic_fp8_rows(const uint8_t *src, int64_t cols, int64_t first, int64_t last, const float *values,
                    const float *scales, int64_t block_rows, int64_t block_cols, float *out) {
    int64_t per_row = ceil_div(cols, block_cols);
#pragma omp parallel for schedule(static) if ((last - first) * cols > SERIAL_WEIGHTS)
    for (int64_t r = first; r < last; r++) {
        const uint8_t *codes = src + r * cols;
        float *line = out + (r - first) * cols;
        for (int64_t b = 0; b < per_row; b++) {
            float scale = scales[r / block_rows * per_row + b];
            int64_t end = min64(cols, (b + 1) * block_cols);
            for (int64_t c = b * block_cols; c < end; c++) line[c] = values[codes[c]] * scale;
        }
    }
}

/* ---- encode ------------------------------------------------------------------------------------------------- */

/* Codes of one group at one scale, and the squared error, added up in the order of tree_sum() in codecs/grid.py. */
INLINE float quantize_group(const float *w, int group, float scale, int k, const struct grid *g, i32v *codes) {
    f32v errors[COLS / LANES], inverse = splat(1.0f / scale);
#pragma GCC unroll 8
    for (int j = 0; j < group / LANES; j++) {
        f32v v = load(w + LANES * j), y = v * inverse;
        i32v q = guess16(y, k, g);
        f32v lower = levels16(q, k, g), upper = levels16(q + 1, k, g);
        i32v up = above(y, (upper + lower) * 0.5f); /* -1 where true */
        codes[j] = q - up;
        f32v difference = v - scale * blend(up, upper, lower);
        errors[j] = difference * difference;
    }
    if (group == COLS)
        for (int j = 0; j < 4; j++) errors[j] += errors[j + 4];
    if (group >= 64) {
        errors[0] += errors[2];
        errors[1] += errors[3];
    }
    return sum(errors[0] + errors[1]);
}

/* Smallest scale index that clips nothing, with the sign in bit 31, for each group; returns the largest index. */
INLINE int32_t anchor_block(float (*w)[COLS], int64_t rows, int64_t groups, int group, const struct grid *g,
                            uint32_t *anchors) {
    int32_t top = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < groups; n++) {
            f32v high = load(w[r] + n * group), low = high;
#pragma GCC unroll 4
            for (int j = 1; j < group / LANES; j++) {
                high = larger(high, load(w[r] + n * group + LANES * j));
                low = smaller(low, load(w[r] + n * group + LANES * j));
            }
            float above = maximum(high), below = maximum(-low);
            uint32_t bits = as_bits((above > below ? above : below) / (1.0f + g->linear)) & 0x7fffffffu;
            uint32_t sign = above > below; /* negative scales lie half a step of the mantissa higher */
            int32_t index = (int32_t)((bits + ((1u << 19) - 1) - (sign << 18)) >> 19);
            anchors[r * groups + n] = (uint32_t)index | sign << 31;
            top = index > top ? index : top;
        }
    return top;
}

/* Codes and scale byte of one group: the candidate of least squared error, the first among equals. Every candidate
 * is computed and kept, because which one wins is not predictable enough for a branch. */
INLINE uint8_t encode_group(const float *w, int k, int group, uint32_t anchor, uint8_t exponent,
                            const struct grid *g, uint8_t *out) {
    i32v codes[8][COLS / LANES];
    uint8_t bytes[8];
    float best = INFINITY;
    int kept = 0;
    for (int c = 0; c < g->offset_count; c++) {
        int32_t index = (int32_t)(anchor & 0xffff) + g->offsets[c] - 16 * exponent;
        bytes[c] = (uint8_t)((uint32_t)(index < 0 ? 0 : index > 127 ? 127 : index) << 1 | anchor >> 31);
        float error = quantize_group(w, group, scale_value(bytes[c], exponent), k, g, codes[c]);
        kept = error < best ? c : kept;
        best = error < best ? error : best;
    }
    for (int j = 0; j < group / LANES; j++) store_bytes(out + LANES * j, codes[kept][j]);
    return bytes[kept];
}

INLINE void encode_grid(float (*w)[COLS], int k, int group, int64_t rows, int64_t cols, const struct grid *g,
                        uint8_t *record, uint8_t *exponent) {
    const int b = low_plane(k);
    int64_t groups = ceil_div(cols, group);
    uint8_t *high = record + rows * plane_bytes(cols, b), *scales = high + rows * plane_bytes(cols, k - b);
    uint8_t codes[COLS + TILE_WORDS];
    uint32_t anchors[ROWS * COLS / 32];
    *exponent = exponent_of(anchor_block(w, rows, groups, group, g, anchors));
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < groups; n++)
            scales[r * groups + n] = encode_group(w[r] + n * group, k, group, anchors[r * groups + n], *exponent, g,
                                                  codes + n * group);
        memset(codes + cols, 0, (size_t)(COLS + TILE_WORDS - cols));
        pack_row(codes, rows, cols, r, b, 0, record);
        if (k > b) pack_row(codes, rows, cols, r, k - b, b, high);
    }
}

#define ENCODE(K)                                                                                            \
    static void encode_##K(float (*w)[COLS], int group, int64_t rows, int64_t cols, const struct grid *g,    \
                           uint8_t *record, uint8_t *exponent) {                                             \
        if (group == 32) encode_grid(w, K, 32, rows, cols, g, record, exponent);                             \
        else encode_grid(w, K, 64, rows, cols, g, record, exponent);                                         \
    }
FOR_WIDTHS(ENCODE)
#undef ENCODE

/* The bits of the count-th largest magnitude of a block; every other bound is too high or too low. */
static int32_t least_stored(float (*w)[COLS], int64_t rows, int64_t count) {
    int32_t least = 0;
    for (int bit = 30; bit >= 0; bit--) {
        int32_t bound = least | (int32_t)1 << bit;
        i32v reaching = {};
        for (int64_t r = 0; r < rows; r++)
            for (int j = 0; j < COLS / LANES; j++)
                reaching -= ((i32v)load(w[r] + LANES * j) & 0x7fffffff) >= bound;
        int64_t total = 0;
        for (int i = 0; i < LANES; i++) total += reaching[i];
        if (total >= count) least = bound;
    }
    return least;
}

/* Sets all weights to zero but the count of largest magnitude, the first among equals, and marks those in an empty
 * bitmap. */
static void prune(float (*w)[COLS], int64_t rows, int64_t cols, int64_t count, uint8_t *bitmap) {
    int32_t least = least_stored(w, rows, count);
    int64_t room = count;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) room -= (int32_t)(as_bits(w[r][c]) & 0x7fffffff) > least;
    for (int64_t r = 0; r < rows; r++, bitmap += ceil_div(cols, 8))
        for (int64_t c = 0; c < cols; c++) {
            int32_t magnitude = (int32_t)(as_bits(w[r][c]) & 0x7fffffff);
            int stored = magnitude > least || (magnitude && magnitude == least && room-- > 0);
            if (!stored) w[r][c] = 0;
            bitmap[c / 8] |= (uint8_t)(stored << c % 8);
        }
}

/* One function for all widths: constants for each of them would add half to the time that this file compiles. */
static void encode_sparse(float (*w)[COLS], int id, int64_t rows, int64_t cols, const struct grid *grids,
                          uint8_t *record, uint8_t *exponent) {
    const int k = codec_width(id), b = low_plane(k);
    const struct sparse s = sparse_of(id, rows, cols);
    uint8_t codes[COLS], *low = record + s.low, *high = record + s.high;
    uint32_t anchors[ROWS];
    int64_t i = 0;
    memset(record, 0, (size_t)s.end);
    prune(w, rows, cols, s.slots, record);
    *exponent = exponent_of(anchor_block(w, rows, 1, COLS, grids + k, anchors));
    for (int64_t r = 0; r < rows; r++) {
        record[s.scales + r] = encode_group(w[r], k, COLS, anchors[r], *exponent, grids + k, codes);
        for (int64_t j = 0; j < ceil_div(cols, 64); j++) {
            uint64_t bits = stored_columns(record + r * ceil_div(cols, 8), cols, j);
            for (; bits; bits &= bits - 1, i++) {
                int q = codes[64 * j + __builtin_ctzll(bits)];
                low[i * b / 8] |= (uint8_t)((q & ((1 << b) - 1)) << (i * b % 8));
                if (k > b) high[i * (k - b) / 8] |= (uint8_t)((q >> b) << (i * (k - b) % 8));
            }
        }
    }
}

static int encode_raw(float (*w)[COLS], const void *src, int dtype, int id, int64_t rows, int64_t cols,
                      int64_t stride, int64_t at, uint16_t *record) {
    if (id == RAW_FP16 && dtype != F16) return 2;
    for (int64_t r = 0; r < rows; r++) {
        if (id == RAW_BF16) store_line(w[r], cols, BF16, record, r * cols);
        else memcpy(record + r * cols, (const uint16_t *)src + at + r * stride, (size_t)cols * 2);
    }
    return 0;
}

/* The block's weights as float32, padded with zeros to 128 columns; returns whether all are finite. */
static int load_block(const void *src, int dtype, int64_t stride, int64_t at, int64_t rows, int64_t cols,
                      float (*w)[COLS]) {
    i32v bad = {};
    int found = 0;
    for (int64_t r = 0; r < rows; r++) {
        if (cols == COLS) load_line(src, dtype, at + r * stride, COLS, w[r]);
        else load_line(src, dtype, at + r * stride, cols, w[r]);
        memset(w[r] + cols, 0, (size_t)(COLS - cols) * sizeof(float));
        for (int j = 0; j < COLS / LANES; j++) bad |= ((i32v)load(w[r] + LANES * j) & 0x7fffffff) > 0x7f7fffff;
    }
    for (int i = 0; i < LANES; i++) found |= bad[i];
    return !found;
}

static int encode_block(const void *src, int dtype, int64_t stride, int64_t at, int64_t rows, int64_t cols,
                        const struct grid *grids, uint8_t *tag, uint8_t *record) {
    float w[ROWS][COLS];
    int id = tag[0], k = codec_width(id), group = codec_group(id);
    if (!load_block(src, dtype, stride, at, rows, cols, w)) return 1;
    tag[1] = 0;
    if (id == ZERO) return 0;
    memset(record + record_nbytes(id, rows, cols) - ALIGN, 0, ALIGN); /* the padding */
    if (id == RAW_BF16 || id == RAW_FP16)
        return encode_raw(w, src, dtype, id, rows, cols, stride, at, (uint16_t *)record);
    if (id >= SPARSE) {
        encode_sparse(w, id, rows, cols, grids, record, tag + 1);
        return 0;
    }
#define CASE(K) case K: encode_##K(w, group, rows, cols, grids + k, record, tag + 1); break;
    switch (k) { FOR_WIDTHS(CASE) }
#undef CASE
    return 0;
}

/* Encode src [rows, cols] (row stride in elements). tags hold the codec ids and receive the exponents.
 * Returns 0, 1 when a weight is not finite, 2 when a dtype cannot be stored in a codec. */
int ciuic_encode(const void *src, int dtype, int64_t stride, int64_t rows, int64_t cols, uint8_t *tags,
                 const int64_t *strip_offsets, const struct grid *grids, uint8_t *arena) {
    int64_t kblocks = ceil_div(cols, COLS), strips = ceil_div(rows, ROWS);
    int status = 0;
#pragma omp parallel for schedule(dynamic) reduction(max : status) if (rows * cols > SERIAL_WEIGHTS)
    for (int64_t s = 0; s < strips; s++) {
        uint8_t *record = arena + strip_offsets[s];
        int64_t height = min64(ROWS, rows - s * ROWS);
        for (int64_t kb = 0; kb < kblocks; kb++) {
            uint8_t *tag = tags + 2 * (s * kblocks + kb);
            int64_t width = min64(COLS, cols - kb * COLS);
            int code = encode_block(src, dtype, stride, s * ROWS * stride + kb * COLS, height, width, grids, tag,
                                    record);
            status = code > status ? code : status;
            record += record_nbytes(tag[0], height, width);
        }
    }
    return status;
}
