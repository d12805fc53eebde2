// Sampling, KL and gradients of Gaussian weights on a CPU, in one pass over the parameters: see docs/cpu.md.
//
// Plain functions over pointers, called through ctypes by kernels/cpu/native.py, which mirrors the structures below.
// The headers here are compiled once for each instruction set; which one runs is the caller's choice at run time.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__FAST_MATH__)
#error "-ffast-math takes sums apart that are exact by their order"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // what is called once for a piece: inlined, it takes minutes to compile
#define EACH for (int k = 0; k < N; k++)

namespace {

enum Type : int32_t { FLOAT32, BFLOAT16 };
enum Output : int32_t { NONE, WEIGHT, VARIANCE, PERTURBATION, NORMAL, WORD, SIGN };

// A matrix, strides in elements; 0 repeats a row or a column. Results have adjacent columns.
struct Operand {
    void* data;  // null if absent
    int64_t type, row_stride, column_stride;
    int64_t first_row;  // of the parameter, which is the first one here
};

#include "pool.h"

using Worker = void (*)(void*);
using Parallel = void (*)(Worker, void*, unsigned threads, unsigned flags);  // GOMP_parallel of the runtime in use

// pi N(0, s_1^2) + (1 - pi) N(0, s_2^2) as kernels/cpu/mixture.py prepares it: the larger s is the wide one's.
struct Mixture {
    float wide, wide_inverse, narrow_inverse;
    float log_odds;  // of the wide one's density over the narrow one's, with their shares, at 0
    float log_share;  // of the wide one
};

// Words of 64 bits, as native.py packs them: first what belongs to a call, then what belongs to the parameter.
struct Problem {
    Parallel parallel;
    int64_t threads, instruction_set, output, first_row, rows;
    Operand weight;        // a result: W, sigma^2 or sigma eps, as `output` says
    Operand grad_sampled;  // dL by that
    int64_t columns, scalar_prior;
    Operand mu, rho, prior_mu, prior_sigma;
    const int64_t *seed, *sample;  // a sample of null is 0
    int64_t stream, row_offset, column_offset;
    const int64_t* noise_rows;  // of each row, beyond row_offset; null if they are 0, 1, 2, ...
    const float* grad_kl;
    Operand grad_product;       // dL by what multiplies mu, if it is not grad_sampled
    Operand grad_mu, grad_rho;  // results
    int64_t summed_rows;        // of dL, which of a bias is added up over the batch first; -1: it is the parameter's
    int64_t accumulate;         // they are added to what is there
    const Mixture* mixture;     // the prior, if it is a scale mixture: then the passes are those of mixture.h
};

struct Noise {
    uint32_t key0, key1, sample, stream;
};

inline Noise noise_of(const Problem& p) {
    const uint64_t seed = (uint64_t)*p.seed;
    return {(uint32_t)seed, (uint32_t)(seed >> 32), p.sample ? (uint32_t)*p.sample : 0, (uint32_t)p.stream};
}

// What a pass reads and writes of a row beside the noise. It is asked for as the noise is drawn, for which memory would
// have nothing to do; in the pass itself nearly every step would wait for it.
struct Ahead {
    static constexpr int MOST = 8;
    const char* streams[MOST];
    int64_t element_sizes[MOST];
    int count = 0;

    void add(const void* begin, int64_t element_size) {
        streams[count] = (const char*)begin;
        element_sizes[count++] = element_size;
    }

    // COLUMNS as a constant, and lines enough for floats whatever they are, so that no loop is left.
    template <int COLUMNS>
    INLINE void fetch(int column) const {
        constexpr int LINE = 64, LINES = COLUMNS * (int)sizeof(float) / LINE;
        for (int i = 0; i < count; i++) {
            const char* begin = streams[i] + column * element_sizes[i];
            for (int line = 0; line < LINES; line++) __builtin_prefetch(begin + line * LINE);
        }
    }
};

constexpr int LONGEST = 4096;         // weights of a piece, if it is of several rows,
constexpr int LONGEST_PART = 1024;    // and if it is part of one
constexpr int64_t CHUNK = 16 * 1024;  // weights that a thread takes at a time, about 20 us of work
constexpr float SIGMA_FLOOR = 0x1p-126f;
constexpr float LN_2 = 0.69314718f, LN_2_HIGH = 0x1.62e4p-1f, LN_2_LOW = 1.4286068e-06f, LOG2_E = 1.44269504f;
constexpr float ROUND_TO_INTEGER = 0x1.8p23f;  // added and taken off again

constexpr std::true_type WITH_KL, SCALAR_PRIOR;
constexpr std::false_type WITHOUT_KL, TENSOR_PRIOR;

}  // namespace

