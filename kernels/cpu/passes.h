// The fused passes for one instruction set: fused.cpp includes this file once for each, with LANES and `isa` defined.
//
// A vector holds LANES floats. Philox works on 64-bit lanes, half as many, because a product of 32-bit words fills one.
//
// Everything here is a long chain of steps that each wait for the one before, and a processor looks ahead by less than
// one chain. So chains are computed side by side, step by step: EACH does a step of `N` of them.

namespace {
namespace isa {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Wides __attribute__((vector_size(4 * LANES)));

constexpr int GROUP = 4 * LANES;  // columns that one step draws: LANES quads

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

// FACTOR ln x for normal x > 0, relative error 2.7e-7 also where it is near 0: x = 2^e m with m in [sqrt 1/2, sqrt 2), and
// ln(1 + f) = f - f^2/2 + f^3 P(f) with the nearest P of degree 5. A power of two as FACTOR costs nothing.
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
    // theta = quarter pi / 2 + pi f with |f| <= 1/4: the quarter is in the two bits that are shifted out, once an eighth
    // of a turn is added, and f is exact until it becomes a float.
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

// The noise of `columns` columns of a row, and up to GROUP - 1 more, from a whole quad on: eps, or the bits of the words.
template <bool AS_WORDS>
NOINLINE void draw_columns(const Noise noise, uint32_t row, uint32_t first_quad, int columns, float* out) {
    Words next[4];
    philox(noise, quads_of_lanes() + first_quad, row, next);
    for (int column = 0; column < columns; column += GROUP) {
        const Words words[4] = {next[0], next[1], next[2], next[3]};
        // The next group's words while the results of these are waited for: either takes many steps in a row.
        if (column + GROUP < columns) philox(noise, quads_of_lanes() + (first_quad + (column + GROUP) / 4), row, next);
        Floats z[4] = {(Floats)words[0], (Floats)words[1], (Floats)words[2], (Floats)words[3]};
        if (!AS_WORDS) box_muller(words, z);
        transpose_blocks(z[0], z[1], z[2], z[3]);
        for (int i = 0; i < 4; i++) store(out + column + i * LANES, z[i]);
    }
}

// A piece of a row: whole groups of columns, or the rest of the row, padded to whole vectors.
struct Piece {
    int64_t row, first_column;
    int columns, padded;

    INLINE Piece(int64_t row, int64_t first_column, int columns)
        : row(row), first_column(first_column), columns(columns) {
        padded = (columns + LANES - 1) / LANES * LANES;
    }

