// The CPU kernels against plain double loops, by one thread and by several, which have to give the same bits.
// Which instruction set they use is chosen as ever, by REFT_KERNELS_CPU_ISA too.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "reft_kernels/activation.h"
#include "reft_kernels/launch.h"
#include "reft_kernels/philox.h"

namespace reft_kernels {
namespace {

struct Case {
  const char* name;
  DType h_type, weight_type;
  int64_t slots;  // 0: every row
  int64_t d;
  int32_t r, groups;
  Activation activation;
  bool subtract, scaled, dropout;
};

constexpr int64_t kBatch = 3, kLength = 11;

constexpr Case kCases[] = {
    {"every row, linear", DType::kFloat32, DType::kFloat32, 0, 70, 4, 1, Activation::kLinear, true, false,
     false},
    {"named rows of long rows", DType::kFloat32, DType::kFloat32, 5, 1100, 9, 1, Activation::kGelu, true,
     true, false},
    {"groups and dropout", DType::kFloat32, DType::kFloat32, 7, 67, 3, 3, Activation::kTanh, true, true,
     true},
    {"groups of every row", DType::kFloat64, DType::kFloat64, 0, 33, 2, 3, Activation::kSilu, false, true,
     false},
    {"bfloat16", DType::kBFloat16, DType::kFloat32, 5, 130, 8, 2, Activation::kRelu, true, true, false},
    {"bfloat16, linear, dropout", DType::kBFloat16, DType::kBFloat16, 0, 66, 5, 1, Activation::kLinear, true,
     false, true},
};

// A tensor of float32, float64 or bfloat16, read and written as double.
class Array {
 public:
  Array(int64_t count, DType type, double value = std::numeric_limits<double>::quiet_NaN())
      : type_(type), bytes_(count * bytes_of(type)) {
    for (int64_t i = 0; i < count; ++i) set(i, value);
  }

  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / bytes_of(type_); }
  DType type() const { return type_; }
  void* data() { return bytes_.data(); }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

