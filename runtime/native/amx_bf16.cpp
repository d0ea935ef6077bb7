// AMX: tiles of 16 rows of W times 16 tokens. Few tokens and other dtypes are those of AVX-512 with bfloat16, but where
// halves.h is faster.
//
// W is the first operand as it lies, 32 weights of a row beside each other; tokens are the second, packed by pairs. So
// weights are never transposed, and what comes out as [row of W][token] is, of gate and up, already the order in which
// down's product reads it. Two tiles of W by two of tokens: a strip of 32 rows by 512 of K stays in the first cache (32
// KiB), tokens are loaded past it from the second, where they stay while strips pass, all of K or 256 of them by 512 of it:
// the third cache gives each core a tile in the time of seven products. Sums run through K in one order, whatever the
// other tokens.
#include "kernel.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "amx.h"
#include "amx_prompt.h"
#include "halves.h"

namespace scheinfer {
namespace {

// -- products --------------------------------------------------------------------------------------------------------

constexpr int64_t STAYING_BYTES = 1 << 20;  // of tokens that stay in the second cache while strips pass

// Lines of what is needed next, in the order in which it is: of all rows a line, then of all rows the next. Fetched into the
// second cache a few at a time.
struct Ahead {
  const char *at, *other;
  int64_t line = 0, row = 0, n_lines, n_first, n_rows, stride, each = 0;

  // A strip's block of K.
  Ahead(const Strip& s, int64_t K, int64_t k0)
      : at(s.w[0] + k0 * 2), other(s.w[1] + k0 * 2), n_first(s.rows[0]), n_rows(s.rows[0] + s.rows[1]), stride(K * 2) {
    n_lines = n_rows == 0 ? 0 : ((K - k0 < STRIP_K ? K - k0 : STRIP_K) * 2 + LINE - 1) / LINE;
  }
  void over(int64_t steps) { each = (n_rows * n_lines + steps - 1) / steps; }
  void fetch() {
    for (int64_t n = each; n > 0 && line < n_lines; n--) {
      const char* from = row < n_first ? at + row * stride : other + (row - n_first) * stride;
      _mm_prefetch(from + line * LINE, _MM_HINT_T1);
      if (++row == n_rows) row = 0, line++;
    }
  }
};

// Sums that are done, finished part by part beside tiles that are still multiplied.
struct Finishing {
  const StripProduct& p;
  int64_t strip = 0, block = 0, n_left = 0;
  const float* sums = nullptr;

  void begin(int64_t of_strip, int64_t first, int64_t n_blocks, const float* from) {
    strip = of_strip, block = first, n_left = n_blocks * FINISHES, sums = from;
  }
  void some() {
    if (n_left == 0) return;
    const int part = int(-n_left & (FINISHES - 1));
    p.finish(p.context, strip, block, part, sums);
    if (part == FINISHES - 1) block++, sums += SIDE * STRIP_ROWS;
    n_left--;
  }
  void rest() {
    while (n_left) some();
  }
};

// Weights of a strip, n of K, as [step][16 rows twice][32 weights]; zeros beyond.
void copy_strip(const Strip& s, int64_t stride, int64_t n, char* to) {
  for (int half = 0; half < 2; half++)
    for (int64_t r = 0; r < HALF; r++)
      for (int64_t k = 0; k < n; k += STEP) {
        const __mmask32 some = r < s.rows[half] ? first_of(n - k) : 0;
        const char* from = s.w[half] + (some ? r * stride + k * 2 : 0);
        _mm512_store_si512(to + (k / STEP * 2 + half) * TILE_BYTES + r * LINE, _mm512_maskz_loadu_epi16(some, from));
      }
  written();
}

// Where the weights of some steps of K lie, and are copied to or from.
struct Weights {
  const Strip& strip;
  int64_t stride;
  char* copy;
  int64_t steps;
};

// Sums of a strip's 32 rows and one or two blocks of tokens over some steps of K, from a copy of the weights, or from the
// weights themselves, which are copied meanwhile.
template <bool COPIES, bool TWO>
inline void multiply_blocks(const Weights& w, const char* x, int64_t apart, bool begins, float* sums, Ahead& ahead,
                            Finishing& finishing) {
  constexpr int N = TWO ? 4 : 2;
  const int64_t each = (w.steps + 2 * FINISHES - 1) / (2 * FINISHES), lines = N * TILE_BYTES / LINE / w.steps;
  const char *one = w.strip.w[0], *other = w.strip.w[1], *then = reinterpret_cast<const char*>(sums) + N * TILE_BYTES;
  char* copy = w.copy;
  begin_sums<N>(sums, begins);
  for (int64_t i = 0; i < w.steps; i++, x += TILE_BYTES, copy += 2 * TILE_BYTES) {
    ahead.fetch();
    for (int64_t n = 0; n < lines; n++, then += LINE) _mm_prefetch(then, _MM_HINT_T0);
    if constexpr (COPIES)
      _tile_loadd(4, one + i * LINE, w.stride);
    else
      _tile_loadd(4, copy, LINE);
    _tile_stream_loadd(6, x, LINE);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COPIES)
      _tile_loadd(5, other + i * LINE, w.stride);
    else
      _tile_loadd(5, copy + TILE_BYTES, LINE);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (TWO) {
      _tile_stream_loadd(7, x + apart, LINE);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (COPIES) {
      _tile_stored(4, copy, LINE);
      _tile_stored(5, copy + TILE_BYTES, LINE);
    }
    if ((i + 1) % each == 0) finishing.some();
  }
  finishing.rest();
  store_sums<N>(sums);
}

// Blocks of strips in the order in which they are multiplied. Strips one after the other, each through all of K, as long as
// the tokens stay in the second cache meanwhile; else all strips through one block of K after the other.
struct Order {
  const StripProduct& p;
  bool by_strips;
  int64_t strip = 0, k0 = 0;

