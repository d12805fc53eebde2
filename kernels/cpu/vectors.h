// Noise and functions on vectors, for one instruction set: fused.cpp includes this file and those after it once for
// each, with LANES and `isa` defined.
//
// A vector holds LANES floats. Philox works on 64-bit lanes, half as many, because a product of 32-bit words fills one.
//
// What is computed of a vector is a long chain of steps, each of which waits for the one before. So several vectors go
// side by side, step by step: EACH does a step for `N` of them. docs/cpu.md says what that saves.

namespace {
namespace isa {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Wides __attribute__((vector_size(4 * LANES)));

constexpr int GROUP = 4 * LANES;     // columns that one step draws: LANES quads
constexpr int STRETCH = 16 * GROUP;  // that are passed over in one go, 64 to a lane: few enough for sums of floats

INLINE Floats fill(float value) { return Floats{} + value; }

INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

// The low halves of 64-bit lanes times a 32-bit number.
INLINE Wides multiply_wide(Wides words, uint32_t factor) {
#if LANES == 16
    return (Wides)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi32((int)factor));
#elif LANES == 8
    return (Wides)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi32((int)factor));
#elif defined(__x86_64__)
    return (Wides)_mm_mul_epu32((__m128i)words, _mm_set1_epi32((int)factor));
#elif defined(__aarch64__)
    return (Wides)vmull_n_u32(vmovn_u64((uint64x2_t)words), factor);
#else
    return (words & 0xffffffff) * factor;
#endif
}

