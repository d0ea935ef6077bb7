// Which experts compute a row, and with what weights: the routers of all families (runtime/router.py reads them).
#pragma once

#include <cstdint>

#include "layer.h"

namespace scheinfer {

// Of a layer's rows x [S, width]: chosen and weights [S, top_k]. logits: room for [S, n_experts] of float32. beside: words
// of n_beside projections of the same rows, as scheinfer_linear takes them. Returns what that does.
int route(const Layer& l, const void* x, int64_t S, char* logits, const int64_t* beside, int64_t n_beside,
          int64_t* chosen, float* weights, int n_threads);

}  // namespace scheinfer
