// One dense projection of few rows: y[t][r] = x[t] . w[r] + bias[r], rows of W shared out, sums in float32.
#include "rows.h"

namespace scheinfer {
namespace {

struct Projection {
  const Kernels* k;
  const char *w, *bias;  // bias: null for none
  char* y;
  int64_t K, N, S, weight_bytes, at_once, x_stride;
  const char* x;
};

void project(void* context, int64_t index) {
  const Projection& p = *static_cast<const Projection*>(context);
  Scratch& s = scratch();
  const int64_t first = index * p.at_once, left = p.N - first, n = left < p.at_once ? left : p.at_once;
  const char* w = p.w + first * p.K * p.weight_bytes;
  const char* later = left >= 2 * p.at_once ? w + p.at_once * p.K * p.weight_bytes : nullptr;
  float bias[MOST_ROWS + PAD] = {};
  if (p.bias) p.k->widen_row(p.bias + first * p.weight_bytes, n, bias);
  for (int64_t t0 = 0; t0 < p.S; t0 += TOKENS_AT_ONCE) {
    const int64_t rest = p.S - t0, tokens = rest < TOKENS_AT_ONCE ? rest : TOKENS_AT_ONCE;
    const void* x[TOKENS_AT_ONCE];
    for (int64_t t = 0; t < tokens; t++) x[t] = p.x + (t0 + t) * p.x_stride;
    p.k->dots(w, n, p.K, x, tokens, s.one, MOST_ROWS, later, s.wide);
    for (int64_t t = 0; t < tokens; t++) {
      float* row = s.one + t * MOST_ROWS;
      for (int64_t i = 0; i < n; i++) row[i] += bias[i];
      p.k->store_row(row, n, p.y + ((t0 + t) * p.N + first) * p.weight_bytes);
    }
  }
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

// x [S, K], w [N, K], bias [N] or null, y [S, N], all of one dtype. 0, or 1 without memory, 2 without that
// instruction set.
extern "C" int scheinfer_linear(const void* x, const void* w, const void* bias, void* y, int64_t S, int64_t K,
                                int64_t N, int dtype, int isa, int n_threads) {
  static thread_local Aligned memory;
  try {
    const Kernels* k = kernels(isa, dtype);
    if (!k) return 2;
    const int64_t bytes = dtype == F32 ? 4 : 2, stride = stride_of(K, k->activation_bytes);
    char* rows = memory.at_least(size_t(S * stride));
    for (int64_t s = 0; s < S; s++) k->load_row(static_cast<const char*>(x) + s * K * bytes, K, rows + s * stride);
    Projection p{k, static_cast<const char*>(w), static_cast<const char*>(bias), static_cast<char*>(y),
                 K, N, S, bytes, rows_at_once(N, n_threads), stride, rows};
    parallel(n_threads, (N + p.at_once - 1) / p.at_once, project, &p);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
