// The householder parametrisation on the CPU, forward and backward: two passes over d, in strips whose ranks
// are rows in scratch memory, and r x r mathematics between them.
#include <type_traits>

#include "matrix_kernels.h"
#include "matrix_strips.h"
#include "matrix_work.h"

namespace reft_kernels::cpu {

namespace {

// What both directions share: a strip of U = [S V, B] as 2r rows.
template <typename T>
class Parametrisation {
 public:
  explicit Parametrisation(const OrthonormalizeParams& params)
      : params_(params), kernels_(kernels_of<T>(params.type)), matrix_kernels_(matrix_kernels_of<T>()) {}

  int64_t count() const { return params_.count; }
  int phases() const { return 2; }
  int64_t chunks(int64_t m, int) const { return chunks_of(at(m).d); }

 protected:
  const OrthonormalizeMatrix& at(int64_t m) const { return params_.matrices[m]; }

  static Tops<T> tops_of(const OrthonormalizeMatrix& a) {
    return {static_cast<const T*>(a.X), static_cast<const T*>(a.reflectors), static_cast<const T*>(a.signs),
            a.r};
  }

  // Calls `strip(column, columns)` for the strips of a chunk.
  template <typename Strip>
  static void for_strips(const OrthonormalizeMatrix& a, int64_t chunk, const Strip& strip) {
    for_strips_of_chunk(a.d, strip_of<T>(3 * a.r), chunk, strip);
  }

  static int64_t panel_stride(const OrthonormalizeMatrix& a) {
    return padded_stride<T>(strip_of<T>(3 * a.r));
  }

  // The state of a matrix: the weights of pass 2, some r x r of them, and behind them its head in double.
  static int64_t state_bytes(int weights, const OrthonormalizeMatrix& a) {
    return head_at(weights, a) + int64_t{a.r} * a.r * 8;
  }
  template <typename Byte>
  static auto head_of(Byte* state, int weights, const OrthonormalizeMatrix& a) {
    using Double = std::conditional_t<std::is_const_v<Byte>, const double, double>;
    return reinterpret_cast<Double*>(state + head_at(weights, a));
  }

  // Rows k < r are S V, rows r + k are B, `stride` elements from row to row.
  void read_U(const OrthonormalizeMatrix& a, int64_t column, int columns, T* to, int64_t stride) const {
    const Tops<T> tops = tops_of(a);
    matrix_kernels_.ranks_to_rows(tops.X + column * a.r, columns, a.r, to, stride);
    matrix_kernels_.ranks_to_rows(tops.reflectors + column * a.r, columns, a.r, to + a.r * stride, stride);
    for (int64_t j = column; j < std::min<int64_t>(a.r, column + columns); ++j) {
      for (int k = 0; k < a.r; ++k) {
        to[k * stride + j - column] =
            static_cast<T>(tops.V(static_cast<int>(j), k) * tops.sign(static_cast<int>(j)));
      }
    }
  }

  const OrthonormalizeParams& params_;
  const Kernels<T>& kernels_;
  const MatrixKernels<T>& matrix_kernels_;

 private:
  static int64_t head_at(int weights, const OrthonormalizeMatrix& a) {
    return (weights * int64_t{a.r} * a.r * int64_t{sizeof(T)} + 7) / 8 * 8;
  }
};

template <typename T>
class Forward : public Parametrisation<T> {
  using Base = Parametrisation<T>;
  using Base::at, Base::kernels_, Base::matrix_kernels_;

 public:
  using Base::Base;

  double cost(int64_t m) const {
    const OrthonormalizeMatrix& a = at(m);
    return static_cast<double>(a.d) * a.r * (4.0 * a.r + 8);
  }
  int64_t sums(int64_t m) const { return int64_t{4} * at(m).r * at(m).r; }
  int64_t state(int64_t m) const { return Base::state_bytes(2, at(m)); }

