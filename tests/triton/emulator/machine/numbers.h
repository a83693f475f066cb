/* Floating point as PTX defines it: 16-bit formats, and fused multiply-adds that round once. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;
typedef double f64;

static inline u32 bits_of(f32 x) { u32 b; memcpy(&b, &x, 4); return b; }
static inline f32 float_of(u32 b) { f32 x; memcpy(&x, &b, 4); return x; }

static inline f32 from_bf16(u32 half) { return float_of(half << 16); }

static inline u32 to_bf16(f32 x)
{
    u32 b = bits_of(x);
    if (x != x) return 0x7FFF;
    return (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
}

static inline f32 from_f16(u32 half)
{
    u16 b = (u16)half;
    _Float16 x;
    memcpy(&x, &b, 2);
    return (f32)x;
}

static inline u32 f16_bits(_Float16 x)
{
    u16 b;
    if (x != x) return 0x7FFF;
    memcpy(&b, &x, 2);
    return b;
}

static inline u32 to_f16(f32 x) { return f16_bits((_Float16)x); }

/* a b + c rounded to odd in float64: rounding that to fewer than 52 bits rounds the exact value once
   (Boldo and Melquiond 2008). The product must be exact in float64, which those of 16-bit floats are. */
static inline f64 fma_to_odd(f64 a, f64 b, f64 c)
{
    f64 product = a * b, sum = product + c, back = sum - product;
    f64 lost = (product - (sum - back)) + (c - back);
    u64 bits;
    memcpy(&bits, &sum, 8);
    if (lost != 0 && !(bits & 1) && isfinite(sum)) sum = nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
    return sum;
}

static inline u32 fma_bf16(u32 a, u32 b, u32 c)
{
    f64 exact = fma_to_odd(from_bf16(a), from_bf16(b), from_bf16(c));
    f32 near = (f32)exact;
    if (near != exact && !(bits_of(near) & 1) && isfinite(near))
        near = nextafterf(near, exact > near ? INFINITY : -INFINITY);
    return to_bf16(near);
}

static inline u32 fma_f16(u32 a, u32 b, u32 c)
{
    return f16_bits((_Float16)fma_to_odd(from_f16(a), from_f16(b), from_f16(c)));
}

static inline u32 lop3(u32 a, u32 b, u32 c, u32 table)
{
    u32 result = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

static inline u32 prmt(u32 a, u32 b, u32 selector)
{
    u64 pool = (u64)b << 32 | a;
    u32 result = 0;
    for (int place = 0; place < 4; place++) {
        u32 pick = selector >> (4 * place) & 15, byte = (u32)(pool >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * place);
    }
    return result;
}

static inline u32 bfe_u32(u32 a, u32 at, u32 length)
{
    at &= 255, length &= 255;
    if (at > 31 || length == 0) return 0;
    return (u32)((u64)a >> at & (length >= 32 ? 0xFFFFFFFFull : (1ull << length) - 1));
}

static inline u32 bfe_s32(u32 a, u32 at, u32 length)
{
    at &= 255, length &= 255;
    if (length == 0) return 0;
    u32 top = at + length - 1 > 31 ? 31 : at + length - 1, sign = a >> top & 1, field = bfe_u32(a, at, length);
    u32 have = at > 31 ? 0 : (length > 32 - at ? 32 - at : length);
    return have >= 32 ? field : field | (sign ? ~0u << have : 0);
}

static inline u32 bfi(u32 a, u32 b, u32 at, u32 length)
{
    at &= 255, length &= 255;
    if (at > 31 || length == 0) return b;
    u32 mask = (u32)((length >= 32 ? 0xFFFFFFFFull : (1ull << length) - 1) << at);
    return (b & ~mask) | (a << at & mask);
}

static inline u32 shift_left(u32 a, u32 n) { return n > 31 ? 0 : a << n; }
static inline u32 shift_right(u32 a, u32 n) { return n > 31 ? 0 : a >> n; }
static inline u32 shift_signed(u32 a, u32 n) { return (u32)((i32)a >> (n > 31 ? 31 : n)); }
static inline u64 shift_left64(u64 a, u32 n) { return n > 63 ? 0 : a << n; }
static inline u64 shift_right64(u64 a, u32 n) { return n > 63 ? 0 : a >> n; }
static inline u64 shift_signed64(u64 a, u32 n) { return (u64)((i64)a >> (n > 63 ? 63 : n)); }

/* The number where one operand is NaN. */
static inline f32 fmax_number(f32 a, f32 b) { return a != a ? b : b != b ? a : a > b ? a : b > a ? b : signbit(a) ? b : a; }
static inline f32 fmin_number(f32 a, f32 b) { return a != a ? b : b != b ? a : a < b ? a : b < a ? b : signbit(a) ? a : b; }
static inline f32 flush(f32 x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }

static inline i64 float_to_integer(f32 x, i64 low, i64 high)
{
    if (x != x) return 0;
    if ((f64)x <= (f64)low) return low;
    if ((f64)x >= (f64)high) return high;
    return (i64)x;
}
