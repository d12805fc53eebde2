// Pieces of the operands, on which a pass works, and their noise, for one instruction set; included after vectors.h.

namespace {
namespace isa {

// A piece of a row, or of several that lie one after another: whole groups of columns, or the rest, padded to whole
// vectors.
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

INLINE float as_float(float value) { return value; }

INLINE float as_float(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    std::memcpy(&result, &bits, sizeof bits);
    return result;
}

template <class Value, class Use>
INLINE void for_each_of(const Operand& operand, const Piece& piece, Use use) {
    const Value* values = (const Value*)operand.data + piece.offset(operand);
    if (operand.column_stride == 1) {  // in a loop of its own, whole vectors at a time
        for (int i = 0; i < piece.columns; i++) use(i, as_float(values[i]));
    } else {
        for (int i = 0; i < piece.columns; i++) use(i, as_float(values[i * operand.column_stride]));
    }
}

// What `use` makes of each column and the operand's element there.
template <class Use>
INLINE void for_each(const Operand& operand, const Piece& piece, Use use) {
    operand.type == FLOAT32 ? for_each_of<float>(operand, piece, use) : for_each_of<uint16_t>(operand, piece, use);
}

// Copies the operand's elements as floats, with `padding` beyond the last.
NOINLINE void copy_in(const Operand& operand, const Piece& piece, float padding, float* buffer) {
    for_each(operand, piece, [=](int i, float value) { buffer[i] = value; });
    for (int i = piece.columns; i < piece.padded; i++) buffer[i] = padding;
}

// Copies the results to the operand, rounded to its type.
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

// Whether adjacent elements can be read and written as whole vectors of floats where they are.
INLINE bool in_place(const Operand& operand, const Piece& piece) {
    return operand.type == FLOAT32 && piece.columns == piece.padded;
}

// The operand's elements as floats: in place if they can be, else in the buffer, with `padding` beyond the last.
INLINE const float* fetch(const Operand& operand, const Piece& piece, float padding, float* buffer) {
    if (operand.column_stride == 1 && in_place(operand, piece)) {
        return (const float*)operand.data + piece.offset(operand);
    }
    copy_in(operand, piece, padding, buffer);
    return buffer;
}

// The sums of the operand's first so many rows, of 64 at a time in single precision and of those in double.
NOINLINE void sum_in(const Operand& operand, const Piece& piece, int64_t rows, float* sums) {
    double totals[STRETCH] = {};
    for (int64_t row = 0; row < rows;) {
        std::memset(sums, 0, piece.padded * sizeof(float));
        for (const int64_t end = std::min<int64_t>(row + 64, rows); row < end; row++) {
            const Piece of_row(row, piece.first_column, piece.columns);
            for_each(operand, of_row, [=](int i, float value) { sums[i] += value; });
        }
        for (int i = 0; i < piece.padded; i++) totals[i] += sums[i];
    }
    for (int i = 0; i < piece.padded; i++) sums[i] = (float)totals[i];
}

// A gradient that the pass is given, or null.
INLINE const float* fetch_gradient(const Problem& p, const Operand& operand, const Piece& piece, float* buffer) {
    if (!operand.data) return nullptr;
    if (p.summed_rows < 0) return fetch(operand, piece, 0.0f, buffer);
    sum_in(operand, piece, p.summed_rows, buffer);
    return buffer;
}

// Where results are written as floats: in place, or in the buffer, from which `flush` brings them.
INLINE float* target(const Operand& operand, const Piece& piece, float* buffer) {
    return in_place(operand, piece) ? (float*)operand.data + piece.offset(operand) : buffer;
}

INLINE void flush(const Operand& operand, const Piece& piece, const float* results) {
    if (!in_place(operand, piece)) copy_out(operand, piece, results);
}

INLINE uint32_t row_of_noise(const Problem& p, int64_t row) {
    return (uint32_t)(p.row_offset + (p.noise_rows ? p.noise_rows[row] : row));
}

// Of a piece, but for what is sampled: a layer's block of that is in the cache.
INLINE Ahead ahead_of(const Problem& p, const Piece& piece) {
    Ahead ahead;
    for (const Operand* operand : {&p.mu, &p.rho, &p.prior_mu, &p.prior_sigma, &p.grad_product, &p.grad_sampled,
                                   &p.grad_mu, &p.grad_rho}) {
        const bool is_again = operand == &p.grad_mu && operand->data == p.grad_product.data;
        if (!operand->data || operand->column_stride != 1 || is_again) continue;
        const int64_t element_size = operand->type == FLOAT32 ? 4 : 2;
        ahead.add((const char*)operand->data + piece.offset(*operand) * element_size, element_size);
    }
    return ahead;
}

// The noise of a piece, row by row; the buffer has room for a group more.
template <bool AS_WORDS = false>
INLINE const float* draw(const Problem& p, const Piece& piece, float* buffer) {
    const int64_t column = p.column_offset + piece.first_column;
    const int shift = (int)(column % 4);
    const int of_a_row = (int)std::min<int64_t>(p.columns - piece.first_column, piece.columns);
    for (int begin = 0; begin < piece.columns; begin += of_a_row) {
        const int64_t row = piece.row + begin / of_a_row;
        const bool is_last = begin + of_a_row == piece.columns;
        const int needed = shift + (is_last ? piece.padded - begin : of_a_row);
        const Ahead ahead = ahead_of(p, Piece(row, piece.first_column, of_a_row));
        const uint32_t first_quad = (uint32_t)(column / 4);
        draw_columns<AS_WORDS>(noise_of(p), row_of_noise(p, row), first_quad, needed, ahead, buffer + begin);
    }
    return buffer + shift;
}

}  // namespace isa
}  // namespace
