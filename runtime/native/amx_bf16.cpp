// AMX: tiles of 16 rows of W times 16 tokens. Few rows and other dtypes are those of AVX-512 with bfloat16.
//
// W is the first operand as it lies, 32 weights of a row beside each other; tokens are the second, packed by pairs. So
// weights are never transposed, and what comes out as [row of W][token] is, of gate and up, already the order in which
// down's product reads it. Four tiles of W and of sums, one of tokens: 64 rows of W by 256 of K stay in the first
// cache (32 KiB), tokens and partial sums stream through it. Sums run through K in one order, whatever the other tokens.
#include "kernel.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "amx.h"
#include "amx_prompt.h"

namespace scheinfer {
namespace {

// -- products --------------------------------------------------------------------------------------------------------

// Lines of what is needed next, row after row of a block of K, fetched a few at a time.
struct Ahead {
  const char *at, *other;
  int64_t line = 0, n_lines, left, other_left, stride;

  Ahead(const Strip& s, int64_t K, int64_t k0)
      : at(s.w[0] + k0 * 2), other(s.w[1] + k0 * 2), left(s.rows[0]), other_left(s.rows[1]), stride(K * 2) {
    n_lines = ((K - k0 < STRIP_K ? K - k0 : STRIP_K) * 2 + LINE - 1) / LINE;
  }
  int64_t all() const { return (left + other_left) * n_lines; }
  void fetch(int64_t n) {
    for (; n > 0 && left > 0; n--) {
      _mm_prefetch(at + line * LINE, _MM_HINT_T1);
      if (++line < n_lines) continue;
      line = 0, at += stride;
      if (--left == 0) at = other, left = other_left, other_left = 0;
    }
  }
};

// Weights of a strip, n of K, as [step][16 rows four times][32 weights]; zeros beyond.
void copy_strip(const Strip& s, int64_t stride, int64_t n, char* to) {
  for (int half = 0; half < 2; half++)
    for (int64_t r = 0; r < HALF; r++)
      for (int64_t k = 0; k < n; k += STEP) {
        const __mmask32 some = r < s.rows[half] ? first_of(n - k) : 0;
        const char* from = s.w[half] + (some ? r * stride + k * 2 : 0);
        _mm512_store_si512(to + k / STEP * 4 * TILE_BYTES + half * 2 * TILE_BYTES + r * LINE, _mm512_maskz_loadu_epi16(some, from));
      }
  written();
}

// Sums of a strip's 64 rows and one block of tokens over some steps of K, from a copy of the weights, or from the weights
// themselves, which are copied meanwhile.
template <bool COPIES>
inline void multiply_block(const Strip& s, int64_t stride, char* copy, const char* x, int64_t steps, bool begins,
                           float* sums, Ahead& ahead, int64_t each) {
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, LINE);
    _tile_loadd(1, sums + 256, LINE);
    _tile_loadd(2, sums + 512, LINE);
    _tile_loadd(3, sums + 768, LINE);
  }
  const char *one = s.w[0], *two = one + SIDE * stride, *three = s.w[1], *four = three + SIDE * stride;
  for (int64_t i = 0; i < steps; i++, x += TILE_BYTES, copy += 4 * TILE_BYTES) {
    _tile_stream_loadd(6, x, LINE);
    ahead.fetch(each);
    if constexpr (COPIES) {
      _tile_loadd(4, one + i * LINE, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(4, copy, LINE);
      _tile_loadd(5, two + i * LINE, stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_stored(5, copy + TILE_BYTES, LINE);
      _tile_loadd(4, three + i * LINE, stride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_stored(4, copy + 2 * TILE_BYTES, LINE);
      _tile_loadd(5, four + i * LINE, stride);
      _tile_dpbf16ps(3, 5, 6);
      _tile_stored(5, copy + 3 * TILE_BYTES, LINE);
    } else {
      _tile_loadd(4, copy, LINE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, copy + TILE_BYTES, LINE);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, copy + 2 * TILE_BYTES, LINE);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, copy + 3 * TILE_BYTES, LINE);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, sums, LINE);
  _tile_stored(1, sums + 256, LINE);
  _tile_stored(2, sums + 512, LINE);
  _tile_stored(3, sums + 768, LINE);
}

void multiply(const StripProduct& p) {
  _tile_loadconfig(&shapes);
  const int64_t block_bytes = (p.K + STEP - 1) / STEP * TILE_BYTES, stride = p.K * 2;
  char* copy = reinterpret_cast<char*>(p.copy);
  for (int64_t k0 = 0; k0 < p.K; k0 += STRIP_K) {
    const bool last = k0 + STRIP_K >= p.K;
    const int64_t n = last ? p.K - k0 : STRIP_K, steps = (n + STEP - 1) / STEP;
    const Strip now{{p.now.w[0] + k0 * 2, p.now.w[1] + k0 * 2}, {p.now.rows[0], p.now.rows[1]}};
    Ahead ahead = last ? Ahead(p.next, p.next_K, 0) : Ahead(p.now, p.K, k0 + STRIP_K);
    const int64_t each = (ahead.all() + p.n_blocks * steps - 1) / (p.n_blocks * steps);
    const bool whole = now.rows[0] == HALF && now.rows[1] == HALF && n % STEP == 0;
    if (!whole) copy_strip(now, stride, n, copy);
    for (int64_t b = 0; b < p.n_blocks; b++) {
      const char* x = p.x + b * block_bytes + k0 * SIDE * 2;
      float* sums = p.sums + b * SIDE * STRIP_ROWS;
      if (whole && b == 0)
        multiply_block<true>(now, stride, copy, x, steps, k0 == 0, sums, ahead, each);
      else
        multiply_block<false>(now, stride, copy, x, steps, k0 == 0, sums, ahead, each);
      if (last && b) p.finish(p.context, b - 1, sums - SIDE * STRIP_ROWS);  // beside tiles that are still multiplied
    }
  }
  p.finish(p.context, p.n_blocks - 1, p.sums + (p.n_blocks - 1) * SIDE * STRIP_ROWS);
  _tile_release();
}

// -- what becomes of sums --------------------------------------------------------------------------------------------

template <int ACT>
inline __m512 act_of(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (ACT == SILU) return _mm512_div_ps(v, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), v))));
  if constexpr (ACT == GELU_TANH) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
    const __m512 z = _mm512_mul_ps(_mm512_set1_ps(0.7978845608f), _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, v));
    return _mm512_sub_ps(v, _mm512_div_ps(v, _mm512_add_ps(one, exp_of(_mm512_add_ps(z, z)))));
  }
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, v);
  for (float& lane : lanes) lane = act_of(lane, GELU_ERF);
  return _mm512_load_ps(lanes);
}