  void run(int64_t m, int phase, int64_t chunk, const char* state, double* sums) const {
    const OrthonormalizeMatrix& a = at(m);
    const Memory memory(a);
    if (phase == 0) {
      Base::for_strips(a, chunk, [&](int64_t column, int columns) {
        Base::read_U(a, column, columns, memory.U, memory.stride);
        add_gram_of_head(a, column, columns, memory, sums);
        add_gram(kernels_, {memory.U, memory.stride, 2 * a.r}, memory.rows, columns, memory.products, sums);
      });
    } else {
      const T* u = reinterpret_cast<const T*>(state);
      std::fill_n(memory.zeros, memory.stride, T(0));
      for (int k = 0; k < a.r; ++k) memory.rows[k] = memory.zeros;
      Base::for_strips(a, chunk, [&](int64_t column, int columns) {
        Base::read_U(a, column, columns, memory.U, memory.stride);
        kernels_.up({memory.rows, 0}, {nullptr, 0}, {memory.R, column}, {a.r, columns},
                    {memory.U, memory.stride, 2 * a.r}, u);
        write_head(a, column, columns, Base::head_of(state, 2, a));
      });
    }
  }

  void finish(int64_t m, int phase, char* state, const double* gram) const {
    if (phase != 0) return;
    const OrthonormalizeMatrix& a = at(m);
    const WorkMatrices work(3, a.r);
    matrix_kernels_.orthonormalize_weights(Base::tops_of(a), gram, OrthonormalizeFactors(a.factors, a.r),
                                           reinterpret_cast<T*>(state), Base::head_of(state, 2, a), work.at);
  }

 private:
  struct Memory {
    explicit Memory(const OrthonormalizeMatrix& matrix)
        : stride(Base::panel_stride(matrix)),
          head_stride(padded_stride<double>(std::min<int64_t>(matrix.r, stride))),
          a(matrix),
          scratch(*this) {
      for (int k = 0; k < a.r; ++k) R[k] = static_cast<T*>(a.out) + k * a.d;
    }
    void place(Scratch& s) {
      s.take(U, 2 * a.r * stride);
      s.take(head, 2 * a.r * head_stride);
      s.take(head_products, int64_t{kGramRows} * 2 * a.r);
      s.take(zeros, stride);
      s.take(products, int64_t{kGramRows} * 2 * a.r);
      s.take(rows, std::max(kGramRows, a.r));
      s.take(R, a.r);
    }

    int64_t stride, head_stride;
    const OrthonormalizeMatrix& a;
    T *U, *zeros, *products;
    double *head, *head_products;
    const void** rows;
    void** R;
    Scratch scratch;
  };

  // The first r columns, among which are the reflectors' ones, are summed in double, and are zero then.
  void add_gram_of_head(const OrthonormalizeMatrix& a, int64_t column, int columns, const Memory& memory,
                        double* sums) const {
    const int count = static_cast<int>(std::min<int64_t>(a.r - column, columns));
    if (count <= 0) return;
    const Kernels<double>& wide = kernels_of<double>(Base::params_.type);
    for (int k = 0; k < 2 * a.r; ++k) {
      wide.widen(memory.U + k * memory.stride, Base::params_.type, count,
                 memory.head + k * memory.head_stride);
      std::fill_n(memory.U + k * memory.stride, count, T(0));
    }
    add_gram(wide, {memory.head, memory.head_stride, 2 * a.r}, memory.rows, count, memory.head_products,
             sums);
  }

  // The first r columns of R.
  static void write_head(const OrthonormalizeMatrix& a, int64_t column, int columns, const double* head) {
    for (int64_t k = 0; k < a.r; ++k) {
      for (int64_t j = column; j < std::min<int64_t>(a.r, column + columns); ++j) {
        static_cast<T*>(a.out)[k * a.d + j] = static_cast<T>(head[k * a.r + j]);
      }
    }
  }
};

template <typename T>
class Backward : public Parametrisation<T> {
  using Base = Parametrisation<T>;
  using Base::at, Base::kernels_, Base::matrix_kernels_;

 public:
  using Base::Base;

  double cost(int64_t m) const {
    const OrthonormalizeMatrix& a = at(m);
    return static_cast<double>(a.d) * a.r * (5.0 * a.r + 8);
  }
  int64_t sums(int64_t m) const { return int64_t{2} * at(m).r * at(m).r; }
  int64_t state(int64_t m) const { return Base::state_bytes(3, at(m)); }