    // Elements of the operand before it.
    INLINE int64_t offset(const Operand& operand) const {
        return (row - operand.first_row) * operand.row_stride + first_column * operand.column_stride;
    }
};

// Copies the operand's elements as floats, with `padding` beyond the last.
NOINLINE void copy_in(const Operand& operand, const Piece& piece, float padding, float* buffer) {
    if (operand.type == FLOAT32) {
        const float* values = (const float*)operand.data + piece.offset(operand);
        for (int i = 0; i < piece.columns; i++) buffer[i] = values[i * operand.column_stride];
    } else {
        const uint16_t* values = (const uint16_t*)operand.data + piece.offset(operand);
        for (int i = 0; i < piece.columns; i++) {
            const uint32_t bits = (uint32_t)values[i * operand.column_stride] << 16;
            std::memcpy(buffer + i, &bits, sizeof bits);
        }
    }
    for (int i = piece.columns; i < piece.padded; i++) buffer[i] = padding;
}

NOINLINE void copy_out(const Operand& operand, const Piece& piece, const float* results) {
    if (operand.type == FLOAT32) {
        float* values = (float*)operand.data + piece.offset(operand);
        for (int i = 0; i < piece.columns; i++) values[i] = results[i];
        return;
    }
    uint16_t* values = (uint16_t*)operand.data + piece.offset(operand);
    for (int i = 0; i < piece.columns; i++) {
        uint32_t bits;
        std::memcpy(&bits, results + i, sizeof bits);
        const uint32_t nearest_even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        values[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest_even);
    }
}

// Whether the elements, adjacent, can be read and written as whole vectors of floats where they are.
INLINE bool in_place(const Operand& operand, const Piece& piece) {
    return operand.type == FLOAT32 && piece.columns == piece.padded;
}

// The operand's elements as floats: in place if they can be, else in the buffer, with `padding` beyond the last.
INLINE const float* fetch(const Operand& operand, const Piece& piece, float padding, float* buffer) {
    if (operand.column_stride == 1 && in_place(operand, piece)) return (const float*)operand.data + piece.offset(operand);
    copy_in(operand, piece, padding, buffer);
    return buffer;
}

// Where results are written as floats: in place, or in the buffer, from which `flush` brings them.
INLINE float* target(const Operand& operand, const Piece& piece, float* buffer) {
    return in_place(operand, piece) ? (float*)operand.data + piece.offset(operand) : buffer;
}

INLINE void flush(const Operand& operand, const Piece& piece, const float* results) {
    if (!in_place(operand, piece)) copy_out(operand, piece, results);
}

INLINE uint32_t row_of_noise(const Problem& p, const Piece& piece) {
    return (uint32_t)(p.row_offset + (p.noise_rows ? p.noise_rows[piece.row] : piece.row));
}

// The noise of a piece; the buffer has room for a group more.
template <bool AS_WORDS = false>
INLINE const float* draw(const Problem& p, const Piece& piece, float* buffer) {
    const int64_t column = p.column_offset + piece.first_column;
    const int shift = (int)(column % 4);
    draw_columns<AS_WORDS>(noise_of(p), row_of_noise(p, piece), (uint32_t)(column / 4), piece.padded + shift, buffer);
    return buffer + shift;
}

// The prior at a vector of columns, from numbers or from tensors. A positive prior_sigma below 2^-126 counts as that.
template <bool SCALAR>
struct Prior {
    Floats mu, sigma, inverse;

    INLINE Prior(const Problem& p, const Piece& piece, float* mu_buffer, float* sigma_buffer) {
        mu_values = SCALAR ? (const float*)p.prior_mu.data : fetch(p.prior_mu, piece, 0.0f, mu_buffer);
        sigma_values = SCALAR ? (const float*)p.prior_sigma.data : fetch(p.prior_sigma, piece, 1.0f, sigma_buffer);
        set(fill(*mu_values), fill(*sigma_values));
    }

    INLINE void move_to(int column) {
        if (!SCALAR) set(load(mu_values + column), load(sigma_values + column));
    }

   private:
    const float *mu_values, *sigma_values;

    INLINE void set(Floats new_mu, Floats new_sigma) {
        mu = new_mu;
        sigma = new_sigma < SIGMA_FLOOR ? fill(SIGMA_FLOOR) : new_sigma;
        // A NaN for what is no standard deviation, which a KL must not hide: 0 or less, infinity.
        inverse = new_sigma > 0.0f ? 1.0f / sigma + (new_sigma - new_sigma) : fill(NAN);
    }
};

// A product of positive numbers as mantissas times a power of two, which neither overflows nor underflows: the logarithm
// of four numbers for the price of one.
struct Product {
    Floats mantissas;
    Ints exponents;

    INLINE Product() : mantissas(fill(1.0f)), exponents(Ints{}) {}

