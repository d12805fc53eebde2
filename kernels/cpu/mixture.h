// The passes of a prior that is a scale mixture, for one instruction set; included after passes.h.
//
// With w = mu + sigma eps, the wide component's log density a - w^2 / (2 wide^2) and d what it has more than the narrow
// one's, log p(w) = a - w^2 / (2 wide^2) + max(-d, 0) + log(1 + exp(-|d|)): no term of it overflows before w does.

namespace {
namespace isa {

// N vectors of weights: rho, t and sigma as in `exps_and_sigmas`, w, d, and e = exp(-|d|).
template <int N>
struct Weights {
    Floats rho[N], t[N], sigma[N], w[N], d[N], e[N];

    INLINE Weights(const Mixture& m, const float* mu_at, const float* rho_at, const float* eps_at) {
        // The squares' difference as a product: it is a small number where both are large.
        const float sum = m.narrow_inverse + m.wide_inverse, difference = m.narrow_inverse - m.wide_inverse;
        Floats x[N];
        EACH rho[k] = load(rho_at + k * LANES);
        exps_and_sigmas<N>(rho, t, sigma);
        EACH w[k] = load(mu_at + k * LANES) + sigma[k] * load(eps_at + k * LANES);
        EACH d[k] = w[k] * (0.5f * difference) * (w[k] * sum) + m.log_odds;
        EACH x[k] = minus_absolute(d[k]);
        exponentials<N>(x, e);
    }
};

// log q(w) - log p(w) = (w^2 / wide^2 - eps^2) / 2 - log(sigma (1 + e) / wide) - max(-d, 0) - log share, summed.
template <bool TAIL>
INLINE double mixture_forward(const Problem& p, const Piece& piece, const float* eps) {
    constexpr int N = TAIL ? 1 : GROUP / LANES;
    float buffers[2][STRETCH];
    const Mixture& m = *p.mixture;
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[0]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[1]);
    Floats squares = fill(0.0f), logarithms = fill(0.0f), narrower = fill(0.0f);
    for (int column = 0; column < piece.padded; column += GROUP) {
        Product sigmas, wides;
        const int end = TAIL ? piece.padded : column + GROUP;
        for (int i = column; i < end; i += N * LANES) {
            const Weights<N> weights(m, mu + i, rho + i, eps + i);
            EACH {
                const Floats z = load(eps + i + k * LANES), scaled = weights.w[k] * m.wide_inverse;
                Floats square = scaled * scaled - z * z, more = maximum(fill(0.0f), -weights.d[k]);
                Floats factor = weights.sigma[k] + weights.sigma[k] * weights.e[k];
                if (TAIL) {
                    const Ints exists = lanes_before(piece.columns - i - k * LANES);
                    square = exists ? square : fill(0.0f), more = exists ? more : fill(0.0f);
                    factor = exists ? factor : fill(m.wide);
                }
                squares += square, narrower += more;
                sigmas.multiply(factor), wides.multiply(fill(m.wide));
            }
        }
        logarithms += logarithm_of_ratio(sigmas, wides);
    }
    return sum_of_lanes(0.5f * squares - logarithms - narrower) - (double)piece.columns * m.log_share;
}

// dmu = g h and drho = g (h eps - 1 / sigma) sigmoid(rho) with h = -d log p / dw, each component's w / s^2 by its
// share.
template <bool TAIL>
INLINE double mixture_backward(const Problem& p, const Piece& piece, const float* eps) {
    constexpr int N = TAIL ? 1 : GROUP / LANES;
    float buffers[4][STRETCH];
    const Mixture& m = *p.mixture;
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[0]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[1]);
    float* grad_mu = target(p.grad_mu, piece, buffers[2]);
    float* grad_rho = target(p.grad_rho, piece, buffers[3]);
    const Floats grad_kl = fill(*p.grad_kl);
    for (int i = 0; i < piece.padded; i += N * LANES) {
        const Weights<N> weights(m, mu + i, rho + i, eps + i);
        EACH {
            const int j = i + k * LANES;
            const Floats w = weights.w[k], d = weights.d[k], e = weights.e[k], sigma = weights.sigma[k];
            const Floats larger = 1.0f / (1.0f + e), smaller = e * larger;
            const Floats wide = (d > 0.0f ? larger : smaller) * m.wide_inverse;
            const Floats narrow = (d > 0.0f ? smaller : larger) * m.narrow_inverse;
            const Floats h = w * m.wide_inverse * wide + w * m.narrow_inverse * narrow;
            const Floats slope = slope_over_sigma(weights.rho[k], weights.t[k], sigma);
            store(grad_mu + j, grad_kl * h);
            store(grad_rho + j, grad_kl * (h * load(eps + j) * sigma - 1.0f) * slope);
        }
    }
    flush(p.grad_mu, piece, grad_mu);
    flush(p.grad_rho, piece, grad_rho);
    return 0.0;
}

double mixture_forward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    return in_stretches(p, row, first_column, columns, true, [&](auto tail, const Piece& piece, const float* eps) {
        return mixture_forward<tail>(p, piece, eps);
    });
}

double mixture_backward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    return in_stretches(p, row, first_column, columns, true, [&](auto tail, const Piece& piece, const float* eps) {
        return mixture_backward<tail>(p, piece, eps);
    });
}

}  // namespace isa
}  // namespace