  void run(int64_t m, int phase, int64_t chunk, const char* state, double* sums) const {
    const OrthonormalizeMatrix& a = at(m);
    const Memory memory(a);
    if (phase == 0) {
      Base::for_strips(a, chunk, [&](int64_t column, int columns) {
        Base::read_U(a, column, columns, memory.panel, memory.stride);
        const int64_t count = int64_t{2} * a.r * a.r;
        std::fill_n(memory.products, count, T(0));
        kernels_.down({memory.grad, column}, {nullptr, 0}, {a.r, columns},
                      {memory.panel, memory.stride, 2 * a.r}, memory.products);
        add_to(memory.products, count, sums);
      });
    } else {
      const T* u = reinterpret_cast<const T*>(state);
      const double* head = Base::head_of(state, 3, a);
      std::fill_n(memory.zeros, memory.stride, T(0));
      Base::for_strips(a, chunk, [&](int64_t column, int columns) {
        Base::read_U(a, column, columns, memory.panel, memory.stride);
        for (int k = 0; k < a.r; ++k) {
          std::copy_n(static_cast<const T*>(memory.grad[k]) + column, columns,
                      memory.panel + (2 * a.r + k) * memory.stride);
        }
        kernels_.up({memory.zero_rows, 0}, {nullptr, 0}, {memory.dX_rows, 0}, {a.r, columns},
                    {memory.panel, memory.stride, 3 * a.r}, u);
        finish_top(a, column, columns, head, memory.dX, memory.stride);
        matrix_kernels_.rows_to_ranks(memory.dX, memory.stride, columns, a.r,
                                      static_cast<T*>(a.out) + column * a.r);
      });
    }
  }

  void finish(int64_t m, int phase, char* state, const double* sums) const {
    if (phase != 0) return;
    const OrthonormalizeMatrix& a = at(m);
    const WorkMatrices work(4, a.r);
    matrix_kernels_.orthonormalize_backward_weights(
        Base::tops_of(a), sums, OrthonormalizeFactors(a.factors, a.r), reinterpret_cast<T*>(state),
        Base::head_of(state, 3, a), work.at);
  }

 private:
  struct Memory {
    explicit Memory(const OrthonormalizeMatrix& matrix)
        : stride(Base::panel_stride(matrix)), a(matrix), scratch(*this) {
      for (int k = 0; k < a.r; ++k) {
        grad[k] = static_cast<const T*>(a.grad) + k * a.d;
        zero_rows[k] = zeros;
        dX_rows[k] = dX + k * stride;
      }
    }
    void place(Scratch& s) {
      s.take(panel, 3 * a.r * stride);
      s.take(dX, a.r * stride);
      s.take(zeros, stride);
      s.take(products, int64_t{2} * a.r * a.r);
      s.take(grad, a.r);
      s.take(zero_rows, a.r);
      s.take(dX_rows, a.r);
    }

    int64_t stride;
    const OrthonormalizeMatrix& a;
    T *panel, *dX, *zeros, *products;
    const void **grad, **zero_rows;
    void** dX_rows;
    Scratch scratch;
  };

  // The first r columns: their signs, what is added to them, and zeros on the diagonal of X and above.
  static void finish_top(const OrthonormalizeMatrix& a, int64_t column, int columns, const double* head,
                         T* dX, int64_t stride) {
    const Tops<T> tops = Base::tops_of(a);
    for (int64_t j = column; j < std::min<int64_t>(a.r, column + columns); ++j) {
      for (int64_t k = 0; k < a.r; ++k) {
        T& value = dX[k * stride + j - column];
        value =
            j > k ? static_cast<T>(tops.sign(static_cast<int>(j))) * value + static_cast<T>(head[j * a.r + k])
                  : T(0);
      }
    }
  }
};

}  // namespace

void orthonormalize_forward(const OrthonormalizeParams& params, int threads,
                            const ParallelFor& parallel_for) {
  if (params.type == DType::kFloat64) {
    SharedOut(Forward<double>(params), threads, parallel_for).run();
  } else {
    SharedOut(Forward<float>(params), threads, parallel_for).run();
  }
}

void orthonormalize_backward(const OrthonormalizeParams& params, int threads,
                             const ParallelFor& parallel_for) {
  if (params.type == DType::kFloat64) {
    SharedOut(Backward<double>(params), threads, parallel_for).run();
  } else {
    SharedOut(Backward<float>(params), threads, parallel_for).run();
  }
}

}  // namespace reft_kernels::cpu