    INLINE void multiply(Floats x) {
        exponents += ((Ints)x >> 23) - 127;
        mantissas *= (Floats)(((Ints)x & 0x7fffff) | 0x3f800000);
    }
};

INLINE Floats logarithm_of_ratio(const Product& a, const Product& b) {
    const Floats powers = __builtin_convertvector(a.exponents - b.exponents, Floats);
    return powers * LN_2 + (logarithm(a.mantissas) - logarithm(b.mantissas));
}

// Which lanes are those of the first so many columns.
INLINE Ints lanes_before(int columns) {
    Ints lanes{};
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes < columns;
}

INLINE double sum_of_lanes(Floats values) {
    double sums[4] = {};  // four at a time, since an addition has to wait for the one before
    for (int i = 0; i < LANES; i++) sums[i % 4] += (double)values[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The KL of a piece, lane by lane: squares, less the 1 that they are where posterior and prior are the same, and
// logarithms of sigma / s0, of all vectors of a group at once. One that sticks out of the row counts as the prior there.
template <bool SCALAR, bool TAIL>
struct KlSum {
    INLINE KlSum(const Prior<SCALAR>& prior) : squares(fill(0.0f)), logarithms(fill(0.0f)) {
        if (!ONE_BY_ONE) {
            for (int i = 0; i < GROUP / LANES; i++) prior_sigmas.multiply(prior.sigma);
        }
    }

    INLINE void begin_group() {
        sigmas = Product();
        if (ONE_BY_ONE) {
            prior_sigmas = Product();
        } else {
            squares -= (float)(GROUP / LANES);
        }
    }

    INLINE void add(Floats mu, Floats sigma, const Prior<SCALAR>& prior, int columns_left) {
        Floats scale = sigma * prior.inverse, shift = (mu - prior.mu) * prior.inverse;
        if (TAIL) {
            const Ints exists = lanes_before(columns_left);
            scale = exists ? scale : fill(1.0f), shift = exists ? shift : fill(0.0f), sigma = exists ? sigma : prior.sigma;
        }
        squares = scale * scale + (shift * shift + squares);
        sigmas.multiply(sigma);
        if (ONE_BY_ONE) {
            squares -= 1.0f;
            prior_sigmas.multiply(prior.sigma);
        }
    }

    INLINE void end_group() { logarithms += logarithm_of_ratio(sigmas, prior_sigmas); }

    INLINE double total() const { return sum_of_lanes(0.5f * squares - logarithms); }

   private:
    static constexpr bool ONE_BY_ONE = TAIL || !SCALAR;
    Floats squares, logarithms;
    Product sigmas, prior_sigmas;
};

// Of a column c -1 if bit c % 32 of word c / 32 % 4 at the counter c / 128 is set, else 1.
INLINE void write_signs(const Problem& p, const Piece& piece) {
    uint32_t words[LONGEST / 32 + 8 + GROUP];  // of the counters that the columns begin and end in, and a group more
    const int64_t column = p.column_offset + piece.first_column, first = column / 128;
    const int needed = 4 * (int)((column + piece.columns - 1) / 128 - first + 1);
    draw_columns<true>(noise_of(p), row_of_noise(p, piece), (uint32_t)first, needed, (float*)words);
    float* signs = (float*)p.weight.data + piece.offset(p.weight);
    for (int i = 0; i < piece.columns; i++) {
        const uint32_t c = (uint32_t)(column - 128 * first) + i;
        signs[i] = words[c / 32] >> c % 32 & 1 ? -1.0f : 1.0f;
    }
}

// The noise itself.
INLINE void write_noise(const Problem& p, const Piece& piece) {
    float buffer[LONGEST + GROUP];
    const float* noise = p.output == WORD ? draw<true>(p, piece, buffer) : draw(p, piece, buffer);
    std::memcpy((float*)p.weight.data + piece.offset(p.weight), noise, piece.columns * sizeof(float));
}

// What is written in the weight's place, and its derivative by sigma: W and eps, sigma^2 and 2 sigma, sigma eps and eps.
// USUAL: W is wanted.
template <bool USUAL>
struct Sampled {
    INLINE Sampled(const Problem& p, const float* eps) : eps(eps) { with_mean = (Ints)fill(0.0f) - (p.output == WEIGHT); }

    INLINE Floats value(int i, Floats mean, Floats sigma) const {
        if (USUAL) return mean + sigma * load(eps + i);
        return eps ? (Floats)((Ints)mean & with_mean) + sigma * load(eps + i) : sigma * sigma;
    }

    INLINE Floats derivative(int i, Floats sigma) const { return USUAL || eps ? load(eps + i) : sigma + sigma; }

   private:
    const float* eps;
    Ints with_mean;
};

// What stands in for a prior and its KL where there are none.
struct NoPrior {
    INLINE NoPrior(const Problem&, const Piece&, float*, float*) {}
    INLINE void move_to(int) {}
};

struct NoKl {
    INLINE NoKl(const NoPrior&) {}
    INLINE void begin_group() {}
    INLINE void add(Floats, Floats, const NoPrior&, int) {}
    INLINE void end_group() {}
    INLINE double total() const { return 0.0; }
};

template <bool KL, bool SCALAR, bool USUAL, bool TAIL>
INLINE double forward(const Problem& p, const Piece& piece, const float* eps) {
    constexpr int N = TAIL ? 1 : GROUP / LANES;
    float buffers[5][LONGEST + GROUP];
    const Sampled<USUAL> sampled(p, eps);
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[0]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[1]);
    float* weight = USUAL || p.output != NONE ? target(p.weight, piece, buffers[2]) : nullptr;
    std::conditional_t<KL, Prior<SCALAR>, NoPrior> prior(p, piece, buffers[3], buffers[4]);
    std::conditional_t<KL, KlSum<SCALAR, TAIL>, NoKl> kl(prior);
    for (int column = 0; column < piece.padded; column += GROUP) {
        kl.begin_group();
        const int end = TAIL ? piece.padded : column + GROUP;
        for (int i = column; i < end; i += N * LANES) {
            Floats r[N], t[N], sigma[N];
            EACH r[k] = load(rho + i + k * LANES);
            exps_and_sigmas<N>(r, t, sigma);
            EACH {
                const int j = i + k * LANES;
                prior.move_to(j);
                kl.add(load(mu + j), sigma[k], prior, piece.columns - j);
                if (USUAL || weight) store(weight + j, sampled.value(j, load(mu + j), sigma[k]));
            }
        }
        kl.end_group();
    }
    if (weight) flush(p.weight, piece, weight);
    return kl.total();
}

// dmu = G + g (mu - m0) / s0^2 and drho = (H d + g (sigma / s0^2 - 1 / sigma)) sigmoid(rho), and W again if asked for; H is
// dL by what was sampled, d its derivative by sigma, and G is H if W was sampled. USUAL: that is so, and the gradients are
// not added to others.
template <bool KL, bool SCALAR, bool USUAL, bool TAIL>
INLINE double backward(const Problem& p, const Piece& piece, const float* eps) {
    constexpr int N = TAIL ? 1 : GROUP / LANES;
    float buffers[9][LONGEST + GROUP];
    const Sampled<USUAL> sampled(p, eps);
    const Operand& first = p.output != WEIGHT || p.grad_product.data ? p.grad_product : p.grad_sampled;
    const Operand& second = p.output != WEIGHT || p.grad_sampled.data ? p.grad_sampled : p.grad_product;
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[0]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[1]);
    const float* grad_product = first.data ? fetch(first, piece, 0.0f, buffers[2]) : nullptr;
    const float* grad_sampled = second.data && !USUAL ? fetch(second, piece, 0.0f, buffers[8]) : grad_product;
    float* weight = p.weight.data ? target(p.weight, piece, buffers[3]) : nullptr;
    float* grad_mu = target(p.grad_mu, piece, buffers[4]);
    float* grad_rho = target(p.grad_rho, piece, buffers[5]);
    const float* mu_before = p.accumulate ? fetch(p.grad_mu, piece, 0.0f, buffers[4]) : nullptr;
    const float* rho_before = p.accumulate ? fetch(p.grad_rho, piece, 0.0f, buffers[5]) : nullptr;
    std::conditional_t<KL, Prior<SCALAR>, NoPrior> prior(p, piece, buffers[6], buffers[7]);
    const Floats grad_kl = fill(KL ? *p.grad_kl : 0.0f);
    for (int i = 0; i < piece.padded; i += N * LANES) {
        Floats r[N], t[N], sigma[N];
        EACH r[k] = load(rho + i + k * LANES);
        exps_and_sigmas<N>(r, t, sigma);
        EACH {
            const int j = i + k * LANES;
            const Floats mean = load(mu + j);
            Floats dmu = fill(0.0f), by_log_sigma = fill(0.0f);
            if (weight) store(weight + j, sampled.value(j, mean, sigma[k]));
            if (USUAL || grad_product) dmu = load(grad_product + j);
            if (USUAL || grad_sampled) {
                const Floats grad = USUAL ? dmu : load(grad_sampled + j);
                by_log_sigma = grad * sampled.derivative(j, sigma[k]) * sigma[k];
            }
            if constexpr (KL) {
                prior.move_to(j);
                const Floats scale = sigma[k] * prior.inverse;
                dmu += grad_kl * ((mean - prior.mu) * prior.inverse * prior.inverse);
                by_log_sigma += grad_kl * (scale * scale - 1.0f);
            }
            const Floats drho = by_log_sigma * slope_over_sigma(r[k], t[k], sigma[k]);
            store(grad_mu + j, !USUAL && mu_before ? dmu + load(mu_before + j) : dmu);
            store(grad_rho + j, !USUAL && rho_before ? drho + load(rho_before + j) : drho);
        }
    }
    if (weight) flush(p.weight, piece, weight);
    flush(p.grad_mu, piece, grad_mu);
    flush(p.grad_rho, piece, grad_rho);
    return 0.0;
}

// A row, or LONGEST columns of one, with its noise if it is drawn, in two pieces: whole groups, and the rest. The sum of
// what `compute` makes of them.
template <class Compute>
INLINE double in_pieces(
    const Problem& p, int64_t row, int64_t first_column, int columns, bool is_drawn, Compute compute) {
    float buffer[LONGEST + GROUP];
    const float* eps = is_drawn ? draw(p, Piece(row, first_column, columns), buffer) : nullptr;
    const int whole = columns / GROUP * GROUP, rest = columns - whole;
    double sum = 0.0;
    if (whole) sum += compute(std::false_type(), Piece(row, first_column, whole), eps);
    if (rest) sum += compute(std::true_type(), Piece(row, first_column + whole, rest), eps ? eps + whole : nullptr);
    return sum;
}

double forward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    if (p.output == SIGN) {
        write_signs(p, Piece(row, first_column, columns));
        return 0.0;
    }
    if (p.output == NORMAL || p.output == WORD) {
        write_noise(p, Piece(row, first_column, columns));
        return 0.0;
    }
    const bool is_drawn = p.output == WEIGHT || p.output == PERTURBATION;
    const auto row_of = [&](auto kl, auto scalar, auto usual) {
        return in_pieces(p, row, first_column, columns, is_drawn, [&](auto tail, const Piece& piece, const float* eps) {
            return forward<kl, scalar, usual, tail>(p, piece, eps);
        });
    };
    const auto usual_or_not = [&](auto kl, auto scalar) {
        return p.output == WEIGHT ? row_of(kl, scalar, std::true_type()) : row_of(kl, scalar, std::false_type());
    };
    if (!p.prior_sigma.data) return usual_or_not(WITHOUT_KL, SCALAR_PRIOR);
    return p.scalar_prior ? usual_or_not(WITH_KL, SCALAR_PRIOR) : usual_or_not(WITH_KL, TENSOR_PRIOR);
}

double backward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    const bool has_gradient = p.grad_product.data || p.grad_sampled.data;
    const bool is_usual = p.output == WEIGHT && !p.accumulate && !p.grad_product.data != !p.grad_sampled.data;
    const bool is_drawn = (p.output == WEIGHT || p.output == PERTURBATION) && (has_gradient || p.weight.data);
    const auto row_of = [&](auto kl, auto scalar, auto usual) {
        return in_pieces(p, row, first_column, columns, is_drawn, [&](auto tail, const Piece& piece, const float* eps) {
            return backward<kl, scalar, usual, tail>(p, piece, eps);
        });
    };
    const auto usual_or_not = [&](auto kl, auto scalar) {
        return is_usual ? row_of(kl, scalar, std::true_type()) : row_of(kl, scalar, std::false_type());
    };
    if (!p.grad_kl) return usual_or_not(WITHOUT_KL, SCALAR_PRIOR);
    return p.scalar_prior ? usual_or_not(WITH_KL, SCALAR_PRIOR) : usual_or_not(WITH_KL, TENSOR_PRIOR);
}

}  // namespace isa
}  // namespace