  double operator[](int64_t i) const {
    if (type_ == DType::kFloat64) return at<double>(i);
    if (type_ == DType::kFloat32) return at<float>(i);
    const uint32_t bits = uint32_t{at<uint16_t>(i)} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void set(int64_t i, double value) {
    if (type_ == DType::kFloat64) return put(i, value);
    const float narrow = static_cast<float>(value);
    if (type_ == DType::kFloat32) return put(i, narrow);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (!std::isnan(narrow)) bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    put(i, static_cast<uint16_t>(bits >> 16));
  }

 private:
  template <typename T>
  T at(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void put(int64_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }

  DType type_;
  std::vector<unsigned char> bytes_;
};

// What an edit is given and what it gives.
struct Tensors {
  explicit Tensors(const Case& c)
      : slots(c.slots ? c.slots : kLength),
        n(kBatch * slots),
        wide(c.h_type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
        h(random(kBatch * kLength * c.d, c.h_type)),
        grad(random(kBatch * kLength * c.d, c.h_type)),
        R(random(int64_t{c.groups} * c.r * c.d, c.weight_type, 0.2)),
        W(random(int64_t{c.groups} * c.r * c.d, c.weight_type, 0.2)),
        b(random(int64_t{c.groups} * c.r, c.weight_type)),
        c(random(int64_t{c.groups} * c.r, c.weight_type)),
        scale(random(n, DType::kFloat32)),
        y(c.slots ? h : Array(h.count(), c.h_type)),
        dh(c.slots ? grad : Array(h.count(), c.h_type)),
        delta(n * c.r, wide),
        s(n * c.r, wide),
        gd(n * c.r, wide),
        gs(n * c.r, wide),
        dR(R.count(), c.weight_type),
        dW(W.count(), c.weight_type),
        db(b.count(), c.weight_type),
        dc(b.count(), c.weight_type) {
    std::uniform_int_distribution<int64_t> some_group(-1, c.groups - 1);
    for (int64_t i = 0; i < n; ++i) {
      // Distinct in a batch row; every fourth slot names none.
      positions.push_back(i % 4 == 3 ? -1 : (3 * (i % slots) + i / slots) % kLength);
      groups.push_back(c.groups > 1 ? some_group(generator) : 0);
    }
    if (!c.slots) {
      for (int64_t i = 0; i < n; ++i) positions[i] = i % slots;
    }
  }

  Array random(int64_t count, DType type, double deviation = 1) {
    std::normal_distribution<double> normal(0, deviation);
    Array out(count, type);
    for (int64_t i = 0; i < count; ++i) out.set(i, normal(generator));
    return out;
  }

  std::mt19937 generator{7};
  int64_t slots, n;
  DType wide;
  Array h, grad, R, W, b, c, scale, y, dh, delta, s, gd, gs, dR, dW, db, dc;
  std::vector<int64_t> positions, groups;
  int64_t seed = 1234567890123;
};

Edit edit_of(const Case& c, Tensors& t) {
  Edit e;
  e.batch = kBatch;
  e.length = kLength;
  e.slots = t.slots;
  e.d = c.d;
  e.r = c.r;
  e.groups = c.groups;
  e.h_type = c.h_type;
  e.accumulator = t.wide;
  e.R = {t.R.data(), c.weight_type};
  e.W = {t.W.data(), c.weight_type};
  e.b = {t.b.data(), c.weight_type};
  if (c.subtract) e.c = {t.c.data(), c.weight_type};
  if (c.slots) e.positions = {t.positions.data(), DType::kInt64, {t.slots, 1}};
  if (c.groups > 1) e.group = {t.groups.data(), DType::kInt64, {t.slots, 1}};
  if (c.scaled) e.scale = {t.scale.data(), DType::kFloat32, {t.slots, 1}};
  if (c.dropout) {
    e.seed = &t.seed;
    e.keep_threshold = 1u << 29;  // of 2^31
    e.keep_scale = 1 / 0.75;
  }
  e.subtract = c.subtract;
  e.activation = c.activation;
  return e;
}

void run(const Case& c, Tensors& t, const cpu::ParallelFor& parallel_for) {
  EditForwardParams forward;
  forward.edit = edit_of(c, t);
  const int64_t strides[2] = {kLength * c.d, c.d};
  const bool copies = !c.slots && c.groups > 1;
  forward.h = {t.h.data(), {strides[0], strides[1]}};
  forward.y = {t.y.data(), {strides[0], strides[1]}};
  forward.delta = t.delta.data();
  if (!forward.edit.linear()) forward.s = t.s.data();
  forward.copy_idle = copies;
  cpu::edit_forward(forward, parallel_for);

  EditBackwardParams backward;
  backward.edit = forward.edit;
  // With positions the rows of dh that are not named already are those of grad, as those of y are of h.
  backward.grad = {c.slots ? t.dh.data() : t.grad.data(), {strides[0], strides[1]}};
  backward.dh = {t.dh.data(), {strides[0], strides[1]}};
  backward.x = forward.h;
  backward.delta = t.delta.data();
  backward.s = forward.s;
  backward.gd = t.gd.data();
  backward.gs = forward.edit.linear() ? t.gd.data() : t.gs.data();
  backward.dR = {t.dR.data(), c.weight_type, false};
  backward.dW = {t.dW.data(), c.weight_type, false};
  backward.db = {t.db.data(), c.weight_type, false};
  if (c.subtract) backward.dc = {t.dc.data(), c.weight_type, false};
  backward.copy_idle = copies;
  cpu::edit_backward(backward, parallel_for);
}

using Doubles = std::vector<double>;

struct Expected {
  Doubles y, dh, delta, dR, dW, db, dc;
};

Doubles doubles(const Array& array) {
  Doubles out(array.count());
  for (size_t i = 0; i < out.size(); ++i) out[i] = array[static_cast<int64_t>(i)];
  return out;
}

// The formulas of reft_kernels/reference.py, one slot after the other.
Expected expected(const Case& c, Tensors& t) {
  Expected out{doubles(t.h),         doubles(t.grad),      Doubles(t.n * c.r),  Doubles(t.R.count()),
               Doubles(t.W.count()), Doubles(t.b.count()), Doubles(t.b.count())};
  const Edit e = edit_of(c, t);
  for (int64_t n = 0; n < t.n; ++n) {
    if (t.positions[n] < 0 || t.groups[n] < 0) continue;
    const int64_t row = n / t.slots * kLength + t.positions[n], ranks = t.groups[n] * c.r;
    const double scale = c.scaled ? t.scale[n] : 1;
    Doubles factor(c.d, 1.0);
    for (int64_t j = 0; c.dropout && j < c.d; ++j) {
      const uint32_t word = philox(t.seed, row, static_cast<uint32_t>(j / 4)).word[j % 4];
      factor[j] = word >> 1 >= e.keep_threshold ? e.keep_scale : 0;
    }
    const auto x = [&](int64_t j) { return t.h[row * c.d + j]; };
    const auto g = [&](int64_t j) { return t.grad[row * c.d + j] * factor[j]; };
    for (int64_t j = 0; j < c.d; ++j) out.dh[row * c.d + j] = g(j);
    for (int64_t k = 0; k < c.r; ++k) {
      const int64_t weight = (ranks + k) * c.d;
      double s = t.b[ranks + k], Rh = c.subtract ? t.c[ranks + k] : 0, gd = 0;
      for (int64_t j = 0; j < c.d; ++j) {
        s += t.W[weight + j] * x(j);
        Rh += t.R[weight + j] * x(j);
        gd += scale * t.R[weight + j] * g(j);
      }
      const double gamma = c.subtract ? 1 : 0;
      const double delta = activate(s, c.activation) - gamma * Rh;
      const double gs = gd * activation_slope(s, c.activation);
      out.delta[n * c.r + k] = delta;
      for (int64_t j = 0; j < c.d; ++j) {
        out.y[row * c.d + j] += scale * t.R[weight + j] * delta;
        out.dh[row * c.d + j] += t.W[weight + j] * gs - gamma * t.R[weight + j] * gd;
        out.dR[weight + j] += scale * delta * g(j) - gamma * gd * x(j);
        out.dW[weight + j] += gs * x(j);
      }
      out.db[ranks + k] += gs;
      out.dc[ranks + k] -= gamma * gd;
    }
    for (int64_t j = 0; j < c.d; ++j) out.y[row * c.d + j] *= factor[j];
  }
  return out;
}

int differences(const Case& c, const char* name, const Array& found, const Doubles& wanted) {
  const double unit = found.type() == DType::kFloat64   ? 1e-12
                      : found.type() == DType::kFloat32 ? 1e-5
                                                        : 1.0 / 256;
  for (int64_t i = 0; i < found.count(); ++i) {
    const double error = std::abs(found[i] - wanted[i]);
    if (!(error <= unit * (4 + std::abs(wanted[i])))) {
      std::printf("%s: %s[%ld] is %.9g, expected %.9g\n", c.name, name, static_cast<long>(i), found[i],
                  wanted[i]);
      return 1;
    }
  }
  return 0;
}

void one_thread(int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  work(0, count);
}

// As many ranges as there is work, the last one first.
void in_pieces(int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  for (int64_t i = count; i-- > 0;) work(i, i + 1);
}

void three_threads(int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) {
    threads.emplace_back([&work, begin = count * i / 3, end = count * (i + 1) / 3] {
      if (begin < end) work(begin, end);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

int faults(const Case& c) {
  Tensors t(c);
  const Expected wanted = expected(c, t);
  Tensors in_threads = t, pieces = t;
  run(c, t, one_thread);
  int found = differences(c, "y", t.y, wanted.y) + differences(c, "delta", t.delta, wanted.delta) +
              differences(c, "dh", t.dh, wanted.dh) + differences(c, "dR", t.dR, wanted.dR) +
              differences(c, "dW", t.dW, wanted.dW) + differences(c, "db", t.db, wanted.db);
  if (c.subtract) found += differences(c, "dc", t.dc, wanted.dc);
  run(c, in_threads, three_threads);
  run(c, pieces, in_pieces);
  for (const Tensors* other : {&in_threads, &pieces}) {
    if (!(t.y == other->y && t.delta == other->delta && t.dh == other->dh && t.dR == other->dR &&
          t.dW == other->dW && t.db == other->db)) {
      std::printf("%s: other bits where the work is cut otherwise\n", c.name);
      ++found;
    }
  }
  return found;
}

}  // namespace
}  // namespace reft_kernels

int main() {
  int found = 0;
  for (const reft_kernels::Case& c : reft_kernels::kCases) found += reft_kernels::faults(c);
  std::printf("%s: %d faults\n", reft_kernels::cpu::instruction_set(), found);
  return found != 0;
}