  explicit Order(const StripProduct& of) : p(of), by_strips(of.n_blocks * SIDE * of.K * 2 <= STAYING_BYTES) {}
  bool next() {
    if (by_strips) {
      if ((k0 += STRIP_K) < p.K) return true;
      k0 = 0;
      return ++strip < p.n_strips;
    }
    if (++strip < p.n_strips) return true;
    strip = 0;
    return (k0 += STRIP_K) < p.K;
  }
  Ahead ahead() const {
    Order then = *this;
    return then.next() ? Ahead(p.strips[then.strip], p.K, then.k0) : Ahead(p.next, p.next_K, 0);
  }
  bool is_last() const { return k0 + STRIP_K >= p.K; }
  Strip now() const {
    const Strip& s = p.strips[strip];
    return {{s.w[0] + k0 * 2, s.w[1] + k0 * 2}, {s.rows[0], s.rows[1]}};
  }
};

// A block of a strip times all tokens, two blocks of them at a time.
void multiply_block(const StripProduct& p, const Order& at, Finishing& finishing) {
  const int64_t n = at.is_last() ? p.K - at.k0 : STRIP_K, steps = (n + STEP - 1) / STEP;
  const Strip now = at.now();
  const bool whole = now.rows[0] == HALF && now.rows[1] == HALF && n % STEP == 0;
  const Weights w{now, p.K * 2, reinterpret_cast<char*>(p.copy), steps};
  if (!whole) copy_strip(now, w.stride, n, w.copy);
  Ahead ahead = at.ahead();
  ahead.over((p.n_blocks + 1) / 2 * steps);
  const char* x = p.x + packed_at(at.k0, p.K, p.block, p.all_blocks);
  for (int64_t b = 0; b < p.n_blocks; b += 2, x += 2 * steps * TILE_BYTES) {
    float* sums = p.sums + (at.strip * p.n_blocks + b) * SIDE * STRIP_ROWS;
    const bool two = b + 1 < p.n_blocks;
    const auto blocks = whole && b == 0 ? (two ? multiply_blocks<true, true> : multiply_blocks<true, false>)
                                        : (two ? multiply_blocks<false, true> : multiply_blocks<false, false>);
    blocks(w, x, steps * TILE_BYTES, at.k0 == 0, sums, ahead, finishing);
    if (at.is_last()) finishing.begin(at.strip, b, two ? 2 : 1, sums);
  }
}

void multiply(const StripProduct& p) {
  _tile_loadconfig(&shapes);
  Finishing finishing{p};
  Order at(p);
  do {
    multiply_block(p, at, finishing);
  } while (at.next());
  finishing.rest();
  _tile_release();
}

// -- what becomes of sums --------------------------------------------------------------------------------------------

// v / d for d of 1 and more without a division: an estimate of 14 bits, and a step of Newton's.
inline __m512 over(__m512 v, __m512 d) {
  const __m512 about = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(v, _mm512_mul_ps(about, _mm512_fnmadd_ps(d, about, _mm512_set1_ps(2.0f))));
}

template <int ACT>
inline __m512 act_of(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (ACT == SILU) return over(v, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), v))));
  if constexpr (ACT == GELU_TANH) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
    const __m512 z = _mm512_mul_ps(_mm512_set1_ps(0.7978845608f), _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, v));
    return _mm512_sub_ps(v, over(v, _mm512_add_ps(one, exp_of(_mm512_add_ps(z, z)))));
  }
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, v);
  for (float& lane : lanes) lane = act_of(lane, GELU_ERF);
  return _mm512_load_ps(lanes);
}

