/* Block codecs on a CPU: encode, dequantize, and matrix-vector products that decode on the fly.
 *
 * The format is specified in codecs/grid.py and docs/checkpoint-format.md; every table of it is handed in from
 * there (struct grid), so nothing is listed twice. Values are computed with the same float32 roundings as the
 * torch reference (compile with -ffp-contract=off), so encode and dequantize agree with it bit for bit.
 *
 * Plain C11 with GCC/clang vector extensions; AVX-512 only replaces the table lookup and the multiply-add. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { ROWS = 64, COLS = 128, LANES = 16, GUESSES = 1025, MAX_TOKENS = 8, ALIGN = 16 };
enum { F32 = 0, BF16 = 1, F16 = 2 };
enum { ZERO = 0, RAW_BF16 = 1, RAW_FP16 = 2 };

typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t u8v __attribute__((vector_size(16), aligned(1), may_alias));

/* One width of the grid family; filled by native.py from codecs/grid.py. */
struct grid {
    float levels[256];      /* value of each code at scale 1 */
    float thresholds[256];  /* midpoints; +inf past the last */
    int32_t guess[GUESSES]; /* codes below the start of each 1/512 of [-1, 1] */
    int32_t offsets[8];     /* scale candidates */
    int32_t offset_count;
    float curve;
};

struct matrix {
    const uint8_t *arena;         /* first record of the matrix's parameter */
    const uint8_t *tags;          /* [strips, kblocks, 2] of this matrix */
    const int64_t *strip_offsets; /* [strips] of this matrix, into arena */
    int64_t rows, cols;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }

static inline uint16_t to_bf16(float f) {
    uint32_t b = as_bits(f);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((b >> 16) | 0x40);
    return (uint16_t)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}

static inline float scale_value(uint8_t byte, uint8_t exponent) {
    return as_float(((((uint32_t)exponent << 4) + (byte & 127)) << 19) | ((uint32_t)(byte >> 7) << 31));
}

static inline int codec_width(int id) { return id & 31; }
static inline int codec_group(int id) { return id & 96; }

static inline int low_plane(int k) { return k == 3 ? 2 : k == 5 || k == 6 ? 4 : k; }

static inline int64_t plane_bytes(int64_t cols, int bits) { return ceil_div(cols * bits, 8); }

static int64_t record_nbytes(int id, int64_t rows, int64_t cols) {
    int64_t n;
    if (id == ZERO) return 0;
    if (id == RAW_BF16 || id == RAW_FP16) {
        n = 2 * rows * cols;
    } else {
        int k = codec_width(id), low = low_plane(k);
        n = rows * (plane_bytes(cols, low) + plane_bytes(cols, k - low) + ceil_div(cols, codec_group(id)));
    }
    return ceil_div(n, ALIGN) * ALIGN;
}

/* ---- vectors ------------------------------------------------------------------------------------------------ */

static inline f32v load(const float *p) { return *(const f32v *)p; }
static inline f32v splat(float f) { return (f32v){} + f; }

/* 16 bytes as 16 integers. Compilers turn the generic conversion into scalar code, hence the intrinsics. */
static inline i32v widen(const uint8_t *p) {
#if defined(__AVX512F__)
    return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    union { i32v v; __m256i half[2]; } u;
    u.half[0] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    u.half[1] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)));
    return u.v;
#else
    return __builtin_convertvector(*(const u8v *)p, i32v);
#endif
}

/* 8 bytes, twice. */
static inline i32v widen_twice(const uint8_t *p) {
    uint8_t both[16];
    memcpy(both, p, 8);
    memcpy(both + 8, p, 8);
    return widen(both);
}

/* out[at .. at + 16) in float32 or bfloat16 (nearest even; the values are finite). */
static inline void store(void *out, int dtype, int64_t at, f32v v) {
    if (dtype == F32) { *(f32v *)((float *)out + at) = v; return; }
#ifdef __AVX512F__
    __m512i b = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    b = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, odd), _mm512_set1_epi32(0x7fff)), 16);
    _mm256_storeu_si256((__m256i *)((uint16_t *)out + at), _mm512_cvtepi32_epi16(b));
#else
    for (int i = 0; i < LANES; i++) ((uint16_t *)out)[at + i] = to_bf16(v[i]);