INLINE Floats square_root(Floats x) {
#if LANES == 16
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (Floats)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// a > b ? a : b, so b where either is a NaN.
INLINE Floats maximum(Floats a, Floats b) {
#if LANES == 16
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

// x 2^n of the integer n, given as n + ROUND_TO_INTEGER.
INLINE Floats times_power_of_two(Floats x, Floats shifted) {
#if LANES == 16
    return (Floats)_mm512_scalef_ps((__m512)x, (__m512)(shifted - ROUND_TO_INTEGER));
#else
    return x * (Floats)(((Ints)shifted + 127) << 23);
#endif
}

// The low halves of the lanes of both in turn.
INLINE Words low_halves(Wides even, Wides odd) {
#if LANES == 16
    return (Words)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif LANES == 8
    return (Words)_mm256_blend_epi32((__m256i)even, _mm256_shuffle_epi32((__m256i)odd, _MM_SHUFFLE(2, 2, 0, 0)), 0xaa);
#else
    return (Words)(even & 0xffffffff) | (Words)(odd << 32);
#endif
}

// Four vectors seen as LANES / 4 blocks of 4 x 4: each block is transposed in its place.
INLINE void transpose_blocks(Floats& a, Floats& b, Floats& c, Floats& d) {
#if LANES == 16
#define UNPACK_LOW(x, y) (Floats) _mm512_unpacklo_ps((__m512)(x), (__m512)(y))
#define UNPACK_HIGH(x, y) (Floats) _mm512_unpackhi_ps((__m512)(x), (__m512)(y))
#elif LANES == 8
#define UNPACK_LOW(x, y) (Floats) _mm256_unpacklo_ps((__m256)(x), (__m256)(y))
#define UNPACK_HIGH(x, y) (Floats) _mm256_unpackhi_ps((__m256)(x), (__m256)(y))
#elif defined(__x86_64__)
#define UNPACK_LOW(x, y) (Floats) _mm_unpacklo_ps((__m128)(x), (__m128)(y))
#define UNPACK_HIGH(x, y) (Floats) _mm_unpackhi_ps((__m128)(x), (__m128)(y))
#elif defined(__aarch64__)
#define UNPACK_LOW(x, y) (Floats) vzip1q_f32((float32x4_t)(x), (float32x4_t)(y))
#define UNPACK_HIGH(x, y) (Floats) vzip2q_f32((float32x4_t)(x), (float32x4_t)(y))
#endif
#ifdef UNPACK_LOW
    const Floats ac0 = UNPACK_LOW(a, c), ac1 = UNPACK_HIGH(a, c), bd0 = UNPACK_LOW(b, d), bd1 = UNPACK_HIGH(b, d);
    a = UNPACK_LOW(ac0, bd0), b = UNPACK_HIGH(ac0, bd0), c = UNPACK_LOW(ac1, bd1), d = UNPACK_HIGH(ac1, bd1);
#undef UNPACK_LOW
#undef UNPACK_HIGH
#else
    const Floats rows[4] = {a, b, c, d};
    for (int i = 0; i < LANES; i++) {
        const int block = i - i % 4, j = i % 4;
        a[i] = rows[j][block], b[i] = rows[j][block + 1], c[i] = rows[j][block + 2], d[i] = rows[j][block + 3];
    }
#endif
}

// Which of the LANES quads of a step lane i draws: `transpose_blocks` then leaves the columns in their order.
INLINE Words quads_of_lanes() {
    Words quads{};
    for (int i = 0; i < LANES; i++) quads[i] = LANES / 4 * (i % 4) + i / 4;
    return quads;
}

// Philox4x32-7 at counters (quads, row, sample, stream): fusedbayes.noise.philox_words, word for word.
INLINE void philox(const Noise& noise, Words quads, uint32_t row, Words words[4]) {
    constexpr int N = 2;  // the quads of even and of odd lanes
    // Of each 64-bit lane the lower half counts: products read no other, and what the upper halves of x1 and x3 hold
    // never comes down.
    Wides x0[N] = {(Wides)quads, (Wides)quads >> 32}, x1[N], x2[N], x3[N], first[N], second[N];
    EACH x1[k] = Wides{} + row, x2[k] = Wides{} + noise.sample, x3[k] = Wides{} + noise.stream;
    uint32_t key0 = noise.key0, key1 = noise.key1;
    for (int round = 0; round < 7; round++) {
        EACH first[k] = multiply_wide(x0[k], 0xD2511F53);
        EACH second[k] = multiply_wide(x2[k], 0xCD9E8D57);
        EACH x0[k] = (second[k] >> 32) ^ (x1[k] ^ key0), x1[k] = second[k];
        EACH x2[k] = (first[k] >> 32) ^ (x3[k] ^ key1), x3[k] = first[k];
        key0 += 0x9E3779B9, key1 += 0xBB67AE85;
    }
    words[0] = low_halves(x0[0], x0[1]), words[1] = low_halves(x1[0], x1[1]);
    words[2] = low_halves(x2[0], x2[1]), words[3] = low_halves(x3[0], x3[1]);
}

// FACTOR ln x for normal x > 0, relative error 2.7e-7 also where it is near 0: x = 2^e m with m in [sqrt 1/2, sqrt 2),
// and ln(1 + f) = f - f^2/2 + f^3 P(f) with the nearest P of degree 5. A power of two as FACTOR costs nothing.
template <int FACTOR = 1>
INLINE Floats logarithm(Floats x) {
    const Ints shifted = (Ints)x - 0x3f3504f3;
    const Floats f = (Floats)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const Floats exponent = __builtin_convertvector(shifted >> 23, Floats);
    Floats p = f * (FACTOR * -0.10191730623118815f) + FACTOR * 0.16024381068051913f;
    p = p * f - FACTOR * 0.17137126990476428f;
    p = p * f + FACTOR * 0.19924503443300065f;
    p = p * f - FACTOR * 0.24983266956121186f;
    p = p * f + FACTOR * 0.33334245712862864f;
    const Floats square = f * f;
    return exponent * (FACTOR * LN_2) + (f * float(FACTOR) - FACTOR * 0.5f * square + p * f * square);
}

// Four standard normals of four words, of each pair u = x0 2^-32 + 2^-33, theta = pi int32(x1) 2^-31 and
// z = sqrt(-2 ln u) (cos, sin) theta.
INLINE void box_muller(const Words words[4], Floats z[4]) {
    constexpr int N = 2;
    Floats u[N], radius[N], f[N], square[N], sine[N], cosine[N];
    Words turned[N];
    EACH u[k] = __builtin_convertvector(words[2 * k], Floats) * 0x1p-32f + 0x1p-33f;
    // theta = quarter pi / 2 + pi f with |f| <= 1/4: the quarter is in the two bits that are shifted out, once an
    // eighth of a turn is added, and f is exact until it becomes a float.
    EACH f[k] = __builtin_convertvector((Ints)(words[2 * k + 1] << 2), Floats) * 0x1p-33f;
    EACH turned[k] = words[2 * k + 1] + 0x20000000u;
    EACH radius[k] = square_root(logarithm<-2>(u[k]));
    EACH square[k] = f[k] * f[k];
    EACH sine[k] = square[k] * -0.5878130032902308f + 2.549628895227317f;  // sin(pi f) / f, error of the sine 1.2e-9
    EACH cosine[k] = square[k] * -1.3061351340390543f + 4.057578368256351f;  // cos(pi f), error 2.8e-8
    EACH sine[k] = sine[k] * square[k] - 5.167703505345169f;
    EACH cosine[k] = cosine[k] * square[k] - 4.934788058942362f;
    EACH sine[k] = (sine[k] * square[k] + 3.1415926101709757f) * f[k];
    EACH cosine[k] = cosine[k] * square[k] + 0.9999999724385383f;
    EACH {
        const Ints odd = (Ints)(turned[k] & 0x40000000u) != 0;
        const Words sign_sine = turned[k] & 0x80000000u, sign_cosine = (turned[k] + 0x40000000u) & 0x80000000u;
        z[2 * k] = radius[k] * (Floats)((Words)(odd ? sine[k] : cosine[k]) ^ sign_cosine);
        z[2 * k + 1] = radius[k] * (Floats)((Words)(odd ? cosine[k] : sine[k]) ^ sign_sine);
    }
}

// exp(x) for x <= 0, 0 below 2^-126; a NaN stays one.
template <int N>
INLINE void exponentials(const Floats x[N], Floats e[N]) {
    Floats shifted[N], f[N];
    EACH shifted[k] = x[k] * LOG2_E + ROUND_TO_INTEGER;
    EACH f[k] = shifted[k] - ROUND_TO_INTEGER;
    EACH f[k] = (x[k] - f[k] * LN_2_HIGH) - f[k] * LN_2_LOW;
    EACH e[k] = f[k] * 0.008312524909634026f + 0.0418901132208323f;  // (exp(f) - 1 - f) / f^2, relative error 1.1e-7
    EACH e[k] = e[k] * f[k] + 0.16667114465105437f;
    EACH e[k] = e[k] * f[k] + 0.49999231790927356f;
    EACH e[k] = e[k] * f[k] + 1.0f;
    EACH e[k] = e[k] * f[k] + 1.0f;
    EACH e[k] = x[k] < -87.33654f ? fill(0.0f) : times_power_of_two(e[k], shifted[k]);
}

INLINE Floats minus_absolute(Floats x) { return (Floats)((Words)x | 0x80000000u); }

// t = exp(-|rho|) and sigma = max(log(1 + exp(rho)), 2^-126): see kernels/gaussian.py. Below 2^-126 t is 0.
template <int N>
INLINE void exps_and_sigmas(const Floats rho[N], Floats t[N], Floats sigma[N]) {
    Floats p[N];
    EACH p[k] = minus_absolute(rho[k]);
    exponentials<N>(p, t);
    EACH p[k] = t[k] * -0.008778955528876033f + 0.044986641896015526f;
    EACH p[k] = p[k] * t[k] - 0.10902291005048761f;
    EACH p[k] = p[k] * t[k] + 0.17847208161641268f;
    EACH p[k] = p[k] * t[k] - 0.24536866140368366f;
    EACH p[k] = p[k] * t[k] + 0.33284063808505976f;
    EACH p[k] = p[k] * t[k] - 0.49998180349096155f;
    EACH p[k] = p[k] * t[k] + 1.0f;
    EACH p[k] = p[k] * t[k] + maximum(rho[k], fill(0.0f));
    EACH sigma[k] = maximum(fill(SIGMA_FLOOR), p[k]);
}

// sigmoid(rho) / sigma, at most 1 where 1 / sigma would overflow.
INLINE Floats slope_over_sigma(Floats rho, Floats t, Floats sigma) {
    return (rho < 0.0f ? t : fill(1.0f)) / (sigma + sigma * t);
}

// The noise of `columns` columns of a row, and up to GROUP - 1 more, from a whole quad on: eps, or the bits of the
// words. The key by value, so that what is stored cannot change it.
template <bool AS_WORDS>
NOINLINE void draw_columns(
    const Noise noise, uint32_t row, uint32_t first_quad, int columns, const Ahead& ahead, float* out) {
    Words next[4];
    philox(noise, quads_of_lanes() + first_quad, row, next);
    for (int column = 0; column < columns; column += GROUP) {
        ahead.fetch<GROUP>(column);
        const Words words[4] = {next[0], next[1], next[2], next[3]};
        // The next group's words while the results of these are waited for: either takes many steps in a row.
        if (column + GROUP < columns) philox(noise, quads_of_lanes() + (first_quad + (column + GROUP) / 4), row, next);
        Floats z[4] = {(Floats)words[0], (Floats)words[1], (Floats)words[2], (Floats)words[3]};
        if (!AS_WORDS) box_muller(words, z);
        transpose_blocks(z[0], z[1], z[2], z[3]);
        for (int i = 0; i < 4; i++) store(out + column + i * LANES, z[i]);
    }
}

}  // namespace isa
}  // namespace
