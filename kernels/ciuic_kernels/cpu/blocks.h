/* What the C files share of the block format: vectors, record sizes, codes, levels and scales of the grid family.
 *
 * The format is specified in codecs/ and docs/checkpoint-format.md; every table of it is handed in from
 * codecs/grid.py (struct grid), so nothing is listed twice.
 *
 * Plain C11 with GCC/clang vector extensions. Intrinsics stand only where those have no word for an instruction
 * (lookup, multiply-add, clamp, narrowing), each with a portable version beside it that rounds the same. */

#ifndef CIUIC_BLOCKS_H
#define CIUIC_BLOCKS_H

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

enum { ROWS = 64, COLS = 128, LANES = 16, MAX_TOKENS = 16, ALIGN = 16, TILE_WORDS = 8 };
/* Below this many weights a second thread costs more than it brings. */
enum { SERIAL_WEIGHTS = 1 << 16 };
enum { F32 = 0, BF16 = 1, F16 = 2 };
/* Tags. From SPARSE on: 20 capacities of each width, see codecs/sparse.py. Those between are grids. */
enum { ZERO = 0, RAW_BF16 = 1, RAW_FP16 = 2, SPARSE = 128, CAPACITIES = 20 };

typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef float f32v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f32v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t i32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16v8 __attribute__((vector_size(16)));
typedef uint16_t u16v __attribute__((vector_size(32)));
typedef uint8_t u8v8 __attribute__((vector_size(8)));

/* One width of the grid family; filled by native.py from codecs/grid.py. */
struct grid {
    float levels[256];  /* value of each code at scale 1, repeated to the end, so that bits above a code do no harm */
    float inverse[8];   /* odd polynomial y -> code + 1/2, see guess16(); k terms */
    float first, last;  /* the outermost thresholds */
    float linear;       /* weight of the linear term against the cubic */
    int32_t offsets[8]; /* scale candidates */
    int32_t offset_count;
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
    return as_float(((uint32_t)exponent << 23) + ((uint32_t)byte << 18) + ((uint32_t)byte << 31));
}

static inline int codec_width(int id) {
    int i = (id - SPARSE) / CAPACITIES;
    return id < SPARSE ? id & 31 : i == 5 ? 8 : i + 2;
}

static inline int codec_group(int id) { return id & 96; }

/* Every width, as a constant. */
#define FOR_WIDTHS(CASE) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(8)

static inline int low_plane(int k) { return k < 4 ? 2 : 4; }

static inline int64_t plane_bytes(int64_t cols, int bits) { return 2 * ceil_div(cols * bits, 16); } /* of one row */

/* A sparse record: how many weights it can store, and where its parts begin behind the bitmap. */
struct sparse {
    int64_t slots, scales, low, high, end;
};

static struct sparse sparse_of(int id, int64_t rows, int64_t cols) {
    int k = codec_width(id), b = low_plane(k), capacity = (id - SPARSE) % CAPACITIES + 1;
    int64_t slots = ceil_div(rows * cols * capacity, 32), scales = rows * ceil_div(cols, 8), low = scales + rows;
    int64_t high = low + ceil_div(slots * b, 8);
    return (struct sparse){slots, scales, low, high, high + ceil_div(slots * (k - b), 8)};
}

static int64_t record_nbytes(int id, int64_t rows, int64_t cols) {
    int64_t n;
    if (id == ZERO) return 0;
    if (id == RAW_BF16 || id == RAW_FP16) {
        n = 2 * rows * cols;
    } else if (id >= SPARSE) {
        n = sparse_of(id, rows, cols).end;
    } else {
        int k = codec_width(id), low = low_plane(k);
        n = rows * (plane_bytes(cols, low) + plane_bytes(cols, k - low) + ceil_div(cols, codec_group(id)));
    }
    return ceil_div(n, ALIGN) * ALIGN;
}

/* ---- vectors ------------------------------------------------------------------------------------------------ */

#define INLINE static inline __attribute__((always_inline)) /* constant arguments must reach the loops inside */

INLINE f32v load(const float *p) { return *(const f32v *)p; }
INLINE f32v splat(float f) { return f - (f32v){}; } /* + would cost an addition: -0 + 0 is 0 */

/* Bits of a where mask is set, of b elsewhere. */
INLINE i32v blend_bits(i32v mask, i32v a, i32v b) {
#ifdef __AVX512F__
    return (i32v)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)mask, (__m512i)b, 0xE2);
#else
    return (a & mask) | (b & ~mask);
#endif
}

INLINE f32v blend(i32v mask, f32v a, f32v b) { return (f32v)blend_bits(mask, (i32v)a, (i32v)b); }

/* -1 where a > b. GCC compares vectors that are wider than the machine's one lane at a time. */
INLINE i32v above(f32v a, f32v b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    union { f32v v; __m256 half[2]; } x = {a}, y = {b};
    union { i32v v; __m256 half[2]; } mask;
    for (int i = 0; i < 2; i++) mask.half[i] = _mm256_cmp_ps(x.half[i], y.half[i], _CMP_GT_OQ);
    return mask.v;
#else
    return a > b;
#endif
}