#endif
}

static inline f32v multiply_add(f32v a, f32v b, f32v c) {
#ifdef __AVX512F__
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

static inline float sum(f32v v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

/* Levels of 16 codes; k is a compile-time constant wherever this is inlined. */
static inline __attribute__((always_inline)) f32v levels16(i32v q, int k, const struct grid *g) {
#ifdef __AVX512F__
    if (k <= 4) return (f32v)_mm512_permutexvar_ps((__m512i)q, _mm512_loadu_ps(g->levels));
    if (k == 5)
        return (f32v)_mm512_permutex2var_ps(_mm512_loadu_ps(g->levels), (__m512i)q, _mm512_loadu_ps(g->levels + 16));
#endif
    float half = (float)(1 << (k - 1));
    f32v t = (__builtin_convertvector(q, f32v) - half) * (1.0f / half);
    return t * ((1.0f - g->curve) + g->curve * (t * t));
}

/* A plane of p bits keeps cols * p / 8 bytes a row and column j * bytes + w in bits [j p, (j + 1) p) of byte w.
 * These return the fields of columns 16 j .. 16 j + 15 of a block of 64 or 128 columns. */
static inline __attribute__((always_inline)) i32v fields16(const uint8_t *row, int bits, int cols, int j) {
    const int bytes = cols * bits / 8, mask = (1 << bits) - 1;
    if (bits == 8) return widen(row + 16 * j);
    if (bytes >= 16) {
        i32v v = widen(row + 16 * j % bytes);
        int shift = 16 * j / bytes * bits;
        if (shift + bits == 8) return v >> shift;
        return (v >> shift) & mask;
    }
    const i32v shifts = {0, 0, 0, 0, 0, 0, 0, 0, bits, bits, bits, bits, bits, bits, bits, bits}; /* bytes == 8 */
    return (widen_twice(row) >> (shifts + 2 * j * bits)) & mask;
}

static inline __attribute__((always_inline)) i32v codes16(const uint8_t *low, const uint8_t *high, int k, int cols,
                                                          int j) {
    const int b = low_plane(k);
    i32v q = fields16(low, b, cols, j);
    if (k > b) q |= fields16(high, k - b, cols, j) << b;
    return q;
}

/* ---- decode ------------------------------------------------------------------------------------------------- */

static inline int field(const uint8_t *row, int64_t nbytes, int bits, int64_t col) {
    return (row[col % nbytes] >> (bits * (col / nbytes))) & ((1 << bits) - 1);
}

static inline __attribute__((always_inline)) void decode_row_even(
    const uint8_t *low, const uint8_t *high, const uint8_t *scales, uint8_t exponent, int k, int cols, int group,
    const struct grid *g, int dtype, void *out, int64_t at) {
#pragma GCC unroll 8
    for (int j = 0; j < cols / LANES; j++) {
        f32v level = levels16(codes16(low, high, k, cols, j), k, g);
        store(out, dtype, at + LANES * j, splat(scale_value(scales[LANES * j / group], exponent)) * level);
    }
}

static void decode_row_ragged(
    const uint8_t *low, const uint8_t *high, const uint8_t *scales, uint8_t exponent, int k, int group,
    int64_t cols, const struct grid *g, float *out) {
    int b = low_plane(k);
    for (int64_t c = 0; c < cols; c++) {
        int q = field(low, plane_bytes(cols, b), b, c);
        if (k > b) q |= field(high, plane_bytes(cols, k - b), k - b, c) << b;
        out[c] = scale_value(scales[c / group], exponent) * g->levels[q];
    }
}

static void decode_row_raw(int id, const uint16_t *src, int64_t cols, float *out) {
    for (int64_t c = 0; c < cols; c++) {
        if (id == RAW_BF16) {
            out[c] = as_float((uint32_t)src[c] << 16);
        } else { /* IEEE half by integer arithmetic: exact, and needs no hardware support */
            uint32_t h = src[c], sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
            if (rest >= 0x7c00u) out[c] = as_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
            else if (rest >= 0x400u) out[c] = as_float(sign | ((rest + 0x1c000u) << 13));
            else out[c] = as_float(sign | as_bits((float)rest * 0x1p-24f));
        }
    }
}

static void store_line(const float *line, int64_t cols, int dtype, void *out, int64_t at) {
    if (dtype == F32) memcpy((float *)out + at, line, (size_t)cols * sizeof(float));
    else for (int64_t c = 0; c < cols; c++) ((uint16_t *)out)[at + c] = to_bf16(line[c]);
}

/* One row of one block to out[at .. at + cols) in float32 or bfloat16. */
static void decode_row(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols, int64_t row,
                       const struct grid *grids, int dtype, void *out, int64_t at) {
    float line[COLS] = {0};
    if (id == ZERO || id == RAW_BF16 || id == RAW_FP16) {
        if (id != ZERO) decode_row_raw(id, (const uint16_t *)record + row * cols, cols, line);
        store_line(line, cols, dtype, out, at);
        return;
    }
    int k = codec_width(id), group = codec_group(id), b = low_plane(k);
    int64_t low_bytes = plane_bytes(cols, b), high_bytes = plane_bytes(cols, k - b);
    const uint8_t *low = record + row * low_bytes, *high = record + rows * low_bytes + row * high_bytes;
    const uint8_t *scales = record + rows * (low_bytes + high_bytes) + row * ceil_div(cols, group);
    const struct grid *g = grids + k;
    if (cols != COLS && cols != COLS / 2) {
        decode_row_ragged(low, high, scales, exponent, k, group, cols, g, line);
        store_line(line, cols, dtype, out, at);
        return;
    }
#define CASE(K)                                                                                           \
    case K:                                                                                               \
        if (cols == COLS) decode_row_even(low, high, scales, exponent, K, COLS, group, g, dtype, out, at); \
        else decode_row_even(low, high, scales, exponent, K, COLS / 2, group, g, dtype, out, at);          \
        return
    switch (k) { CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(8); }
#undef CASE
}

static void dequantize_strip(const struct matrix *m, int64_t strip, int64_t first, int64_t count,
                             const struct grid *grids, int dtype, void *out) {
    int64_t kblocks = ceil_div(m->cols, COLS), rows = min64(ROWS, m->rows - strip * ROWS);
    const uint8_t *record = m->arena + m->strip_offsets[strip];
    for (int64_t kb = 0; kb < kblocks; kb++) {
        const uint8_t *tag = m->tags + 2 * (strip * kblocks + kb);
        int64_t cols = min64(COLS, m->cols - kb * COLS);
        for (int64_t r = 0; r < count; r++)
            decode_row(record, tag[0], tag[1], rows, cols, first + r, grids, dtype, out, r * m->cols + kb * COLS);
        record += record_nbytes(tag[0], rows, cols);
    }
}

/* Rows [first_strip * 64, ...) of a matrix as float32 or bfloat16, row-major. */
void ciuic_dequantize(const uint8_t *arena, const uint8_t *tags, const int64_t *strip_offsets, int64_t rows,
                      int64_t cols, int64_t first_strip, int64_t last_strip, const struct grid *grids, int dtype,
                      void *out) {
    struct matrix m = {arena, tags, strip_offsets, rows, cols};
    int64_t size = dtype == F32 ? 4 : 2;
#pragma omp parallel for schedule(static)
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

/* Sums of one strip: a vector of partial sums for each row and token, added up at the end of the strip. */
typedef f32v sums[ROWS][MAX_TOKENS];

static inline void decode_scales(const uint8_t *bytes, uint8_t exponent, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = scale_value(bytes[i], exponent);
}

/* out[r][t] += block row r . x[t] for a grid block; k, cols, group and tokens are constants where inlined. */
static inline __attribute__((always_inline)) void block_product(
    const uint8_t *record, uint8_t exponent, int64_t rows, int k, int cols, int group, int tokens,
    const struct grid *g, const float *const *x, sums out) {
    const int b = low_plane(k), low_bytes = cols * b / 8, high_bytes = cols * (k - b) / 8, groups = cols / group;
    const uint8_t *low = record, *high = record + rows * low_bytes;
    float scales[ROWS * COLS / 32];
    decode_scales(high + rows * high_bytes, exponent, rows * groups, scales);
    for (int64_t r = 0; r < rows; r++, low += low_bytes, high += high_bytes) {
#pragma GCC unroll 4
        for (int n = 0; n < groups; n++) {
            f32v part[MAX_TOKENS];
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) part[t] = splat(0);
#pragma GCC unroll 4
            for (int j = n * group / LANES; j < (n + 1) * group / LANES; j++) {
                f32v level = levels16(codes16(low, high, k, cols, j), k, g);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) part[t] = multiply_add(level, load(x[t] + LANES * j), part[t]);
            }
            f32v scale = splat(scales[r * groups + n]);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) out[r][t] = multiply_add(scale, part[t], out[r][t]);
        }
    }
}

