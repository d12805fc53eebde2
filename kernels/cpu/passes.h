// The fused passes for one instruction set: fused.cpp includes this file once for each, with LANES and `isa` defined.
//
// A vector holds LANES floats. Philox works on 64-bit lanes, half as many, because a product of 32-bit words fills one.

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
#elif defined(FUSEDBAYES_AVX2)
    return (Wides)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi32((int)factor));
#else
    return (words & 0xffffffff) * factor;
#endif
}

INLINE Floats square_root(Floats x) {
#if LANES == 16
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(FUSEDBAYES_AVX2)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// Four vectors seen as LANES / 4 blocks of 4 x 4: each block is transposed in its place.
INLINE void transpose_blocks(Floats& a, Floats& b, Floats& c, Floats& d) {
#if LANES == 16
#define UNPACK_LOW(x, y) (Floats) _mm512_unpacklo_ps((__m512)(x), (__m512)(y))
#define UNPACK_HIGH(x, y) (Floats) _mm512_unpackhi_ps((__m512)(x), (__m512)(y))
#elif defined(FUSEDBAYES_AVX2)
#define UNPACK_LOW(x, y) (Floats) _mm256_unpacklo_ps((__m256)(x), (__m256)(y))
#define UNPACK_HIGH(x, y) (Floats) _mm256_unpackhi_ps((__m256)(x), (__m256)(y))
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
    for (int odd = 0; odd < 2; odd++) {
        Wides x0 = odd ? (Wides)quads >> 32 : (Wides)quads & 0xffffffff;
        Wides x1 = Wides{} + row, x2 = Wides{} + noise.sample, x3 = Wides{} + noise.stream;
        uint32_t key0 = noise.key0, key1 = noise.key1;
        for (int round = 0; round < 7; round++) {
            const Wides first = multiply_wide(x0, 0xD2511F53), second = multiply_wide(x2, 0xCD9E8D57);
            // What the upper halves of x1 and x3 hold never comes back: products read the lower halves only.
            x0 = (second >> 32) ^ (x1 ^ key0), x1 = second, x2 = (first >> 32) ^ (x3 ^ key1), x3 = first;
            key0 += 0x9E3779B9, key1 += 0xBB67AE85;
        }
        const Wides last[4] = {x0, x1, x2, x3};
        for (int i = 0; i < 4; i++) {
            words[i] = odd ? words[i] | (Words)(last[i] << 32) : (Words)(last[i] & 0xffffffff);
        }
    }
}

// ln x for normal x > 0, relative error 2.7e-7 also where it is near 0: x = 2^e m with m in [sqrt 1/2, sqrt 2), and
// ln(1 + f) = f - f^2/2 + f^3 P(f) with the nearest P of degree 5.
INLINE Floats logarithm(Floats x) {
    const Ints shifted = (Ints)x - 0x3f3504f3;
    const Floats f = (Floats)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const Floats exponent = __builtin_convertvector(shifted >> 23, Floats);
    Floats p = f * -0.10191730623118815f + 0.16024381068051913f;
    p = p * f - 0.17137126990476428f;
    p = p * f + 0.19924503443300065f;
    p = p * f - 0.24983266956121186f;
    p = p * f + 0.33334245712862864f;
    const Floats square = f * f;
    return exponent * LN_2 + (f - 0.5f * square + p * f * square);
}

// Two standard normals of two words: u = x0 2^-32 + 2^-33, theta = pi int32(x1) 2^-31, z = sqrt(-2 ln u) (cos, sin) theta.
INLINE void box_muller(Words radius_word, Words angle_word, Floats& z0, Floats& z1) {
    const Floats u = __builtin_convertvector(radius_word, Floats) * 0x1p-32f + 0x1p-33f;
    const Floats radius = square_root(-2.0f * logarithm(u));
    // theta = quarter pi / 2 + pi f with |f| <= 1/4; integers, so f is exact until it becomes a float.
    const Ints angle = (Ints)angle_word;
    const Ints quarter = (Ints)((angle_word + 0x20000000u)) >> 30;
    const Floats f = __builtin_convertvector((Ints)((Words)angle - ((Words)quarter << 30)), Floats) * 0x1p-31f;
    const Floats square = f * f;
    Floats sine = square * -0.5878130032902308f + 2.549628895227317f;  // sin(pi f) / f, relative error 1.2e-9
    sine = sine * square - 5.167703505345169f;
    sine = (sine * square + 3.1415926101709757f) * f;
    Floats cosine = square * -1.3061351340390543f + 4.057578368256351f;  // cos(pi f), error 2.8e-8
    cosine = cosine * square - 4.934788058942362f;
    cosine = cosine * square + 0.9999999724385383f;
    const Ints odd = (quarter & 1) != 0;
    const Words sign_cosine = (Words)(quarter + 1) << 30 & 0x80000000u, sign_sine = (Words)quarter << 30 & 0x80000000u;
    z0 = radius * (Floats)((Words)(odd ? sine : cosine) ^ sign_cosine);
    z1 = radius * (Floats)((Words)(odd ? cosine : sine) ^ sign_sine);
}

// t = exp(-|rho|) and sigma = max(log(1 + exp(rho)), 2^-126): see kernels/gaussian.py. Below 2^-126 t is 0.
INLINE void exp_and_sigma(Floats rho, Floats& t, Floats& sigma) {
    const Floats positive = rho > 0.0f ? rho : fill(0.0f);
    const Floats x = rho - 2.0f * positive;  // -|rho|, and a NaN stays one
    const Floats shifted = x * LOG2_E + ROUND_TO_INTEGER;
    const Floats n = shifted - ROUND_TO_INTEGER;
    const Floats f = x - n * LN_2_HIGH - n * LN_2_LOW;
    Floats e = f * 0.008312524909634026f + 0.0418901132208323f;  // (exp(f) - 1 - f) / f^2, relative error 1.1e-7
    e = e * f + 0.16667114465105437f;
    e = e * f + 0.49999231790927356f;
    e = e * (f * f) + f + 1.0f;
    const Floats scale = (Floats)(((Ints)shifted + 127) << 23);
    t = x < -87.33654f ? fill(0.0f) : e * scale;
    Floats p = t * -0.008778955528876033f + 0.044986641896015526f;
    p = p * t - 0.10902291005048761f;
    p = p * t + 0.17847208161641268f;
    p = p * t - 0.24536866140368366f;
    p = p * t + 0.33284063808505976f;
    p = p * t - 0.49998180349096155f;
    p = p * t + 1.0f;
    const Floats softplus = p * t + positive;
    sigma = softplus < SIGMA_FLOOR ? fill(SIGMA_FLOOR) : softplus;
}

// eps of `columns` columns of a row, a multiple of GROUP, from a whole quad on.
INLINE void draw_normals(const Noise& noise, uint32_t row, uint32_t first_quad, int columns, float* eps) {
    for (int column = 0; column < columns; column += GROUP) {
        Words words[4];
        philox(noise, quads_of_lanes() + (first_quad + column / 4), row, words);
        Floats z[4];
        box_muller(words[0], words[1], z[0], z[1]);
        box_muller(words[2], words[3], z[2], z[3]);
        transpose_blocks(z[0], z[1], z[2], z[3]);
        for (int i = 0; i < 4; i++) store(eps + column + i * LANES, z[i]);
    }
}

// A stretch of one row: at most SEGMENT columns, worked on as `padded` ones, a multiple of GROUP.
struct Stretch {
    int64_t row, first_column;
    int columns, padded;
};

// The operand's elements as floats, in place if they are, else in the buffer; `padding` stands for those beyond the last.
INLINE const float* fetch(const Operand& operand, const Problem& p, const Stretch& s, float padding, float* buffer) {
    const int64_t first = s.row * p.columns + s.first_column;
    if (operand.type == FLOAT32) {
        const float* values = (const float*)operand.data + first;
        if (s.columns == s.padded) return values;
        std::memcpy(buffer, values, s.columns * sizeof(float));
    } else {
        const uint16_t* values = (const uint16_t*)operand.data + first;
        for (int i = 0; i < s.columns; i++) {
            const uint32_t bits = (uint32_t)values[i] << 16;
            std::memcpy(buffer + i, &bits, sizeof bits);
        }
    }
    for (int i = s.columns; i < s.padded; i++) buffer[i] = padding;
    return buffer;
}

// Where results may be written as floats: in place, or in the buffer, from which `flush` brings them.
INLINE float* target(const Operand& operand, const Problem& p, const Stretch& s, float* buffer) {
    const bool in_place = operand.type == FLOAT32 && s.columns == s.padded;
    return in_place ? (float*)operand.data + s.row * p.columns + s.first_column : buffer;
}

INLINE void flush(const Operand& operand, const Problem& p, const Stretch& s, const float* buffer) {
    const int64_t first = s.row * p.columns + s.first_column;
    if (operand.type == FLOAT32) {
        float* values = (float*)operand.data + first;
        if (values != buffer) std::memcpy(values, buffer, s.columns * sizeof(float));
        return;
    }
    uint16_t* values = (uint16_t*)operand.data + first;
    for (int i = 0; i < s.columns; i++) {
        uint32_t bits;
        std::memcpy(&bits, buffer + i, sizeof bits);
        const uint32_t nearest_even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        values[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest_even);
    }
}

// The prior of a stretch, as numbers or as tensors. A prior_sigma below 2^-126 counts as that.
template <bool SCALAR>
struct Prior {
    const float *mu, *sigma;

    INLINE Prior(const Problem& p, const Stretch& s, float* mu_buffer, float* sigma_buffer) {
        mu = SCALAR ? (const float*)p.prior_mu.data : fetch(p.prior_mu, p, s, 0.0f, mu_buffer);
        sigma = SCALAR ? (const float*)p.prior_sigma.data : fetch(p.prior_sigma, p, s, 1.0f, sigma_buffer);
    }

    INLINE void get(int column, Floats& prior_mu, Floats& prior_sigma) const {
        prior_mu = SCALAR ? fill(*mu) : load(mu + column);
        prior_sigma = SCALAR ? fill(*sigma) : load(sigma + column);
        prior_sigma = prior_sigma < SIGMA_FLOOR ? fill(SIGMA_FLOOR) : prior_sigma;
    }
};

// Adds up the KL of weights, four vectors at a time. log(sigma) is that of a product of four mantissas, and their
// exponents; log(s0) likewise, once where it is a number.
struct KlSum {
    Floats squares, logarithms, mantissas, prior_mantissas;
    Ints exponents;

    INLINE KlSum() : squares(fill(0.0f)), logarithms(fill(0.0f)) { restart(); }

    INLINE void restart() { exponents = Ints{}, mantissas = fill(1.0f), prior_mantissas = fill(1.0f); }

    static INLINE Floats mantissa(Floats x) { return (Floats)(((Ints)x & 0x7fffff) | 0x3f800000); }

    INLINE void add(Floats mu, Floats sigma, Floats prior_mu, Floats prior_sigma, Ints exists) {
        const Floats inverse = 1.0f / prior_sigma;
        const Floats scale = sigma * inverse, shift = (mu - prior_mu) * inverse;
        const Floats square = scale * scale + shift * shift - 1.0f;
        squares += exists ? square : fill(0.0f);
        sigma = exists ? sigma : prior_sigma;
        exponents += ((Ints)sigma >> 23) - ((Ints)prior_sigma >> 23);
        mantissas *= mantissa(sigma);
        prior_mantissas *= mantissa(prior_sigma);
    }

    INLINE void take_logarithms() {
        const Floats integer = __builtin_convertvector(exponents, Floats) * LN_2;
        logarithms += integer + (logarithm(mantissas) - logarithm(prior_mantissas));
        restart();
    }

    INLINE double total() const {
        double sum = 0.0;
        for (int i = 0; i < LANES; i++) sum += 0.5 * squares[i] - (double)logarithms[i];
        return sum;
    }
};

INLINE Ints lanes_below(int end) {
    Ints lanes{};
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes < end;
}

template <bool KL, bool SCALAR_PRIOR>
INLINE double forward(const Problem& p, const Stretch& s) {
    float buffers[6][SEGMENT + GROUP];
    const int shift = (int)((p.column_offset + s.first_column) % 4);
    const float* eps = buffers[0] + shift;
    if (p.output == WEIGHT || p.output == NORMAL) {
        const uint32_t first_quad = (uint32_t)((p.column_offset + s.first_column) / 4);
        const int drawn = s.padded + (shift ? GROUP : 0);
        draw_normals(p.noise, (uint32_t)(p.row_offset + s.row), first_quad, drawn, buffers[0]);
    }
    const float* mu = fetch(p.mu, p, s, 0.0f, buffers[1]);
    const float* rho = fetch(p.rho, p, s, 0.0f, buffers[2]);
    const Prior<SCALAR_PRIOR> prior(p, s, buffers[3], buffers[4]);
    float* weight = p.output == NONE ? nullptr : target(p.weight, p, s, buffers[5]);
    KlSum kl;
    for (int column = 0; column < s.padded; column += GROUP) {
        for (int i = column; i < column + GROUP; i += LANES) {
            const Floats mean = load(mu + i);
            Floats t, sigma;
            exp_and_sigma(load(rho + i), t, sigma);
            if (p.output == WEIGHT) store(weight + i, mean + sigma * load(eps + i));
            if (p.output == NORMAL) store(weight + i, load(eps + i));
            if (p.output == VARIANCE) store(weight + i, sigma * sigma);
            if (KL) {
                Floats prior_mu, prior_sigma;
                prior.get(i, prior_mu, prior_sigma);
                kl.add(mean, sigma, prior_mu, prior_sigma, lanes_below(s.columns - i));
            }
        }
        if (KL) kl.take_logarithms();
    }
    if (weight) flush(p.weight, p, s, weight);
    return KL ? kl.total() : 0.0;
}

// dmu = G + g (mu - m0) / s0^2 and drho = (G eps + g (sigma / s0^2 - 1 / sigma)) sigmoid(rho), and W again if asked for.
// sigmoid(rho) / sigma is (t if rho < 0 else 1) / (sigma (1 + t)): at most 1, while g / sigma would overflow.
template <bool KL, bool SCALAR_PRIOR>
INLINE void backward(const Problem& p, const Stretch& s) {
    float buffers[9][SEGMENT + GROUP];
    const int shift = (int)((p.column_offset + s.first_column) % 4);
    const float* eps = buffers[0] + shift;
    const bool draw = p.grad_weight.data || p.weight.data;
    if (draw) {
        const uint32_t first_quad = (uint32_t)((p.column_offset + s.first_column) / 4);
        const int drawn = s.padded + (shift ? GROUP : 0);
        draw_normals(p.noise, (uint32_t)(p.row_offset + s.row), first_quad, drawn, buffers[0]);
    }
    const float* mu = fetch(p.mu, p, s, 0.0f, buffers[1]);
    const float* rho = fetch(p.rho, p, s, 0.0f, buffers[2]);
    const Prior<SCALAR_PRIOR> prior(p, s, buffers[3], buffers[4]);
    const float* grad_weight = p.grad_weight.data ? fetch(p.grad_weight, p, s, 0.0f, buffers[5]) : nullptr;
    float* weight = p.weight.data ? target(p.weight, p, s, buffers[6]) : nullptr;
    float* grad_mu = target(p.grad_mu, p, s, buffers[7]);
    float* grad_rho = target(p.grad_rho, p, s, buffers[8]);
    const Floats grad_kl = fill(KL ? *p.grad_kl : 0.0f);
    for (int i = 0; i < s.padded; i += LANES) {
        const Floats mean = load(mu + i), r = load(rho + i);
        Floats t, sigma;
        exp_and_sigma(r, t, sigma);
        const Floats sigmoid_over_sigma = (r < 0.0f ? t : fill(1.0f)) / (sigma + sigma * t);
        Floats dmu = fill(0.0f), drho = fill(0.0f);
        if (weight) store(weight + i, mean + sigma * load(eps + i));
        if (grad_weight) {
            dmu = load(grad_weight + i);
            drho = dmu * load(eps + i) * (sigma * sigmoid_over_sigma);
        }
        if (KL) {
            Floats prior_mu, prior_sigma;
            prior.get(i, prior_mu, prior_sigma);
            const Floats inverse = 1.0f / prior_sigma;
            const Floats scale = sigma * inverse;
            dmu += grad_kl * ((mean - prior_mu) * inverse * inverse);
            drho += grad_kl * (scale * scale - 1.0f) * sigmoid_over_sigma;
        }
        store(grad_mu + i, dmu);
        store(grad_rho + i, drho);
    }
    if (weight) flush(p.weight, p, s, weight);
    flush(p.grad_mu, p, s, grad_mu);
    flush(p.grad_rho, p, s, grad_rho);
}

double forward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    const Stretch s{row, first_column, columns, (columns + GROUP - 1) / GROUP * GROUP};
    if (!p.prior_sigma.data) return forward<false, true>(p, s);
    return p.scalar_prior ? forward<true, true>(p, s) : forward<true, false>(p, s);
}

double backward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    const Stretch s{row, first_column, columns, (columns + GROUP - 1) / GROUP * GROUP};
    if (!p.grad_kl) {
        backward<false, true>(p, s);
    } else if (p.scalar_prior) {
        backward<true, true>(p, s);
    } else {
        backward<true, false>(p, s);
    }
    return 0.0;
}

}  // namespace isa
}  // namespace