INLINE f32v larger(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    union { f32v v; __m256 half[2]; } x = {a}, y = {b};
    for (int i = 0; i < 2; i++) x.half[i] = _mm256_max_ps(x.half[i], y.half[i]);
    return x.v;
#else
    return blend(a > b, a, b);
#endif
}

INLINE f32v smaller(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    union { f32v v; __m256 half[2]; } x = {a}, y = {b};
    for (int i = 0; i < 2; i++) x.half[i] = _mm256_min_ps(x.half[i], y.half[i]);
    return x.v;
#else
    return blend(a < b, a, b);
#endif
}

/* Compilers turn generic conversions into scalar code, hence the intrinsics. */

/* 8 words of 16 bits, twice. */
INLINE i32v words_twice(const uint8_t *p) {
#if defined(__AVX512BW__)
#define WORD(w) (int32_t)(0x80800000u | (2 * (w) + 1) << 8 | 2 * (w)) /* its two bytes, then two zeros */
    const i32v places = {WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5), WORD(6), WORD(7),
                         WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5), WORD(6), WORD(7)};
#undef WORD
    return (i32v)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)), (__m512i)places);
#elif defined(__AVX2__)
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    union { __m256i half[2]; i32v v; } u = {{words, words}};
    return u.v;
#else
    uint16_t w[8];
    memcpy(w, p, 16);
    return (i32v){w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]};
#endif
}

/* 16 words of 16 bits. */
INLINE i32v widen(u16v8 low, u16v8 high) {
#if defined(__AVX512F__)
    return (i32v)_mm512_cvtepu16_epi32(_mm256_set_m128i((__m128i)high, (__m128i)low));
#elif defined(__AVX2__)
    union { __m256i half[2]; i32v v; } u = {{_mm256_cvtepu16_epi32((__m128i)low), _mm256_cvtepu16_epi32((__m128i)high)}};
    return u.v;
#else
    union { struct { u16v8 low, high; } words; u16v wide; } u = {{low, high}};
    return __builtin_convertvector(u.wide, i32v);
#endif
}

/* 4 words of 16 bits, four times. */
INLINE i32v words_four_times(const uint8_t *p) {
    uint8_t twice[16];
    memcpy(twice, p, 8);
    memcpy(twice + 8, p, 8);
    return words_twice(twice);
}

/* The low bytes of 16 integers. */
INLINE void store_bytes(uint8_t *out, i32v v) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    union { i32v v; __m128i quarter[4]; } x = {v & 255};
    __m128i low = _mm_packus_epi32(x.quarter[0], x.quarter[1]), high = _mm_packus_epi32(x.quarter[2], x.quarter[3]);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(low, high));
#else
    for (int i = 0; i < LANES; i++) out[i] = (uint8_t)v[i];
#endif
}

/* out[at .. at + 16) in float32 or bfloat16 (nearest even; the values are finite). */
INLINE void store(void *out, int dtype, int64_t at, f32v v) {
    if (dtype == F32) { *(f32v *)((float *)out + at) = v; return; }
#ifdef __AVX512F__
    i32v b = (i32v)v;
    b = (b + (((b >> 16) & 1) + 0x7fff)) >> 16;
    _mm256_storeu_si256((__m256i *)((uint16_t *)out + at), _mm512_cvtepi32_epi16((__m512i)b));
#else
    for (int i = 0; i < LANES; i++) ((uint16_t *)out)[at + i] = to_bf16(v[i]);
#endif
}

/* Integers by truncation. */
INLINE i32v truncated(f32v v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    union { f32v v; __m256 half[2]; } x = {v};
    union { i32v v; __m256i half[2]; } out;
    for (int i = 0; i < 2; i++) out.half[i] = _mm256_cvttps_epi32(x.half[i]);
    return out.v;
#else
    return __builtin_convertvector(v, i32v);
#endif
}

/* a * b + c, rounded once or twice: for values of the format only where the product is exact. */
INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union { f32v v; __m256 half[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.v;
#else
    return a * b + c;
#endif
}

/* The last steps of tree_sum() in codecs/grid.py: lane i takes lane i + 8, then i + 4, i + 2, i + 1. */
INLINE float sum(f32v v) {
    union { f32v whole; f32v8 half[2]; } a = {v};
    union { f32v8 whole; f32v4 half[2]; } b = {a.half[0] + a.half[1]};
    f32v4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

INLINE float maximum(f32v v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
    union { f32v v; __m256 half[2]; } x = {v};
    __m256 a = _mm256_max_ps(x.half[0], x.half[1]);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

/* The formula of codecs/grid.py, which is exact up to here, so that the multiply-add changes no bit. A code in the low
 * bits of 2^(24-k) adds q / 2^(k-1) to it. */
INLINE f32v formula16(i32v q, int k, const struct grid *g) {
    f32v t = (f32v)(q | (151 - k) << 23) - (1.0f + (float)(1 << (24 - k)));
    return t * multiply_add(t, t, splat(g->linear));
}

/* Levels of 16 codes. Bits above the codes are ignored, so that codes16() need not clear them. */
INLINE f32v levels16(i32v q, int k, const struct grid *g) {
#ifdef __AVX512F__
#define TABLE(i) _mm512_loadu_ps(g->levels + 16 * (i))
    if (k <= 4) return (f32v)_mm512_permutexvar_ps((__m512i)q, TABLE(0));
    if (k == 5) return (f32v)_mm512_permutex2var_ps(TABLE(0), (__m512i)q, TABLE(1));
    if (k == 6)
        return (f32v)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)q, _mm512_set1_epi32(32)),
                                          _mm512_permutex2var_ps(TABLE(0), (__m512i)q, TABLE(1)),
                                          _mm512_permutex2var_ps(TABLE(2), (__m512i)q, TABLE(3)));
#undef TABLE
#endif
    if (k < 8) q &= (1 << k) - 1; /* bytes have nothing above them */
    return formula16(q, k, g);
}