/* Any block: rows are decoded one at a time. */
static void block_product_any(const uint8_t *record, int id, uint8_t exponent, int64_t rows, int64_t cols,
                              int tokens, const struct grid *grids, const float *const *x, sums out) {
    float line[COLS] = {0};
    for (int64_t r = 0; r < rows; r++) {
        decode_row(record, id, exponent, rows, cols, r, grids, F32, line, 0);
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < COLS / LANES; j++)
                out[r][t] = multiply_add(load(line + LANES * j), load(x[t] + LANES * j), out[r][t]);
    }
}

#define FOR_TOKENS(K, C, G)                                                                                 \
    switch (tokens) {                                                                                       \
    case 1: block_product(record, exponent, rows, K, C, G, 1, g, x, out); break;                            \
    case 2: block_product(record, exponent, rows, K, C, G, 2, g, x, out); break;                            \
    case 4: block_product(record, exponent, rows, K, C, G, 4, g, x, out); break;                            \
    default: block_product(record, exponent, rows, K, C, G, 8, g, x, out);                                  \
    }
#define PRODUCTS(K)                                                                                         \
    static void products_##K(const uint8_t *record, uint8_t exponent, int64_t rows, int64_t cols, int group,\
                             int tokens, const struct grid *g, const float *const *x, sums out) {           \
        if (cols == COLS && group == 32) { FOR_TOKENS(K, COLS, 32) }                                        \
        else if (cols == COLS) { FOR_TOKENS(K, COLS, 64) }                                                  \
        else if (group == 32) { FOR_TOKENS(K, (COLS / 2), 32) }                                             \
        else { FOR_TOKENS(K, (COLS / 2), 64) }                                                              \
    }
