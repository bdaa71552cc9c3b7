// The plans of launches on several GPUs: what each can be launched with, and that planning is quick enough to
// be done anew at every launch.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>

#include "reft_kernels/edit_plan.h"

namespace reft_kernels {
namespace {

int found = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  ++found;
}

// Stands for a tensor that is there; no plan looks at it.
void* somewhere() {
  return reinterpret_cast<void*>(uintptr_t{0x10000});
}

struct Size {
  int64_t batch, length, slots, d;
};

constexpr Size kSizes[] = {
    {1, 1, 1, 4096}, {32, 512, 14, 4096}, {32, 2048, 2048, 4096}, {4, 100, 100, 577}, {2, 9, 9, 65536}};
constexpr DType kTypes[][2] = {{DType::kFloat32, DType::kFloat32},
                               {DType::kBFloat16, DType::kFloat32},
                               {DType::kFloat16, DType::kFloat16}};
constexpr Device kDevices[] = {{80, 108, 163 << 10, 40 << 20},
                               {86, 72, 99 << 10, 6 << 20},
                               {90, 132, 227 << 10, 50 << 20},
                               {120, 170, 99 << 10, 96 << 20}};

EditForwardParams forward_of(const Size& size, int r, DType h, DType weights, Activation activation) {
  EditForwardParams p;
  p.edit.batch = size.batch;
  p.edit.length = size.length;
  p.edit.slots = size.slots;
  p.edit.d = size.d;
  p.edit.r = r;
  p.edit.h_type = h;
  p.edit.R = p.edit.W = {somewhere(), weights};
  p.edit.activation = activation;
  p.h = {somewhere(), {size.length * size.d, size.d}};
  p.y = {somewhere(), {size.length * size.d, size.d}};
  p.delta = somewhere();
  if (!p.edit.linear()) p.s = somewhere();
  return p;
}

EditBackwardParams backward_of(const EditForwardParams& forward) {
  EditBackwardParams p;
  p.edit = forward.edit;
  p.grad = p.x = forward.h;
  p.dh = forward.y;
  p.delta = p.gd = p.gs = somewhere();
  p.s = forward.s;
  p.dR = p.dW = {somewhere(), forward.edit.R.type, false};
  return p;
}

void check_plans() {
  for (const Device& device : kDevices) {
    for (const Size& size : kSizes) {
      for (const auto& [h, weights] : kTypes) {
        for (const int r : {1, 4, 9, 64}) {
          for (const Activation f : {Activation::kLinear, Activation::kGelu}) {
            const EditForwardParams forward = forward_of(size, r, h, weights, f);
            const Plan there = plan_edit_forward(forward, device);
            const Plan back = plan_edit_backward(backward_of(forward), device);
            const std::string named = "sm_" + std::to_string(device.capability) +
                                      ", N = " + std::to_string(forward.edit.rows()) +
                                      ", d = " + std::to_string(size.d) + ", r = " + std::to_string(r) + ": ";
            for (const Plan& plan : {there, back}) {
              expect(plan.refusal.empty(), named + plan.refusal);
              expect(plan.shared_bytes <= device.shared_bytes, named + "too much shared memory");
              expect(plan.threads > 0 && plan.threads <= 1024 && plan.threads % 32 == 0,
                     named + "odd threads");
              expect(plan.blocks > 0 && plan.blocks % plan.cluster == 0, named + "broken clusters");
              expect(plan.cluster == 1 || device.capability >= 90, named + "no clusters there");
            }
            expect(there.blocks / there.cluster * there.tile_rows >= forward.edit.rows(),
                   named + "rows left over");
            expect(back.blocks <= device.multiprocessors, named + "more blocks than run at once");
          }
        }
      }
    }
  }
}

void check_refusals() {
  EditForwardParams p = forward_of(kSizes[1], 4, DType::kFloat32, DType::kFloat32, Activation::kLinear);
  p.edit.r = 65;
  expect(plan_edit_forward(p, kDevices[2]).refusal.find("65") != std::string::npos, "a rank of 65 is taken");
  p.edit.r = 4;
  p.edit.R.type = DType::kFloat64;
  expect(!plan_edit_forward(p, kDevices[2]).refusal.empty(), "float64 is taken");
}

// The least of many, in nanoseconds.
template <typename Function>
double time_of(const Function& function) {
  using Clock = std::chrono::steady_clock;
  double least = 1e9;
  for (int repetition = 0; repetition < 200; ++repetition) {
    const auto begin = Clock::now();
    for (int i = 0; i < 50; ++i) function();
    least = std::min(least, std::chrono::duration<double, std::nano>(Clock::now() - begin).count() / 50);
  }
  return least;
}

void check_cost() {
  double most = 0;
  for (const Size& size : kSizes) {
    for (const auto& [h, weights] : kTypes) {
      const EditForwardParams forward = forward_of(size, 4, h, weights, Activation::kLinear);
      const EditBackwardParams backward = backward_of(forward);
      most = std::max(most, time_of([&] { plan_edit_forward(forward, kDevices[2]); }));
      most = std::max(most, time_of([&] { plan_edit_backward(backward, kDevices[2]); }));
    }
  }
  std::printf("a plan takes at most %.0f ns\n", most);
#ifdef NDEBUG
  expect(most < 1000, "more than a microsecond: plans are worth keeping");
#endif
}

}  // namespace
}  // namespace reft_kernels

int main() {
  reft_kernels::check_plans();
  reft_kernels::check_refusals();
  reft_kernels::check_cost();
  return reft_kernels::found != 0;
}
