// AVX-512F: sixteen floats.
#include "avx512.h"
#include "panel.h"

namespace scheinfer {

namespace {

// Of 8 tokens at once: two tiles of 4 widen weights twice, and wait for that. (Of 7 one tile is slower than two.)
template <class Element>
struct Wider : Avx512<Element> {
  static constexpr int TOKENS = 8;
};

template <class Element>
void dots_of_narrow(const void* w, int64_t rows, int64_t K, const void* const* x, int64_t tokens, float* out,
                    int64_t out_stride, const void* later, float* scratch) {
  const bool wider = tokens == Wider<Element>::TOKENS;
  (wider ? dots<Wider<Element>> : dots<Avx512<Element>>)(w, rows, K, x, tokens, out, out_stride, later, scratch);
}

template <class Element>
const Kernels* narrow_kernels_of() {
  static const Kernels found = [] {
    Kernels k = *panel_kernels_of<Avx512<Element>>();
    k.dots = dots_of_narrow<Element>;
    return k;
  }();
  return &found;
}

}  // namespace

const Kernels* avx512_kernels(int dtype) {
  if (dtype == BF16) return narrow_kernels_of<Bf16>();
  if (dtype == F16) return narrow_kernels_of<F16bits>();
  return panel_kernels_of<Avx512<float>>();
}

}  // namespace scheinfer
