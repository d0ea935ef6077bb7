// AVX-512F: sixteen floats.
#include "avx512.h"
#include "panel.h"

namespace scheinfer {

const Kernels* avx512_kernels(int dtype) {
  if (dtype == BF16) return panel_kernels_of<Avx512<Bf16>>();
  if (dtype == F16) return panel_kernels_of<Avx512<F16bits>>();
  return panel_kernels_of<Avx512<float>>();
}

}  // namespace scheinfer
