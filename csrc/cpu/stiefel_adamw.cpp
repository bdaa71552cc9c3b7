// One step of AdamW on the CPU. What is not constrained is read and written once. A matrix with orthonormal
// rows is gone through two to four times while it is in the cache: for the gradient's norm, for its normal
// part, for the step and the Gram matrix of what that leads to, and for the retraction. Its sums and products
// are in double.
#include <cmath>

#include "matrix_kernels.h"
#include "matrix_strips.h"
#include "matrix_work.h"

namespace reft_kernels::cpu {

namespace {

// What is the same for all tensors.
struct Settings {
  explicit Settings(const StiefelAdamWParams& p)
      : lr(p.lr_tensor == nullptr         ? p.lr
           : p.lr_type == DType::kFloat64 ? *static_cast<const double*>(p.lr_tensor)
                                          : static_cast<double>(*static_cast<const float*>(p.lr_tensor))),
        inverse_scale(p.grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*p.grad_scale)) {}
  double lr;
  double inverse_scale;
  double clip = 1;
};

// The elements of a chunk of a tensor, taken as one row.
struct Elements {
  Elements(const StiefelAdamWTensor& a, int64_t chunk) {
    const int64_t chunks = std::max<int64_t>(chunks_of(a.d), 1), count = a.r * a.d;
    begin = chunk == 0 ? 0 : count / chunks * chunk / kStep * kStep;
    const int64_t end = chunk + 1 == chunks ? count : count / chunks * (chunk + 1) / kStep * kStep;
    this->count = end - begin;
  }
  static constexpr int64_t kStep = 64;
  int64_t begin, count;
};

template <typename T>
double squares_of(const StiefelAdamWTensor& a, int64_t chunk, T factor) {
  const Elements elements(a, chunk);
  return matrix_kernels_of<T>().sum_squares(static_cast<const T*>(a.gradient) + elements.begin, factor,
                                            elements.count);
}

// Of every gradient the sum of its squares.
template <typename T>
class Squares {
 public:
  Squares(const StiefelAdamWParams& params, const Settings& settings, double* squares)
      : params_(params), factor_(static_cast<T>(settings.inverse_scale)), squares_(squares) {}

  int64_t count() const { return params_.count; }
  double cost(int64_t m) const { return static_cast<double>(at(m).r * at(m).d); }
  int phases() const { return 1; }
  int64_t chunks(int64_t m, int) const { return std::max<int64_t>(chunks_of(at(m).d), 1); }
  int64_t sums(int64_t) const { return 1; }
  int64_t state(int64_t) const { return 0; }
  void run(int64_t m, int, int64_t chunk, const char*, double* sums) const {
    *sums += squares_of(at(m), chunk, factor_);
  }
  void finish(int64_t m, int, char*, const double* sums) const { squares_[m] = *sums; }

 private:
  const StiefelAdamWTensor& at(int64_t m) const { return params_.tensors[m]; }

  const StiefelAdamWParams& params_;
  T factor_;
  double* squares_;
};

template <typename T>
class Step {
 public:
  Step(const StiefelAdamWParams& params, const Settings& settings)
      : params_(params),
        narrow_(kernels_of<T>(params.type)),
        wide_(kernels_of<double>(params.type)),
        kernels_(matrix_kernels_of<T>()),
        factors_(static_cast<size_t>(params.count)) {
    double t = 0, correction1 = 0, correction2 = 0;
    for (int64_t m = 0; m < params.count; ++m) {
      const StiefelAdamWTensor& a = at(m);
      const double own_t = static_cast<double>(*a.step + 1.0f);
      if (m == 0 || own_t != t) {
        t = own_t;
        correction1 = 1 - std::pow(params.beta1, t);
        correction2 = 1 - std::pow(params.beta2, t);
      }
      AdamWFactors<T>& f = factors_[static_cast<size_t>(m)];
      f.first_factor = static_cast<T>(settings.inverse_scale);
      f.second_factor = static_cast<T>(params.maximize ? -settings.clip : settings.clip);
      f.beta1 = static_cast<T>(params.beta1);
      f.weight1 = static_cast<T>(1 - params.beta1);
      f.beta2 = static_cast<T>(params.beta2);
      f.weight2 = static_cast<T>(1 - params.beta2);
      f.decay = a.orthonormal ? T(1) : static_cast<T>(1 - settings.lr * a.weight_decay);
      f.rate = static_cast<T>(settings.lr / correction1);
      f.root_correction = static_cast<T>(1 / std::sqrt(correction2));
      f.eps = static_cast<T>(params.eps);
    }
  }