PRODUCTS(2)
PRODUCTS(3)
PRODUCTS(4)
PRODUCTS(5)
PRODUCTS(6)
PRODUCTS(8)

/* y[y_rows[t], strip rows] = W[strip rows, :] . x[t]; x rows are padded with zeros to whole blocks. */
static void strip_product(const struct matrix *m, int64_t strip, int tokens, const struct grid *grids,
                          const float *const *x, int dtype, void *y, const int64_t *y_rows) {
    int64_t kblocks = ceil_div(m->cols, COLS), rows = min64(ROWS, m->rows - strip * ROWS);
    const uint8_t *record = m->arena + m->strip_offsets[strip];
    const float *here[MAX_TOKENS];
    sums out;
    /* The kernels exist for 1, 2, 4 and 8 tokens; in between, the last one is repeated. */
    int padded = tokens <= 2 ? tokens : tokens <= 4 ? 4 : MAX_TOKENS;
    for (int64_t r = 0; r < rows; r++)
        for (int t = 0; t < padded; t++) out[r][t] = splat(0);
    for (int64_t kb = 0; kb < kblocks; kb++) {
        const uint8_t *tag = m->tags + 2 * (strip * kblocks + kb);
        int64_t cols = min64(COLS, m->cols - kb * COLS);
        int id = tag[0], group = codec_group(id);
        uint8_t exponent = tag[1];
        for (int t = 0; t < padded; t++) here[t] = x[t < tokens ? t : tokens - 1] + kb * COLS;
        if (id == ZERO) {
        } else if ((cols == COLS || cols == COLS / 2) && id != RAW_BF16 && id != RAW_FP16) {
#define CASE(K) case K: products_##K(record, exponent, rows, cols, group, padded, grids + K, here, out); break
            switch (codec_width(id)) { CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(8); }
#undef CASE
        } else {
            block_product_any(record, id, exponent, rows, cols, tokens, grids, here, out);
        }
        record += record_nbytes(id, rows, cols);
    }
    for (int t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = y_rows[t] * m->rows + strip * ROWS + r;
            if (dtype == F32) ((float *)y)[at] = sum(out[r][t]);
            else ((uint16_t *)y)[at] = to_bf16(sum(out[r][t]));
        }
}

