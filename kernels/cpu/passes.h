// The fused passes over a parameter, for one instruction set; included after pieces.h.

namespace {
namespace isa {

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

// A product of positive numbers as mantissas times a power of two, which neither overflows nor underflows: the
// logarithm of four numbers for the price of one.
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
// logarithms of sigma / s0, of all vectors of a group at once. One that sticks out of the row counts as the prior
// there.
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
            scale = exists ? scale : fill(1.0f), shift = exists ? shift : fill(0.0f);
            sigma = exists ? sigma : prior.sigma;
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
    // Of the counters that the columns begin and end in, and a group more.
    uint32_t words[LONGEST_PART / 32 + 8 + GROUP];
    const int64_t column = p.column_offset + piece.first_column, first = column / 128;
    const int needed = 4 * (int)((column + piece.columns - 1) / 128 - first + 1);
    draw_columns<true>(noise_of(p), row_of_noise(p, piece.row), (uint32_t)first, needed, Ahead(), (float*)words);
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

// What is written in the weight's place, and its derivative by sigma: W and eps, sigma^2 and 2 sigma, sigma eps and
// eps.
struct Sampled {
    INLINE Sampled(const Problem& p, const float* eps) : eps(eps) {
        with_mean = (Ints)fill(0.0f) - (p.output == WEIGHT);
    }

    INLINE Floats value(int i, Floats mean, Floats sigma) const {
        return eps ? (Floats)((Ints)mean & with_mean) + sigma * load(eps + i) : sigma * sigma;
    }

    INLINE Floats derivative(int i, Floats sigma) const { return eps ? load(eps + i) : sigma + sigma; }

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

template <bool KL, bool SCALAR, bool TAIL>
INLINE double forward(const Problem& p, const Piece& piece, const float* eps) {
    constexpr int N = TAIL ? 1 : GROUP / LANES;
    float buffers[5][STRETCH];
    const Sampled sampled(p, eps);
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[0]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[1]);
    float* weight = p.output == NONE ? nullptr : target(p.weight, piece, buffers[2]);
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
                if (weight) store(weight + j, sampled.value(j, load(mu + j), sigma[k]));
            }
        }
        kl.end_group();
    }
    if (weight) flush(p.weight, piece, weight);
    return kl.total();
}

// dmu = G + g (mu - m0) / s0^2 and drho = (H d + g (sigma / s0^2 - 1 / sigma)) sigmoid(rho), and W again if asked for;
// H is dL by what was sampled, d its derivative by sigma, and G is H if W was sampled.
template <bool KL, bool SCALAR, bool TAIL>
INLINE double backward(const Problem& p, const Piece& piece, const float* eps) {
    constexpr int N = TAIL ? 1 : GROUP / LANES;
    float buffers[9][STRETCH];
    const Sampled sampled(p, eps);
    const Operand& first = p.output != WEIGHT || p.grad_product.data ? p.grad_product : p.grad_sampled;
    const Operand& second = p.output != WEIGHT || p.grad_sampled.data ? p.grad_sampled : p.grad_product;
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[0]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[1]);
    const float* grad_product = fetch_gradient(p, first, piece, buffers[2]);
    const float* grad_sampled = &second == &first ? grad_product : fetch_gradient(p, second, piece, buffers[8]);
    float* weight = p.weight.data ? target(p.weight, piece, buffers[3]) : nullptr;
    float* grad_mu = target(p.grad_mu, piece, buffers[4]);
    float* grad_rho = target(p.grad_rho, piece, buffers[5]);
    const float* mu_before = p.accumulate ? fetch(p.grad_mu, piece, 0.0f, buffers[4]) : nullptr;
    const float* rho_before = p.accumulate ? fetch(p.grad_rho, piece, 0.0f, buffers[5]) : nullptr;
    std::conditional_t<KL, Prior<SCALAR>, NoPrior> prior(p, piece, buffers[6], buffers[7]);
    const Floats grad_kl = fill(KL ? *p.grad_kl : 0.0f);
    for (int i = 0; i < piece.padded; i += N * LANES) {
        Floats r[N], t[N], sigma[N], sigmoid_over_sigma[N];
        EACH r[k] = load(rho + i + k * LANES);
        exps_and_sigmas<N>(r, t, sigma);
        EACH sigmoid_over_sigma[k] = slope_over_sigma(r[k], t[k], sigma[k]);
        EACH {
            const int j = i + k * LANES;
            const Floats mean = load(mu + j);
            Floats dmu = fill(0.0f), drho = fill(0.0f);
            if (weight) store(weight + j, sampled.value(j, mean, sigma[k]));
            if (grad_product) dmu = load(grad_product + j);
            if (grad_sampled) {
                drho = load(grad_sampled + j) * sampled.derivative(j, sigma[k]) * (sigma[k] * sigmoid_over_sigma[k]);
            }
            if constexpr (KL) {
                prior.move_to(j);
                const Floats scale = sigma[k] * prior.inverse;
                dmu += grad_kl * ((mean - prior.mu) * prior.inverse * prior.inverse);
                drho += grad_kl * (scale * scale - 1.0f) * sigmoid_over_sigma[k];
            }
            store(grad_mu + j, mu_before ? dmu + load(mu_before + j) : dmu);
            store(grad_rho + j, rho_before ? drho + load(rho_before + j) : drho);
        }
    }
    if (weight) flush(p.weight, piece, weight);
    flush(p.grad_mu, piece, grad_mu);
    flush(p.grad_rho, piece, grad_rho);
    return 0.0;
}

