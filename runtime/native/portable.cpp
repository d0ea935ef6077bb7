// Any CPU: vectors of four floats, as compilers for every machine of the last twenty years can make them.
#include "step.h"

namespace scheinfer {
namespace {

typedef float Four __attribute__((vector_size(16)));

template <class Element>
struct Portable {
  using Weight = Element;
  using Input = float;
  using Widened = Portable<float>;
  using W = Four;
  using X = Four;
  using Sum = Four;
  static constexpr int STEP = 4, TOKENS = 2;
  static constexpr int64_t BLOCK = 1024;
  static Sum zero() { return Four{0, 0, 0, 0}; }
  static W load_weights(const Weight* p) { return Four{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
  static X load_input(const Input* p) { return Four{p[0], p[1], p[2], p[3]}; }
  static Sum add(Sum sum, W w, X x) { return sum + w * x; }
  static void widen_row(const Weight* from, int64_t n, float* to) {
    for (int64_t k = 0; k < n; k++) to[k] = widen(from[k]);
  }
  template <int R>
  static void totals(const Sum* sum, float* out) {
    for (int r = 0; r < R; r++) out[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
  }
};

}  // namespace

const Kernels* portable_kernels(int dtype) {
  if (dtype == BF16) return kernels_of<Portable<Bf16>>();
  if (dtype == F16) return kernels_of<Portable<F16bits>>();
  return kernels_of<Portable<float>>();
}

}  // namespace scheinfer