  int64_t count() const { return params_.count; }
  double cost(int64_t m) const {
    const StiefelAdamWTensor& a = at(m);
    return static_cast<double>(a.r * a.d) * (a.orthonormal ? 10.0 + 2 * a.r : 8.0);
  }
  int phases() const { return kPhases; }
  int64_t chunks(int64_t m, int phase) const {
    const StiefelAdamWTensor& a = at(m);
    const bool has = a.orthonormal ? (phase != kSquares || params_.norm == nullptr) &&
                                         (phase != kTangent || params_.riemannian)
                                   : phase == kMove;
    return has ? std::max<int64_t>(chunks_of(a.d), 1) : 0;
  }
  int64_t sums(int64_t m) const { return at(m).orthonormal ? int64_t{at(m).r} * at(m).r : 1; }
  int64_t state(int64_t m) const {
    return at(m).orthonormal ? int64_t{sizeof(State)} + int64_t{at(m).r} * at(m).r * 8 : 0;
  }

  void run(int64_t m, int phase, int64_t chunk, const char* state_bytes, double* sums) const {
    const StiefelAdamWTensor& a = at(m);
    const AdamWFactors<T>& f = factors_[static_cast<size_t>(m)];
    if (!a.orthonormal) {
      const Elements elements(a, chunk);
      move(a, elements.begin, elements.count, static_cast<const T*>(a.gradient) + elements.begin, f);
      return;
    }
    if (phase == kSquares) {
      sums[0] += squares_of(a, chunk, f.first_factor);
      return;
    }
    const State& state = *reinterpret_cast<const State*>(state_bytes);
    if (stays(state) || (phase >= kGramAgain && !state.again)) return;
    const double* u = reinterpret_cast<const double*>(state_bytes + sizeof(State));
    const Memory memory(a);
    for_strips_of_chunk(a.d, memory.strip, chunk, [&](int64_t column, int columns) {
      switch (phase) {
        case kTangent:
          return add_normal_part(a, f, memory, column, columns, sums);
        case kMove:
          move_strip(a, f, memory, column, columns, u);
          [[fallthrough]];
        case kGramAgain:
          widen_rows(memory, column, columns);
          return add_gram(wide_, {memory.panel, memory.stride, a.r}, memory.rows, columns, memory.products,
                          sums);
        default:
          widen_rows(memory, column, columns);
          return wide_.up({memory.P, column}, {nullptr, 0}, {memory.P, column}, {a.r, columns},
                          {memory.panel, memory.stride, a.r}, u);
      }
    });
  }