/* Codes of columns 16 i .. 16 i + 15 in a plane of a block of 64 or 128 columns, starting at bit ``to``, with whatever
 * their words hold around them. ``row`` is the row in the first tile, ``tile`` the bytes from tile to tile. In a tile
 * of 8 words a row they are two neighbouring codes of each word, which are 4 bits apart. */
INLINE i32v fields16(const uint8_t *row, int64_t tile, int bits, int cols, int i, int to) {
    if (cols * bits == COLS / 2) { /* 4 words a row: four codes of each */
        const i32v shifts = {12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0};
        return (words_four_times(row) << shifts) >> (12 + i - to);
    }
    const int first = i * bits % 8 / bits * 2, from = 4 * (first % 4) + bits * (first / 4);
    i32v v = words_twice(row + i * bits / 8 * tile);
    if (to == 0) return v >> (i32v){0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4} >> from;
    return v << (i32v){4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0} >> (from + 4 - to);
}

/* Where the parts of a row of a grid record lie, in the first tile of each plane, and the bytes from tile to tile. */
struct row {
    const uint8_t *low, *high, *scales;
    int64_t tile;
};

/* Codes of 16 columns in two planes of 4 bits, with nothing above them. Joined as words, bytes of which are codes. */
INLINE i32v bytes16(struct row row, int i) {
    const uint16_t nibbles = 0x0f0f;
    u16v8 low, high;
    memcpy(&low, row.low + i / 2 * row.tile, sizeof low);
    memcpy(&high, row.high + i / 2 * row.tile, sizeof high);
    i32v pairs = widen((low & nibbles) | ((high << 4) & (uint16_t)~nibbles), ((low >> 4) & nibbles) | (high & (uint16_t)~nibbles));
    if (i % 2) return pairs >> 8;
    return pairs & 255;
}

/* Codes of 16 columns; bits above the k-th are not cleared. */
INLINE i32v codes16(struct row row, int k, int cols, int i) {
    const int b = low_plane(k);
    if (k == 8) return bytes16(row, i);
    i32v q = fields16(row.low, row.tile, b, cols, i, 0);
    if (k == b) return q;
    return blend_bits((i32v){} + ((1 << b) - 1), q, fields16(row.high, row.tile, k - b, cols, i, b));
}

/* ---- choosing codes ----------------------------------------------------------------------------------------- */

/* The code of y, or one less; never the last code. A polynomial takes thresholds to the middle between two codes,
 * so it can be off by almost half a code before this is wrong (native.py checks how far it is). */
INLINE i32v guess16(f32v y, int k, const struct grid *g) {
    y = smaller(larger(y, splat(g->first)), splat(g->last));
    f32v square = y * y, p = splat(g->inverse[k - 1]);
#pragma GCC unroll 8
    for (int i = k - 2; i >= 0; i--) p = multiply_add(p, square, splat(g->inverse[i]));
    return truncated(multiply_add(p, y, splat((float)(1 << (k - 1)))));
}

/* The exponent byte of a block by its largest scale index. */
static inline uint8_t exponent_of(int32_t top) {
    int32_t exponent = (top >> 4) - 7;
    return (uint8_t)(exponent < 1 ? 1 : exponent > 244 ? 244 : exponent);
}

/* Bits [shift, shift + bits) of the codes of row r into a plane. Codes past the last column are zero, 8 of them past
 * the last that a block can have; the words of a tile that do not exist are not stored. */
INLINE void pack_row(const uint8_t *codes, int64_t rows, int64_t cols, int64_t r, int bits, int shift, uint8_t *plane) {
    int64_t left = plane_bytes(cols, bits) / 2; /* words */
    for (; left > 0; left -= TILE_WORDS, plane += 2 * TILE_WORDS * rows) {
        int64_t words = min64(TILE_WORDS, left);
        u16v8 packed = {0};
#pragma GCC unroll 16
        for (int j = 0; j < 16 / bits; j++, codes += words) {
            u8v8 of_words;
            memcpy(&of_words, codes, 8);
            u16v8 fields = (__builtin_convertvector(of_words, u16v8) >> shift) & (uint16_t)((1 << bits) - 1);
            packed |= fields << (4 * (j % 4) + bits * (j / 4));
        }
        memcpy(plane + 2 * words * r, &packed, (size_t)(2 * words));
    }
}

#endif
