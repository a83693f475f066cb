/* Packed keys and values of a compressed cache as float32.
 *
 * The records are those of ciuic_hf/runtime/cache/encoding.py, whose torch code this agrees with bit for bit. Compile
 * with -ffp-contract=off. A byte of codes is looked up in a table of the values in it: 2 of four bits, 4 of two. */

#include <stdint.h>
#include <string.h>

/* Below this many values a second thread costs more than it brings. */
enum { SERIAL_VALUES = 1 << 16 };

static inline void look_up(const uint8_t *codes, const float *table, const int each, int64_t bytes, float *out) {
    for (int64_t j = 0; j < bytes; j++) memcpy(out + each * j, table + each * codes[j], sizeof(float) * each);
}

/* `count` values, a multiple of 8. `levels` is whether codes stand for levels around zero: int8, or the third bit of
 * three is a sign; else codes are numbers from 0 on, and that bit is worth 4. */
static inline void expand(const uint8_t *codes, const uint8_t *third, const float *table, int bits, int levels,
                          int64_t count, float *out) {
    if (bits == 8) {
        if (levels)
            for (int64_t j = 0; j < count; j++) out[j] = (float)(int8_t)codes[j];
        else
            for (int64_t j = 0; j < count; j++) out[j] = (float)codes[j];
        return;
    }
    if (bits == 4) {
        look_up(codes, table, 2, count / 2, out);
        return;
    }
    look_up(codes, table, 4, count / 4, out);
    if (bits != 3) return;
    for (int64_t j = 0; j < count / 8; j++)
        for (int k = 0; k < 8; k++) {
            int set = third[j] >> k & 1;
            if (levels)
                out[8 * j + k] *= (float)(1 - 2 * set);
            else
                out[8 * j + k] += (float)(4 * set);
        }
}

/* Channels: row r of codes, `tokens` of them, scales [tokens / group] as bytes and lows as float32 -> out + r * stride. */
void ciuic_cache_channels(const uint8_t *codes, const uint8_t *third, const uint8_t *scales, const float *lows,
                          const float *table, const float *scale_table, int64_t rows, int64_t tokens, int bits,
                          int group, int64_t stride, float *out) {
    int low_bits = bits == 3 ? 2 : bits;
    int64_t groups = tokens / group;
#pragma omp parallel for schedule(static) if (rows * tokens >= SERIAL_VALUES)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = r * groups + g;
            float *to = out + r * stride + g * group;
            float scale = scale_table[scales[first]], low = lows[first];
            expand(codes + first * group * low_bits / 8, third ? third + first * group / 8 : 0, table, bits, 0, group,
                   to);
            for (int j = 0; j < group; j++) to[j] = to[j] * scale + low;
        }
}

/* Tokens: `heads` runs of `tokens`, each with codes of `padded` channels and a scale for `group` of them
 * -> out + head * stride + token * width. */
void ciuic_cache_tokens(const uint8_t *codes, const uint8_t *third, const uint8_t *scales, const float *table,
                        const float *scale_table, int64_t heads, int64_t tokens, int width, int bits, int group,
                        int64_t stride, float *out) {
    int low_bits = bits == 3 ? 2 : bits, whole = width / 8 * 8, padded = (width + 7) / 8 * 8;
    int groups = (width + group - 1) / group;
#pragma omp parallel for collapse(2) schedule(static) if (heads * tokens * width >= SERIAL_VALUES)
    for (int64_t h = 0; h < heads; h++)
        for (int64_t t = 0; t < tokens; t++) {
            int64_t row = h * tokens + t;
            const uint8_t *from = codes + row * padded * low_bits / 8;
            const uint8_t *signs = third ? third + row * padded / 8 : 0;
            float *to = out + h * stride + t * width;
            expand(from, signs, table, bits, 1, whole, to);
            if (whole < width) {
                float rest[8];
                expand(from + whole * low_bits / 8, signs ? signs + whole / 8 : 0, table, bits, 1, 8, rest);
                memcpy(to + whole, rest, sizeof(float) * (width - whole));
            }
            for (int g = 0; g < groups; g++) {
                float scale = scale_table[scales[row * groups + g]];
                int stop = (g + 1) * group < width ? (g + 1) * group : width;
                for (int j = g * group; j < stop; j++) to[j] *= scale;
            }
        }
}
