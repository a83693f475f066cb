/* Rounding by inputs on a CPU: ciuic_kernels/rounding.py for the grid blocks of one column of blocks.
 *
 * A strip's weights are held column by column, so that 64 rows go through every step side by side. Within a group of
 * columns all roundings and the order of sums are those of the torch code, so codes are the same bit for bit; what is
 * passed on from group to group is summed in another order than a matrix product's. */

#include "blocks.h"

enum { SLABS = ROWS / LANES, WORD_CODES = 4 };

/* rest -= sum of upper[i] errors[i] over i in [from, to), one after another, each product rounded. */
INLINE void pass_on(const float *upper, int64_t from, int64_t to, float (*errors)[ROWS], float *rest) {
    f32v8 parts[ROWS / 8]; /* as many independent sums as hide the latency of a subtraction */
    memcpy(parts, rest, sizeof parts);
    for (int64_t i = from; i < to; i++) {
        f32v8 factor = upper[i] - (f32v8){};
#pragma GCC unroll 8
        for (int s = 0; s < ROWS / 8; s++) parts[s] -= factor * *(const f32v8 *)(errors[i] + 8 * s);
    }
    memcpy(rest, parts, sizeof parts);
}

/* Columns first .. last - 1 of a strip as codes at one scale a row. */
struct trial {
    float errors[COLS][ROWS];                  /* e, of which the row's mean square is the sum of squares */
    uint32_t codes[COLS / WORD_CODES][ROWS];   /* four columns a word, the first lowest */
    float sums[ROWS];                          /* of squared errors */
    uint8_t scales[ROWS];
};

/* Sums of squares in the order of tree_sum() in codecs/grid.py. */
INLINE void sum_squares(float (*errors)[ROWS], int64_t count, float *sums) {
    float squares[COLS][ROWS];
    int64_t size = 1;
    while (size < count) size *= 2;
    for (int64_t j = 0; j < size; j++)
        for (int r = 0; r < ROWS; r++) squares[j][r] = j < count ? errors[j][r] * errors[j][r] : 0;
    for (; size > 1; size /= 2)
        for (int64_t j = 0; j < size / 2; j++)
            for (int r = 0; r < ROWS; r++) squares[j][r] += squares[j + size / 2][r];
    memcpy(sums, squares[0], sizeof squares[0]);
}

INLINE void try_scale(float (*weights)[ROWS], int64_t first, int64_t last, const float *upper, int64_t cols,
                      uint8_t exponent, int k, const struct grid *g, struct trial *out) {
    float scales[ROWS], inverse[ROWS];
    for (int r = 0; r < ROWS; r++) scales[r] = scale_value(out->scales[r], exponent);
    for (int r = 0; r < ROWS; r++) inverse[r] = 1.0f / scales[r];
    for (int64_t j = first; j < last; j++) {
        const float *factors = upper + j * cols;
        float rest[ROWS];
        memcpy(rest, weights[j], sizeof rest);
        pass_on(factors, first, j, out->errors, rest);
        uint32_t *codes = out->codes[j / WORD_CODES];
        int place = 8 * (int)(j % WORD_CODES);
#pragma GCC unroll 4
        for (int s = 0; s < SLABS; s++) {
            f32v v = load(rest + LANES * s), y = v * load(inverse + LANES * s);
            i32v q = guess16(y, k, g);
            f32v lower = levels16(q, k, g), higher = levels16(q + 1, k, g);
            i32v up = above(y, (higher + lower) * 0.5f); /* -1 where true */
            f32v stored = blend(up, higher, lower) * load(scales + LANES * s);
            *(f32v *)(out->errors[j] + LANES * s) = (v - stored) / splat(factors[j]);
            i32v *word = (i32v *)(codes + LANES * s);
            *word = place ? *word | (q - up) << place : q - up;
        }
    }
    sum_squares(out->errors + first, last - first, out->sums);
}

/* Smallest scale index that clips nothing and whether the scale is negative, of columns first .. last - 1. */
INLINE void anchor_columns(float (*weights)[ROWS], int64_t first, int64_t last, float outermost, int32_t *index,
                           int32_t *negative) {
    float high[ROWS], low[ROWS];
    memcpy(high, weights[first], sizeof high);
    memcpy(low, weights[first], sizeof low);
    for (int64_t j = first + 1; j < last; j++)
        for (int s = 0; s < SLABS; s++) {
            f32v v = load(weights[j] + LANES * s);
            *(f32v *)(high + LANES * s) = larger(load(high + LANES * s), v);
            *(f32v *)(low + LANES * s) = smaller(load(low + LANES * s), v);
        }
    for (int r = 0; r < ROWS; r++) {
        negative[r] = high[r] > -low[r]; /* negative scales lie half a step of the mantissa higher */
        uint32_t bits = as_bits((negative[r] ? high[r] : -low[r]) / outermost) & 0x7fffffffu;
        index[r] = (int32_t)((bits + ((1u << 19) - 1) - ((uint32_t)negative[r] << 18)) >> 19);
    }
}