static float *padded_float(const void *x, int dtype, int64_t count, int64_t cols, int64_t width) {
    float *out = aligned_alloc(64, (size_t)(count * width) * sizeof(float)); /* width is a multiple of 128 */
    if (!out) return NULL;
    for (int64_t r = 0; r < count; r++) {
        const uint16_t *half = (const uint16_t *)x + r * cols;
        float *line = out + r * width;
        if (dtype == F32) memcpy(line, (const float *)x + r * cols, (size_t)cols * sizeof(float));
        else for (int64_t c = 0; c < cols; c++) line[c] = as_float((uint32_t)half[c] << 16);
        memset(line + cols, 0, (size_t)(width - cols) * sizeof(float));
    }
    return out;
}

/* Grouped products. Group i multiplies the output rows order[starts[i] .. starts[i + 1]) (at most 8) with matrix
 * experts[i]: y[r] = W[experts[i]] . x[r / fan]. x [count, cols] and y [*, rows] are float32 or bfloat16.
 * Returns 0, or 1 when there is no memory for x as float32. */
int ciuic_products(const uint8_t *arena, const uint8_t *tags, const int64_t *strip_offsets, int64_t rows,
                   int64_t cols, const struct grid *grids, const void *x, int dtype, int64_t count, int64_t fan,
                   const int64_t *order, const int64_t *starts, const int64_t *experts, int64_t groups, void *y) {
    int64_t strips = ceil_div(rows, ROWS), kblocks = ceil_div(cols, COLS), width = kblocks * COLS;
    float *padded = padded_float(x, dtype, count, cols, width);
    if (!padded) return 1;
#pragma omp parallel for schedule(static)
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

/* ---- encode ------------------------------------------------------------------------------------------------- */

static inline float load_weight(const void *src, int dtype, int64_t at) {
    if (dtype == F32) return ((const float *)src)[at];
    if (dtype == BF16) return as_float((uint32_t)((const uint16_t *)src)[at] << 16);
    float f;
    decode_row_raw(RAW_FP16, (const uint16_t *)src + at, 1, &f);
    return f;
}

/* Fixed-order sum, the same tree as tree_sum() in codecs/grid.py. */
static inline float tree_sum(float *e, int n) {
    for (int half = n / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; i++) e[i] = e[i] + e[i + half];
    return e[0];
}

/* Codes of one group at one scale, and the squared error. */
static inline float quantize_group(const float *w, int group, float scale, const struct grid *g, int32_t *codes) {
    float inverse = 1.0f / scale, errors[64];
    for (int i = 0; i < group; i++) {
        float y = w[i] * inverse;
        float place = (y + 1.0f) * 512.0f;
        int32_t bin = (int32_t)(place < 0 ? 0 : place > 1024 ? 1024 : place);
        int32_t q = g->guess[bin];
        q += y > g->thresholds[q];
        codes[i] = q;
        float d = w[i] - scale * g->levels[q];
        errors[i] = d * d;
    }
    return tree_sum(errors, group);
}

static inline void put_field(uint8_t *row, int64_t nbytes, int bits, int64_t col, int value) {
    row[col % nbytes] |= (uint8_t)(value << (bits * (col / nbytes)));
}

static void put_codes(uint8_t *low, uint8_t *high, int k, int64_t cols, int64_t first, int64_t count,
                      const int32_t *codes) {
    int b = low_plane(k);
    int64_t low_bytes = plane_bytes(cols, b), high_bytes = plane_bytes(cols, k - b);
    for (int64_t i = 0; i < count; i++) put_field(low, low_bytes, b, first + i, codes[i] & ((1 << b) - 1));
    if (k > b)
        for (int64_t i = 0; i < count; i++) put_field(high, high_bytes, k - b, first + i, codes[i] >> b);
}

/* Smallest scale index that clips nothing, and its sign, for each group of a block; returns the block exponent. */
static uint8_t anchor_block(float (*w)[COLS], int64_t rows, int64_t groups, int group, int32_t *smallest,
                            uint8_t *signs) {
    int32_t top = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < groups; n++) {
            float high = w[r][n * group], low = high;
            for (int i = 1; i < group; i++) {
                float v = w[r][n * group + i];
                high = v > high ? v : high;
                low = v < low ? v : low;
            }
            float absmax = high > -low ? high : -low;
            int32_t index = (int32_t)((as_bits(absmax) & 0x7fffffffu) + ((1u << 19) - 1)) >> 19;
            smallest[r * groups + n] = index;
            signs[r * groups + n] = high > -low ? 128 : 0;
            top = index > top ? index : top;
        }
    int32_t exponent = (top >> 4) - 7;
    return (uint8_t)(exponent < 1 ? 1 : exponent > 247 ? 247 : exponent);
}

