// AVX-512 with bfloat16: 32 products at once, so activations are bfloat16, too. Other dtypes are AVX-512's.
#include "bf16_rows.h"
#include "panel.h"

namespace scheinfer {
namespace {

struct Two {
  Bf16 one, other;
};

struct Pairs {
  using Weight = Bf16;
  using Input = Bf16;
  using Widened = Pairs;
  using W = __m512bh;
  using X = __m512bh;
  using Sum = __m512;
  static constexpr int STEP = 32, TOKENS = 6;
  static constexpr int64_t BLOCK = 2048;
  static Sum zero() { return _mm512_setzero_ps(); }
  static W load_weights(const Weight* p) { return reinterpret_cast<W>(_mm512_loadu_si512(p)); }
  static X load_input(const Input* p) { return reinterpret_cast<X>(_mm512_loadu_si512(p)); }
  static Sum add(Sum sum, W w, X x) { return _mm512_dpbf16_ps(sum, w, x); }
  static X broadcast(const Input* p) { return reinterpret_cast<X>(_mm512_set1_epi32(bits<int>(*reinterpret_cast<const Two*>(p)))); }
  static __m512i dwords(const Weight* p) { return _mm512_loadu_si512(p); }
  static __m512i columns(const Weight* rows) {  // two rows of 16
    const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows));
    const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 16));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(other), 16));
  }
  static void store16(__m512 v, Input* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  template <int R>
  static void totals(const Sum* sum, float* out) {
    add_up<R>(sum, out);
  }
};

}  // namespace

const Kernels* avx512_bf16_kernels(int dtype) {
  static const Kernels found = [] {
    Kernels k = *panel_kernels_of<Pairs>();
    k.norm_row = norm_bf16_row, k.add_row = add_bf16_row, k.turn_row = turn_bf16_row;
    return k;
  }();
  return dtype == BF16 ? &found : avx512_kernels(dtype);
}

}  // namespace scheinfer