template <int ACT>
void activate_as(const float* sums, int64_t n, char* pairs) {
  const float* up = sums + HALF * SIDE;
  const auto column = [=](int64_t c) {
    if (c >= n) return _mm512_setzero_ps();
    return _mm512_mul_ps(act_of<ACT>(_mm512_load_ps(sums + c * SIDE)), _mm512_load_ps(up + c * SIDE));
  };
  for (int64_t c = 0; c < HALF; c += 2) _mm512_store_si512(pairs + c / 2 * LINE, pairs_of(column(c), column(c + 1)));
}

void activate(const float* sums, int64_t n, int act, void* pairs) {
  char* to = static_cast<char*>(pairs);
  if (act == SILU) return activate_as<SILU>(sums, n, to);
  if (act == GELU_TANH) return activate_as<GELU_TANH>(sums, n, to);
  activate_as<GELU_ERF>(sums, n, to);
}

void add(const float* sums, int64_t n_rows, int64_t n_tokens, const float* weights, float* const* rows) {
  for (int64_t r = 0; r < n_rows; r += SIDE) {
    alignas(64) __m512i v[SIDE];
    by_token(sums, r, v);
    const __mmask16 some = first16_of(n_rows - r);
    for (int64_t t = 0; t < n_tokens; t++) {
      const __m512 weight = _mm512_set1_ps(weights ? weights[t] : 1.0f), before = _mm512_maskz_loadu_ps(some, rows[t] + r);
      _mm512_mask_storeu_ps(rows[t] + r, some, _mm512_fmadd_ps(weight, _mm512_castsi512_ps(v[t]), before));
    }
  }
}

// Row by row of y: rows are often a multiple of 4 KiB apart, and none would stay in the first cache.
void store(const float* sums, int64_t n_rows, int64_t n_tokens, const float* bias, char* y, int64_t stride) {
  alignas(64) __m512i v[STRIP_ROWS / SIDE][SIDE];
  for (int64_t r = 0; r < n_rows; r += SIDE) by_token(sums, r, v[r / SIDE]);
  for (int64_t t = 0; t < n_tokens; t++)
    for (int64_t r = 0; r < n_rows; r += SIDE) {
      const __mmask16 some = first16_of(n_rows - r);
      const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(v[r / SIDE][t]), _mm512_maskz_loadu_ps(some, bias + r));
      _mm256_mask_storeu_epi16(y + t * stride + r * 2, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
    }
}

}  // namespace

const Kernels* amx_bf16_kernels(int dtype) {
  static const TileKernels tiles{pack, multiply, activate, add, store};
  static const Kernels found = [] {
    Kernels k = *avx512_bf16_kernels(BF16);
    k.tiles = &tiles;
    k.pack_keys = pack_keys_as_tiles, k.pack_values = pack_values_as_tiles;
    k.attend_rows = attend_by_tiles, k.attends_at_once = SIDE;
    return k;
  }();
  return dtype == BF16 ? &found : avx512_kernels(dtype);
}

}  // namespace scheinfer

#else

namespace scheinfer {

const Kernels* amx_bf16_kernels(int) { return nullptr; }

}  // namespace scheinfer

#endif
