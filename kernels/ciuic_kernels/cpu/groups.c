/* Groups of 2, 4 or 8 bit codes with stochastic rounding, for tensors that live for one step.
 *
 * The layout is that of ciuic_hf/runtime/stochastic.py, whose torch code this agrees with: bit for bit where rounding
 * is to the nearest, in distribution where it is stochastic. Compile with -ffp-contract=off.
 * The loops are written so that a compiler vectorises them; a group is a multiple of LANES. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, MAX_GROUP = 256 };
/* Below this many values a second thread costs more than it brings. */
enum { SERIAL_VALUES = 1 << 16 };
enum { F32 = 0, BF16 = 1 };

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The smallest bfloat16 that is not below f, as its bits. */
static inline uint16_t bf16_up(float f) {
    uint32_t b = as_bits(f);
    return (uint16_t)((b >> 31 ? b : b + 0xffff) >> 16);
}

static inline uint16_t bf16_nearest(float f) {
    uint32_t b = as_bits(f);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

/* splitmix64 (Steele, Lea, Flood 2014): a key for each group. */
static inline uint32_t key_of(uint64_t seed, uint64_t group) {
    uint64_t z = seed + (group + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

/* Uniform in [0, 1), 24 bits; an integer hash of two multiplications (the "lowbias32" of hash-prospector). */
static inline float uniform(uint32_t x) {
    x ^= x >> 16; x *= 0x7feb352du;
    x ^= x >> 15; x *= 0x846ca68bu;
    x ^= x >> 16;
    return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

/* The values of one group; the last one again where the tensor has ended. */
static void load(const void *source, int dtype, int64_t first, int64_t numel, int group, float *values) {
    int count = (int)min64(group, numel - first);
    if (dtype == F32) {
        memcpy(values, (const float *)source + first, sizeof(float) * count);
    } else {
        const uint16_t *halves = (const uint16_t *)source + first;
        for (int j = 0; j < count; j++) values[j] = as_float((uint32_t)halves[j] << 16);
    }
    for (int j = count; j < group; j++) values[j] = values[count - 1];
}

/* Smallest and largest value, and the bits of the largest magnitude, in which NaN and infinity come last. */
static uint32_t range(const float *values, int group, float *smallest, float *largest) {
    float low[LANES], high[LANES];
    uint32_t magnitude[LANES];
    for (int l = 0; l < LANES; l++) low[l] = high[l] = values[l], magnitude[l] = 0;
    for (int j = 0; j < group; j += LANES)
        for (int l = 0; l < LANES; l++) {
            float v = values[j + l];
            uint32_t m = as_bits(v) & 0x7fffffff;
            low[l] = v < low[l] ? v : low[l];
            high[l] = v > high[l] ? v : high[l];
            magnitude[l] = m > magnitude[l] ? m : magnitude[l];
        }
    uint32_t all = 0;
    *smallest = low[0], *largest = high[0];
    for (int l = 0; l < LANES; l++) {
        *smallest = low[l] < *smallest ? low[l] : *smallest;
        *largest = high[l] > *largest ? high[l] : *largest;
        all = magnitude[l] > all ? magnitude[l] : all;
    }
    return all;
}

static void join(const uint8_t *whole, int group, int bits, uint8_t *codes) {
    int each = 8 / bits, width = group / each;
    memcpy(codes, whole, width);
    for (int part = 1; part < each; part++)
        for (int j = 0; j < width; j++) codes[j] |= (uint8_t)(whole[part * width + j] << (bits * part));
}

/* Packs numel values of dtype. `per_interval` is the slack over the number of intervals of the grid, `middle` the code
 * of zero in signed groups (low is NULL in others). Returns 1 if a magnitude is beyond `limit`, NaN or infinite. */
int ciuic_groups_pack(const void *source, int dtype, int64_t numel, int bits, int group, float per_interval,
                      float middle, float limit, float smallest_step, int stochastic, uint64_t seed, uint8_t *codes,
                      uint16_t *steps, uint16_t *lows) {
    int64_t groups = (numel + group - 1) / group;
    int64_t group_nbytes = (int64_t)group * bits / 8;
    int beyond = 0;
#pragma omp parallel for schedule(static) reduction(|: beyond) if (numel >= SERIAL_VALUES)
    for (int64_t g = 0; g < groups; g++) {
        float values[MAX_GROUP], smallest, largest;
        uint8_t whole[MAX_GROUP];
        load(source, dtype, g * group, numel, group, values);
        uint32_t magnitude = range(values, group, &smallest, &largest);
        beyond |= magnitude > as_bits(limit);
        if (magnitude >= 0x7f800000) { /* decodes to NaN */
            memset(codes + g * group_nbytes, 0, group_nbytes);
            steps[g] = 0x7fc0;
            if (lows) lows[g] = 0;
            continue;
        }
        float base = 0, span = as_float(magnitude);
        if (lows) {
            lows[g] = bf16_up(-smallest) ^ 0x8000;
            base = as_float((uint32_t)lows[g] << 16);
            span = largest - base;
        }
        float step = span * per_interval;
        if (span > 0) step = step < smallest_step ? smallest_step : step;
        steps[g] = bf16_up(step);
        step = as_float((uint32_t)steps[g] << 16);
        float inverse = step > 0 ? 1.0f / step : 0.0f;
        if (stochastic) {
            uint32_t key = key_of(seed, (uint64_t)g);
            for (int j = 0; j < group; j++) {
                float dither = uniform(key + (uint32_t)j * 0x9e3779b9u);
                whole[j] = (uint8_t)(int32_t)((values[j] - base) * inverse + middle + dither);
            }
        } else {
            for (int j = 0; j < group; j++)
                whole[j] = (uint8_t)(int32_t)((values[j] - base) * inverse + (middle + 0.5f));
        }
        join(whole, group, bits, codes + g * group_nbytes);
    }
    return beyond;
}

/* The numel values back, in dtype; with `dithered`, less the dither that `seed` gave in packing. */
void ciuic_groups_unpack(const uint8_t *codes, const uint16_t *steps, const uint16_t *lows, int64_t numel, int bits,
                         int group, float middle, int dithered, uint64_t seed, int dtype, void *out) {
    int64_t groups = (numel + group - 1) / group;
    int each = 8 / bits, width = group / each, mask = (1 << bits) - 1;
#pragma omp parallel for schedule(static) if (numel >= SERIAL_VALUES)
    for (int64_t g = 0; g < groups; g++) {
        float values[MAX_GROUP];
        const uint8_t *from = codes + g * width;
        float step = as_float((uint32_t)steps[g] << 16);
        float low = lows ? as_float((uint32_t)lows[g] << 16) : 0.0f;
        for (int part = 0; part < each; part++)
            for (int j = 0; j < width; j++)
                values[part * width + j] = ((float)((from[j] >> (bits * part)) & mask) - middle) * step + low;
        if (dithered && low < 0 && low + (float)mask * step > 0) {
            uint32_t key = key_of(seed, (uint64_t)g);
            for (int j = 0; j < group; j++) values[j] += (0.5f - uniform(key + (uint32_t)j * 0x9e3779b9u)) * step;
        }
        int count = (int)min64(group, numel - g * group);
        if (dtype == F32) {
            memcpy((float *)out + g * group, values, sizeof(float) * count);
        } else {
            uint16_t *halves = (uint16_t *)out + g * group;
            for (int j = 0; j < count; j++) halves[j] = bf16_nearest(values[j]);
        }
    }
}