// A piece with its noise, if that is drawn, in stretches of whole groups, and the rest. The sum of what `compute` makes
// of them.
template <class Compute>
INLINE double in_stretches(
    const Problem& p, int64_t row, int64_t first_column, int columns, bool is_drawn, Compute compute) {
    float buffer[LONGEST + GROUP];
    const float* eps = is_drawn ? draw(p, Piece(row, first_column, columns), buffer) : nullptr;
    const auto of_them = [&](auto tail, int begin, int size) {
        return compute(tail, Piece(row, first_column + begin, size), eps ? eps + begin : nullptr);
    };
    const int whole = columns / GROUP * GROUP;
    double sum = 0.0;
    for (int begin = 0; begin < whole; begin += STRETCH) {
        sum += of_them(std::false_type(), begin, std::min(STRETCH, whole - begin));
    }
    if (whole < columns) sum += of_them(std::true_type(), whole, columns - whole);
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
    const auto pass_over = [&](auto kl, auto scalar) {
        const auto of_a_stretch = [&](auto tail, const Piece& piece, const float* eps) {
            return forward<kl, scalar, tail>(p, piece, eps);
        };
        return in_stretches(p, row, first_column, columns, is_drawn, of_a_stretch);
    };
    if (!p.prior_sigma.data) return pass_over(WITHOUT_KL, SCALAR_PRIOR);
    return p.scalar_prior ? pass_over(WITH_KL, SCALAR_PRIOR) : pass_over(WITH_KL, TENSOR_PRIOR);
}

double backward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    const bool is_used = p.weight.data || p.grad_sampled.data || (p.output == WEIGHT && p.grad_product.data);
    const bool is_drawn = is_used && (p.output == WEIGHT || p.output == PERTURBATION);
    const auto pass_over = [&](auto kl, auto scalar) {
        const auto of_a_stretch = [&](auto tail, const Piece& piece, const float* eps) {
            return backward<kl, scalar, tail>(p, piece, eps);
        };
        return in_stretches(p, row, first_column, columns, is_drawn, of_a_stretch);
    };
    if (!p.grad_kl) return pass_over(WITHOUT_KL, SCALAR_PRIOR);
    return p.scalar_prior ? pass_over(WITH_KL, SCALAR_PRIOR) : pass_over(WITH_KL, TENSOR_PRIOR);
}

}  // namespace isa
}  // namespace
