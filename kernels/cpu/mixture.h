// The passes of a prior that is a scale mixture, for one instruction set; included after passes.h.
//
// With w = mu + sigma eps, the wide component's log density a - w^2 / (2 wide^2) and d what it has more than the narrow
// one's, log p(w) = a - w^2 / (2 wide^2) + max(-d, 0) + log(1 + exp(-|d|)): no term of it overflows before w does.

namespace {
namespace isa {

// d, and exp(-|d|). The squares' difference as a product: it is a small number where both are large.
INLINE void weigh(const Mixture& m, Floats w, Floats& d, Floats& e) {
    const float sum = m.narrow_inverse + m.wide_inverse, difference = m.narrow_inverse - m.wide_inverse;
    d = w * (0.5f * difference) * (w * sum) + m.log_odds;
    const Floats x = minus_absolute(d);
    exponentials<1>(&x, &e);
}

// log q(w) - log p(w) = (w^2 / wide^2 - eps^2) / 2 - log(sigma (1 + e) / wide) - max(-d, 0) - log share, summed.
template <bool TAIL>
INLINE double mixture_forward(const Problem& p, const Piece& piece) {
    float buffers[3][LONGEST + GROUP];
    const Mixture& m = *p.mixture;
    const float* eps_of = draw(p, piece, buffers[0]);
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[1]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[2]);
    Floats squares = fill(0.0f), logarithms = fill(0.0f), narrower = fill(0.0f);
    for (int column = 0; column < piece.padded; column += GROUP) {
        Product sigmas, wides;
        const int end = TAIL ? piece.padded : column + GROUP;
        for (int i = column; i < end; i += LANES) {
            const Floats eps = load(eps_of + i);
            const Floats r = load(rho + i);
            Floats t, sigma, d, e;
            exps_and_sigmas<1>(&r, &t, &sigma);
            const Floats w = load(mu + i) + sigma * eps;
            weigh(m, w, d, e);
            const Floats scaled = w * m.wide_inverse;
            Floats square = scaled * scaled - eps * eps, more = d < 0.0f ? -d : fill(0.0f), factor = sigma + sigma * e;
            if (TAIL) {
                const Ints exists = lanes_before(piece.columns - i);
                square = exists ? square : fill(0.0f), more = exists ? more : fill(0.0f);
                factor = exists ? factor : fill(m.wide);
            }
            squares += square, narrower += more;
            sigmas.multiply(factor), wides.multiply(fill(m.wide));
        }
        logarithms += logarithm_of_ratio(sigmas, wides);
    }
    return sum_of_lanes(0.5f * squares - logarithms - narrower) - (double)piece.columns * m.log_share;
}

// dmu = g h and drho = g (h eps - 1 / sigma) sigmoid(rho) with h = -d log p / dw, each component's w / s^2 by its share.
INLINE void mixture_backward(const Problem& p, const Piece& piece) {
    float buffers[5][LONGEST + GROUP];
    const Mixture& m = *p.mixture;
    const float* eps_of = draw(p, piece, buffers[0]);
    const float* mu = fetch(p.mu, piece, 0.0f, buffers[1]);
    const float* rho = fetch(p.rho, piece, 0.0f, buffers[2]);
    float* grad_mu = target(p.grad_mu, piece, buffers[3]);
    float* grad_rho = target(p.grad_rho, piece, buffers[4]);
    const Floats grad_kl = fill(*p.grad_kl);
    for (int i = 0; i < piece.padded; i += LANES) {
        const Floats r = load(rho + i), eps = load(eps_of + i);
        Floats t, sigma, d, e;
        exps_and_sigmas<1>(&r, &t, &sigma);
        const Floats w = load(mu + i) + sigma * eps;
        weigh(m, w, d, e);
        const Floats larger = 1.0f / (1.0f + e), smaller = e * larger;
        const Floats wide = (d > 0.0f ? larger : smaller) * m.wide_inverse;
        const Floats narrow = (d > 0.0f ? smaller : larger) * m.narrow_inverse;
        const Floats h = w * m.wide_inverse * wide + w * m.narrow_inverse * narrow;
        store(grad_mu + i, grad_kl * h);
        store(grad_rho + i, grad_kl * (h * eps * sigma - 1.0f) * slope_over_sigma(r, t, sigma));
    }
    flush(p.grad_mu, piece, grad_mu);
    flush(p.grad_rho, piece, grad_rho);
}

double mixture_forward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    const int whole = columns / GROUP * GROUP, rest = columns - whole;
    double kl = 0.0;
    if (whole) kl += mixture_forward<false>(p, Piece(row, first_column, whole));
    if (rest) kl += mixture_forward<true>(p, Piece(row, first_column + whole, rest));
    return kl;
}

double mixture_backward_pass(const Problem& p, int64_t row, int64_t first_column, int columns) {
    const int whole = columns / GROUP * GROUP, rest = columns - whole;
    if (whole) mixture_backward(p, Piece(row, first_column, whole));
    if (rest) mixture_backward(p, Piece(row, first_column + whole, rest));
    return 0.0;
}

}  // namespace isa
}  // namespace