#if defined(__x86_64__)

#if defined(__clang__)
#define TARGET_BEGIN(features) \
    _Pragma(STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(features) _Pragma("GCC push_options") _Pragma(STRING(GCC target(features)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
#define STRING(...) #__VA_ARGS__

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
// In GCC's own intrinsics, whose masked lanes are undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

TARGET_BEGIN("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define isa avx512
#define LANES 16
#include "vectors.h"
#include "pieces.h"
#include "passes.h"
#include "mixture.h"
#undef LANES
#undef isa
TARGET_END

TARGET_BEGIN("avx2,fma")
#define isa avx2
#define LANES 8
#include "vectors.h"
#include "pieces.h"
#include "passes.h"
#include "mixture.h"
#undef LANES
#undef isa
TARGET_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif

#define isa portable
#define LANES 4
#include "vectors.h"
#include "pieces.h"
#include "passes.h"
#include "mixture.h"
#undef LANES
#undef isa

namespace {

// How many rows are worked on as if they were one: short ones, whose ends would take as long as the rest, where they
// lie one after another in memory. So many that whole vectors fit them, if there is room for it. Their noise has to
// begin with a quad: one that began before would be written over the end of the row before.
int64_t rows_of_a_piece(const Problem& p) {
    if (p.columns < 1 || p.columns > LONGEST_PART || p.output == SIGN || p.column_offset % 4 != 0) return 1;
    const auto is_dense = [&](const Operand& operand) {
        return !operand.data || (operand.column_stride == 1 && operand.row_stride == p.columns);
    };
    for (const Operand* operand :
         {&p.mu, &p.rho, &p.weight, &p.grad_sampled, &p.grad_product, &p.grad_mu, &p.grad_rho}) {
        if (!is_dense(*operand)) return 1;
    }
    if (!p.scalar_prior && !(is_dense(p.prior_mu) && is_dense(p.prior_sigma))) return 1;
    constexpr int64_t WHOLE = 64;  // columns, in vectors of any instruction set
    const int64_t most = LONGEST / p.columns, even = WHOLE / std::gcd(p.columns, WHOLE);
    return most < even ? most : most / even * even;
}

// What is computed of a piece, which may run on into the next rows; its part of the KL comes back.
using Pass = double (*)(const Problem&, int64_t row, int64_t first_column, int columns);

// A pass over all pieces. Threads take chunks of them as they come.
struct Job {
    const Problem& problem;
    Pass pass;
    int64_t rows_of_piece, pieces_of_a_row, pieces, per_chunk;
    std::vector<double> results;  // one for each chunk, so that their sum does not depend on who worked on which
    std::atomic<int64_t> next{0};
#if defined(__x86_64__)
    unsigned float_control = _mm_getcsr();  // torch.set_flush_denormal sets it for the caller alone
#endif

    Job(const Problem& p, Pass pass) : problem(p), pass(pass) {
        rows_of_piece = rows_of_a_piece(p);
        pieces_of_a_row = (p.columns + LONGEST_PART - 1) / LONGEST_PART;
        pieces = (p.rows + rows_of_piece - 1) / rows_of_piece * pieces_of_a_row;
        const int64_t of_a_piece = rows_of_piece * std::min<int64_t>(p.columns, LONGEST_PART);
        per_chunk = std::max<int64_t>(1, CHUNK / std::max<int64_t>({1, of_a_piece, of_a_piece * p.summed_rows}));
        results.assign((pieces + per_chunk - 1) / per_chunk, 0.0);
    }

    void work() {
        for (;;) {
            const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
            if (chunk >= (int64_t)results.size()) return;
            double sum = 0.0;
            const int64_t end = std::min((chunk + 1) * per_chunk, pieces);
            for (int64_t piece = chunk * per_chunk; piece < end; piece++) {
                const int64_t row = piece / pieces_of_a_row * rows_of_piece;
                const int64_t first_column = piece % pieces_of_a_row * LONGEST_PART;
                const int64_t part = std::min<int64_t>(problem.columns - first_column, LONGEST_PART);
                const int64_t rows = std::min(problem.rows - row, rows_of_piece);
                sum += pass(problem, problem.first_row + row, first_column, (int)(rows * part));
            }
            results[chunk] = sum;
        }
    }

    void run_on_new_threads(int64_t others) {
        std::vector<std::thread> started;
        try {
            for (int64_t i = 0; i < others; i++) started.emplace_back(work_on, this);
        } catch (const std::exception&) {
            // As many as there are will do.
        }
        work();
        for (std::thread& thread : started) thread.join();
    }

    // As a thread of a team, which rounds as the caller does: else a result would depend on who computed it.
    static void work_on(void* job) {
#if defined(__x86_64__)
        const unsigned own = _mm_getcsr();
        _mm_setcsr(((Job*)job)->float_control);
        ((Job*)job)->work();
        _mm_setcsr(own);
#else
        ((Job*)job)->work();
#endif
    }

    double run() {
        const int64_t useful = std::min<int64_t>(problem.threads, (int64_t)results.size());
        if (useful > 1 && problem.parallel) {
            // All of torch's threads, even if some find nothing to do: a smaller team would have the runtime end the
            // others, and start them again for torch's next operation.
            problem.parallel(work_on, this, (unsigned)problem.threads, 0);
        } else {
            run_on_new_threads(useful - 1);
        }
        double total = 0.0;
        for (double result : results) total += result;
        return total;
    }
};

struct Passes {
    Pass forward, backward, mixture_forward, mixture_backward;
};

// By number: 0 portable, 1 AVX2, 2 AVX-512.
const Passes PASSES[] = {
    {portable::forward_pass, portable::backward_pass, portable::mixture_forward_pass, portable::mixture_backward_pass},
#if defined(__x86_64__)
    {avx2::forward_pass, avx2::backward_pass, avx2::mixture_forward_pass, avx2::mixture_backward_pass},
    {avx512::forward_pass, avx512::backward_pass, avx512::mixture_forward_pass, avx512::mixture_backward_pass},
#endif
};

}  // namespace

#ifndef FUSEDBAYES_SOURCE_HASH
#define FUSEDBAYES_SOURCE_HASH 0
#endif

extern "C" {

// What setup.py took from the sources: a build that is older than they are is not used.
uint32_t fusedbayes_source_hash() { return FUSEDBAYES_SOURCE_HASH; }

// For native.py, whose structure must be as large.
int64_t fusedbayes_problem_size() { return sizeof(Problem); }

// The best instruction set of this machine, by number.
int64_t fusedbayes_instruction_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return 2;
    if (avx2) return 1;
#endif
    return 0;
}

// A capsule of DLPack with memory for a contiguous tensor. The caller holds Python's lock; null after an error.
void* fusedbayes_new_tensor(int64_t type, int64_t dimensions, const int64_t* shape) noexcept {
    return new_capsule((Type)type, (int32_t)dimensions, shape);
}

// Writes what `output` says into `weight`; returns the KL, or 0 without a prior.
double fusedbayes_forward(const Problem* problem) noexcept {
    const Passes& passes = PASSES[problem->instruction_set];
    return Job(*problem, problem->mixture ? passes.mixture_forward : passes.forward).run();
}

// Writes grad_mu and grad_rho, and the weight again where it has a place.
void fusedbayes_backward(const Problem* problem) noexcept {
    const Passes& passes = PASSES[problem->instruction_set];
    Job(*problem, problem->mixture ? passes.mixture_backward : passes.backward).run();
}
}