static void encode_grid(float (*w)[COLS], int id, int64_t rows, int64_t cols, const struct grid *grids,
                        uint8_t *record, uint8_t *exponent) {
    int k = codec_width(id), group = codec_group(id), b = low_plane(k);
    const struct grid *g = grids + k;
    int64_t groups = ceil_div(cols, group), low_bytes = plane_bytes(cols, b), high_bytes = plane_bytes(cols, k - b);
    uint8_t *scales = record + rows * (low_bytes + high_bytes), signs[ROWS * COLS / 32];
    int32_t smallest[ROWS * COLS / 32], codes[2][64];
    *exponent = anchor_block(w, rows, groups, group, smallest, signs);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < groups; n++) {
            const float *v = w[r] + n * group;
            float best = 0;
            int kept = 0;
            for (int c = 0; c < g->offset_count; c++) {
                int32_t index = smallest[r * groups + n] + g->offsets[c] - 16 * *exponent;
                index = index < 0 ? 0 : index > 127 ? 127 : index;
                uint8_t byte = (uint8_t)index | signs[r * groups + n];
                float error = quantize_group(v, group, scale_value(byte, *exponent), g, codes[c ? 1 - kept : 0]);
                if (c && !(error < best)) continue;
                kept = c ? 1 - kept : 0;
                best = error;
                scales[r * groups + n] = byte;
            }
            put_codes(record + r * low_bytes, record + rows * low_bytes + r * high_bytes, k, cols, n * group,
                      min64(group, cols - n * group), codes[kept]);
        }
}

static int encode_raw(const void *src, int dtype, int id, int64_t rows, int64_t cols, int64_t stride, int64_t at,
                      uint16_t *record) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            if (id == RAW_BF16) record[r * cols + c] = to_bf16(load_weight(src, dtype, at + r * stride + c));
            else if (dtype == F16) record[r * cols + c] = ((const uint16_t *)src)[at + r * stride + c];
            else return 2;
        }
    return 0;
}

static int encode_block(const void *src, int dtype, int64_t stride, int64_t at, int64_t rows, int64_t cols,
                        const struct grid *grids, uint8_t *tag, uint8_t *record) {
    float w[ROWS][COLS];
    uint32_t largest = 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            w[r][c] = load_weight(src, dtype, at + r * stride + c);
            uint32_t magnitude = as_bits(w[r][c]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        for (int64_t c = cols; c < COLS; c++) w[r][c] = 0;
    }
    if (largest >= 0x7f800000u) return 1;
    tag[1] = 0;
    memset(record, 0, (size_t)record_nbytes(tag[0], rows, cols));
    if (tag[0] == ZERO) return 0;
    if (tag[0] == RAW_BF16 || tag[0] == RAW_FP16)
        return encode_raw(src, dtype, tag[0], rows, cols, stride, at, (uint16_t *)record);
    encode_grid(w, tag[0], rows, cols, grids, record, tag + 1);
    return 0;
}

/* Encode src [rows, cols] (row stride in elements). tags hold the codec ids and receive the exponents.
 * Returns 0, 1 when a weight is not finite, 2 when a dtype cannot be stored in a codec. */
int ciuic_encode(const void *src, int dtype, int64_t stride, int64_t rows, int64_t cols, uint8_t *tags,
                 const int64_t *strip_offsets, const struct grid *grids, uint8_t *arena) {
    int64_t kblocks = ceil_div(cols, COLS), strips = ceil_div(rows, ROWS);
    int status = 0;
#pragma omp parallel for schedule(dynamic) reduction(max : status)
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