/* Takes the rows of a trial whose sums are smaller. */
INLINE void keep_better(struct trial *best, const struct trial *trial, int64_t first, int64_t last) {
    int32_t better[ROWS];
    for (int r = 0; r < ROWS; r++) better[r] = -(trial->sums[r] < best->sums[r]);
    for (int r = 0; r < ROWS; r++) best->sums[r] = better[r] ? trial->sums[r] : best->sums[r];
    for (int r = 0; r < ROWS; r++) best->scales[r] = better[r] ? trial->scales[r] : best->scales[r];
    for (int s = 0; s < SLABS; s++) {
        i32v mask = *(const i32v *)(better + LANES * s);
        for (int64_t j = first; j < last; j++) {
            f32v *kept = (f32v *)(best->errors[j] + LANES * s);
            *kept = blend(mask, load(trial->errors[j] + LANES * s), *kept);
        }
        for (int64_t j = first / WORD_CODES; j < ceil_div(last, WORD_CODES); j++) {
            i32v *kept = (i32v *)(best->codes[j] + LANES * s);
            *kept = blend_bits(mask, *(const i32v *)(trial->codes[j] + LANES * s), *kept);
        }
    }
}

INLINE void round_group(float (*weights)[ROWS], int64_t first, int64_t last, const float *upper, int64_t cols,
                        uint8_t exponent, int k, const struct grid *g, struct trial *best) {
    int32_t index[ROWS], negative[ROWS];
    struct trial trial;
    for (int64_t j = first; j < last; j++) pass_on(upper + j * cols, 0, first, best->errors, weights[j]);
    anchor_columns(weights, first, last, 1.0f + g->linear, index, negative);
    for (int c = 0; c < g->offset_count; c++) {
        struct trial *out = c ? &trial : best;
        for (int r = 0; r < ROWS; r++) {
            int32_t step = index[r] + g->offsets[c] - 16 * exponent;
            out->scales[r] = (uint8_t)((step < 0 ? 0 : step > 127 ? 127 : step) << 1 | negative[r]);
        }
        try_scale(weights, first, last, upper, cols, exponent, k, g, out);
        if (c) keep_better(best, &trial, first, last);
    }
}

/* One block: its record and exponent are written, and its weights [rows, cols] become e. */
INLINE void round_block(float *block, int64_t stride, int64_t rows, int64_t cols, const float *upper, int k,
                        int64_t group, int headroom, const struct grid *g, uint8_t *record, uint8_t *exponent) {
    const int b = low_plane(k);
    int64_t groups = ceil_div(cols, group);
    uint8_t *high = record + rows * plane_bytes(cols, b), *scales = high + rows * plane_bytes(cols, k - b);
    uint8_t codes[ROWS][COLS + TILE_WORDS] = {{0}};
    float weights[COLS][ROWS] = {{0}};
    int32_t index[ROWS], negative[ROWS], top = 0;
    struct trial best;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < cols; j++) weights[j][r] = block[r * stride + j];
    for (int64_t first = 0; first < cols; first += group) {
        anchor_columns(weights, first, min64(first + group, cols), 1.0f + g->linear, index, negative);
        for (int r = 0; r < ROWS; r++) top = index[r] > top ? index[r] : top;
    }
    *exponent = exponent_of(top + headroom);
    for (int64_t n = 0; n < groups; n++) {
        int64_t first = n * group, last = min64(first + group, cols);
        round_group(weights, first, last, upper, cols, *exponent, k, g, &best);
        for (int64_t r = 0; r < rows; r++) {
            scales[r * groups + n] = best.scales[r];
            for (int64_t j = first; j < last; j++)
                codes[r][j] = (uint8_t)(best.codes[j / WORD_CODES][r] >> 8 * (j % WORD_CODES));
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        pack_row(codes[r], rows, cols, r, b, 0, record);
        if (k > b) pack_row(codes[r], rows, cols, r, k - b, b, high);
        for (int64_t j = 0; j < cols; j++) block[r * stride + j] = best.errors[j][r];
    }
}

/* One function for each width, with it as a constant. */
#define ROUND(K)                                                                                             \
    static void round_##K(float *block, int64_t stride, int64_t rows, int64_t cols, const float *upper,      \
                          int64_t group, int headroom, const struct grid *g, uint8_t *record,                \
                          uint8_t *exponent) {                                                               \
        round_block(block, stride, rows, cols, upper, K, group, headroom, g, record, exponent);              \
    }
FOR_WIDTHS(ROUND)

/* The grid blocks of one column of blocks, panel float32 [rows, cols] (row stride in elements); others are left alone.
 * tags: of the first block, the next strip's `tag_stride` bytes on; starts [strips]: where records begin in the arena.
 * upper [cols, cols]: the feedback between these columns, transposed. */
void ciuic_round_grids(float *panel, int64_t stride, int64_t rows, int64_t cols, const float *upper, uint8_t *tags,
                       int64_t tag_stride, const int64_t *starts, int headroom, const struct grid *grids,
                       uint8_t *arena) {
#pragma omp parallel for schedule(dynamic) if (rows * cols > SERIAL_WEIGHTS / 16)
    for (int64_t s = 0; s < ceil_div(rows, ROWS); s++) {
        uint8_t *tag = tags + s * tag_stride, *record = arena + starts[s];
        float *block = panel + s * ROWS * stride;
        int64_t height = min64(ROWS, rows - s * ROWS), group = codec_group(tag[0]);
        int k = codec_width(tag[0]);
        const struct grid *g = grids + k;
        if (tag[0] <= RAW_FP16 || tag[0] >= SPARSE) continue;
        memset(record + record_nbytes(tag[0], height, cols) - ALIGN, 0, ALIGN); /* the padding */
#define CASE(K) case K: round_##K(block, stride, height, cols, upper, group, headroom, g, record, tag + 1); break;
        switch (k) { FOR_WIDTHS(CASE) }
#undef CASE
    }
}