  void finish(int64_t m, int phase, char* state_bytes, double* sums) const {
    const StiefelAdamWTensor& a = at(m);
    if (!a.orthonormal) {
      *a.step += 1;
      return;
    }
    State& state = *reinterpret_cast<State*>(state_bytes);
    double* u = reinterpret_cast<double*>(state_bytes + sizeof(State));
    if (phase == kSquares) state.stays = !std::isfinite(sums[0]);
    if (stays(state)) return;
    const int64_t r = a.r;
    if (phase == kTangent) {
      T* minus_normal = reinterpret_cast<T*>(u);
      for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = 0; j < r; ++j) {
          minus_normal[i * r + j] = static_cast<T>(-(sums[i * r + j] + sums[j * r + i]) / 2);
        }
      }
    } else if (phase == kMove || (phase == kGramAgain && state.again)) {
      for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = 0; j < i; ++j) sums[i * r + j] = sums[j * r + i];
      }
      const WorkMatrices work(3 * r * r + r);
      const double off = kernels_.inverse_root(a.r, sums, u, work.at);
      for (int64_t i = 0; i < r; ++i) u[i * r + i] -= 1;
      if (phase == kMove) {
        state.again = !(off <= kFarOff);
        *a.step += 1;
      }
    }
  }

 private:
  enum Phase { kSquares, kTangent, kMove, kRetract, kGramAgain, kRetractAgain, kPhases };
  // Rows further from orthonormal are retracted twice.
  static constexpr double kFarOff = 0.75;

  // Before the weights of the strips' products, [r, r].
  struct State {
    bool stays;  // the gradient is not finite: nothing of the tensor changes
    bool again;
    char padding[6];
  };
  static_assert(sizeof(State) == 8);

  struct Memory {
    explicit Memory(const StiefelAdamWTensor& tensor)
        : strip(strip_of<double>(tensor.r)), stride(padded_stride<double>(strip)), a(tensor), scratch(*this) {
      for (int64_t k = 0; k < a.r; ++k) {
        P[k] = static_cast<T*>(a.parameter) + k * a.d;
        G[k] = gradient + k * stride;
      }
    }
    void place(Scratch& s) {
      s.take(panel, a.r * stride);
      s.take(gradient, a.r * stride);
      s.take(copy, a.r * stride);
      s.take(normal, int64_t{a.r} * a.r);
      s.take(products, std::max<int64_t>(kGramRows, a.r) * a.r);
      s.take(rows, kGramRows);
      s.take(P, a.r);
      s.take(G, a.r);
    }

    int64_t strip, stride;
    const StiefelAdamWTensor& a;
    double *panel, *products;
    T *gradient, *copy, *normal;
    const void** rows;
    void **P, **G;
    Scratch scratch;
  };

  const StiefelAdamWTensor& at(int64_t m) const { return params_.tensors[m]; }
  bool stays(const State& state) const { return params_.norm == nullptr && state.stays; }

  void move(const StiefelAdamWTensor& a, int64_t begin, int64_t count, const T* gradient,
            const AdamWFactors<T>& f) const {
    kernels_.adamw(static_cast<T*>(a.parameter) + begin, gradient, static_cast<T*>(a.exp_avg) + begin,
                   static_cast<T*>(a.exp_avg_sq) + begin, count, f);
  }

  // A strip's rows in the panel.
  void widen_rows(const Memory& memory, int64_t column, int columns) const {
    for (int k = 0; k < memory.a.r; ++k) {
      wide_.widen(static_cast<const T*>(memory.P[k]) + column, params_.type, columns,
                  memory.panel + k * memory.stride);
    }
  }

  void scale_gradient(const StiefelAdamWTensor& a, const AdamWFactors<T>& f, const Memory& memory,
                      int64_t column, int columns) const {
    for (int64_t k = 0; k < a.r; ++k) {
      kernels_.scale(static_cast<const T*>(a.gradient) + k * a.d + column, f.first_factor, f.second_factor,
                     columns, static_cast<T*>(memory.G[k]));
    }
  }

  void copy_rows(const StiefelAdamWTensor& a, const Memory& memory, int64_t column, int columns) const {
    for (int64_t k = 0; k < a.r; ++k) {
      std::copy_n(static_cast<const T*>(memory.P[k]) + column, columns, memory.copy + k * memory.stride);
    }
  }

  // sums += G P^T
  void add_normal_part(const StiefelAdamWTensor& a, const AdamWFactors<T>& f, const Memory& memory,
                       int64_t column, int columns, double* sums) const {
    scale_gradient(a, f, memory, column, columns);
    copy_rows(a, memory, column, columns);
    std::fill_n(memory.normal, int64_t{a.r} * a.r, T(0));
    narrow_.down({memory.G, 0}, {nullptr, 0}, {a.r, columns}, {memory.copy, memory.stride, a.r},
                 memory.normal);
    add_to(memory.normal, int64_t{a.r} * a.r, sums);
  }

  // The step of a strip's rows, without their retraction.
  void move_strip(const StiefelAdamWTensor& a, const AdamWFactors<T>& f, const Memory& memory, int64_t column,
                  int columns, const double* u) const {
    AdamWFactors<T> factors = f;
    if (params_.riemannian) {
      scale_gradient(a, f, memory, column, columns);
      copy_rows(a, memory, column, columns);
      narrow_.up({memory.G, 0}, {nullptr, 0}, {memory.G, 0}, {a.r, columns},
                 {memory.copy, memory.stride, a.r}, reinterpret_cast<const T*>(u));
      factors.first_factor = factors.second_factor = T(1);
    }
    for (int64_t k = 0; k < a.r; ++k) {
      const int64_t begin = k * a.d + column;
      move(
          a, begin, columns,
          params_.riemannian ? static_cast<const T*>(memory.G[k]) : static_cast<const T*>(a.gradient) + begin,
          factors);
    }
  }

  const StiefelAdamWParams& params_;
  const Kernels<T>& narrow_;
  const Kernels<double>& wide_;
  const MatrixKernels<T>& kernels_;
  std::vector<AdamWFactors<T>> factors_;
};

template <typename T>
void step(const StiefelAdamWParams& params, int threads, const ParallelFor& parallel_for) {
  Settings settings(params);
  if (params.norm != nullptr) {
    std::vector<double> squares(static_cast<size_t>(params.count));
    SharedOut(Squares<T>(params, settings, squares.data()), threads, parallel_for).run();
    double sum = 0;
    for (const double square : squares) sum += square;
    *params.norm = std::sqrt(sum);
    if (!std::isfinite(*params.norm)) return;
    settings.clip = std::min(params.max_norm / (*params.norm + 1e-6), 1.0);
  }
  if (params.found_inf != nullptr && !(*params.found_inf == 0.0f)) return;
  SharedOut(Step<T>(params, settings), threads, parallel_for).run();
}

}  // namespace

void stiefel_adamw_step(const StiefelAdamWParams& params, int threads, const ParallelFor& parallel_for) {
  if (params.type == DType::kFloat64) {
    step<double>(params, threads, parallel_for);
  } else {
    step<float>(params, threads, parallel_for);
  }
}

}  // namespace reft_kernels::cpu