template <int ACT>
inline __m512 gated(__m512 gate, __m512 up) {
  if constexpr (ACT != CLAMPED_GLU) return _mm512_mul_ps(act_of<ACT>(gate), up);
  const __m512 most = _mm512_set1_ps(7.0f), one = _mm512_set1_ps(1.0f);
  gate = _mm512_min_ps(most, gate);  // in this order NaN remains
  up = _mm512_max_ps(_mm512_set1_ps(-7.0f), _mm512_min_ps(most, up));
  const __m512 steep = exp_of(_mm512_mul_ps(_mm512_set1_ps(-1.702f), gate));
  return _mm512_mul_ps(over(gate, _mm512_add_ps(one, steep)), _mm512_add_ps(up, one));
}

template <int ACT>
void activate_as(const float* sums, int part, int64_t n, const float* bias, char* pairs) {
  constexpr int64_t EACH = HALF / FINISHES;
  const auto row = [=](int64_t r) {
    const __m512 sum = _mm512_load_ps(sums + r * SIDE);
    return bias ? _mm512_add_ps(sum, _mm512_set1_ps(bias[r])) : sum;
  };
  const auto column = [=](int64_t c) { return c < n ? gated<ACT>(row(c), row(HALF + c)) : _mm512_setzero_ps(); };
  for (int64_t c = part * EACH; c < (part + 1) * EACH; c += 2)
    _mm512_store_si512(pairs + c / 2 * LINE, pairs_of(column(c), column(c + 1)));
}

void activate(const float* sums, int part, int64_t n, int act, const float* bias, void* pairs) {
  char* to = static_cast<char*>(pairs);
  if (act == SILU) return activate_as<SILU>(sums, part, n, bias, to);
  if (act == GELU_TANH) return activate_as<GELU_TANH>(sums, part, n, bias, to);
  if (act == CLAMPED_GLU) return activate_as<CLAMPED_GLU>(sums, part, n, bias, to);
  activate_as<GELU_ERF>(sums, part, n, bias, to);
}

static_assert(FINISHES * SIDE == STRIP_ROWS, "a part of a strip's rows is a tile");

void add(const float* sums, int part, int64_t n_rows, int64_t n_tokens, const float* weights, float* const* rows) {
  const int64_t r = part * SIDE;
  alignas(64) __m512i v[SIDE];
  by_token(sums, r, v);
  const __mmask16 some = first16_of(n_rows - r);
  for (int64_t t = 0; t < n_tokens; t++) {
    const __m512 weight = _mm512_set1_ps(weights ? weights[t] : 1.0f), before = _mm512_maskz_loadu_ps(some, rows[t] + r);
    _mm512_mask_storeu_ps(rows[t] + r, some, _mm512_fmadd_ps(weight, _mm512_castsi512_ps(v[t]), before));
  }
}

void store(const float* sums, int part, int64_t n_rows, int64_t n_tokens, const float* bias, char* y, int64_t stride) {
  const int64_t r = part * SIDE;
  alignas(64) __m512i v[SIDE];
  by_token(sums, r, v);
  const __mmask16 some = first16_of(n_rows - r);
  const __m512 more = _mm512_maskz_loadu_ps(some, bias + r);
  for (int64_t t = 0; t < n_tokens; t++)
    _mm256_mask_storeu_epi16(y + t * stride + r * 2, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(
                                                               _mm512_add_ps(_mm512_castsi512_ps(v[t]), more))));
}

}  // namespace

const Kernels* amx_bf16_kernels(int dtype) {
  static const TileKernels tiles{pack, multiply, activate, add, store};
  static const Kernels found = [] {
    Kernels k = *avx512_bf16_kernels(BF16);
    k.dots = dots_of_few;
    k.tiles = &tiles;
    k.pack_keys = pack_keys_as_tiles, k.pack_values = pack_values_as_tiles;
    k.attend_rows = attend_by_tiles, k.attends_at_once = SIDE, k.few_queries = 4;
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
