// Products of bfloat16 by floats, where the CPU's product of pairs takes as long as four of them: so on those with AMX, where
// from 5 tokens on steps wait for products and not for memory.
//
// 32 numbers become two vectors of 16 floats, the odd ones and the even ones, whose products are exact. Added one after the
// other they round as the CPU rounds pairs; where numbers below the smallest normal one count as zero, as in pairs, bits
// are the same.
#pragma once

#include "avx512.h"

namespace scheinfer {
namespace {

struct Halves {
  __m512 odd, even;
};

struct ByHalves {
  using Weight = Bf16;
  using Input = Bf16;
  using W = Halves;
  using X = Halves;
  using Sum = __m512;
  static constexpr int STEP = 32, TOKENS = 8;
  static constexpr int64_t BLOCK = 2048;  // as of pairs
  static Sum zero() { return _mm512_setzero_ps(); }
  static Halves load_weights(const Bf16* p) {
    __m512i raw = _mm512_loadu_si512(p);
    asm("" : "+v"(raw));  // loaded once, not once for each half
    const __m512i odd = _mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000)));
    return {_mm512_castsi512_ps(odd), _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))};
  }
  static Halves load_input(const Bf16* p) { return load_weights(p); }
  static Sum add(Sum sum, W w, X x) { return _mm512_fmadd_ps(w.even, x.even, _mm512_fmadd_ps(w.odd, x.odd, sum)); }
  template <int R>
  static void totals(const Sum* sum, float* out) {
    add_up<R>(sum, out);
  }
};

// While there is one, numbers below the smallest normal one are zero, read or computed, in this thread.
struct NoTinyNumbers {
  const unsigned before = _mm_getcsr();
  NoTinyNumbers() { _mm_setcsr(before | 0x8040); }  // FTZ, DAZ
  ~NoTinyNumbers() { _mm_setcsr(before); }
  NoTinyNumbers(const NoTinyNumbers&) = delete;
};

[[gnu::noinline]] void dots_by_halves(const void* w, int64_t rows, int64_t K, const void* const* x, int64_t tokens,
                                      float* out, int64_t out_stride, const void* later, float* scratch) {
  dots<ByHalves>(w, rows, K, x, tokens, out, out_stride, later, scratch);
}

// Of few tokens the fewer instructions of pairs, then halves: the same bits for any number of them.
void dots_of_few(const void* w, int64_t rows, int64_t K, const void* const* x, int64_t tokens, float* out,
                 int64_t out_stride, const void* later, float* scratch) {
  static const auto dots_by_pairs = avx512_bf16_kernels(BF16)->dots;
  constexpr int64_t FASTER = 5;  // tokens from which on halves are
  const NoTinyNumbers here;
  const auto dots_of_tokens = tokens < FASTER ? dots_by_pairs : dots_by_halves;
  dots_of_tokens(w, rows, K, x, tokens, out, out_stride, later, scratch);
}

}  // namespace
}  // namespace scheinfer
