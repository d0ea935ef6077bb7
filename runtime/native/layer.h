// A decoder layer as one call takes it; runtime/native/layer.py lays down the same words in the same order.
#pragma once

#include <cstdint>

namespace scheinfer {

// How latent attention rotates: halves of a row by the two tables, pairs of neighbours that end up in two halves, or pairs
// that stay neighbours, by one table of float32 in which cosine and sine of each pair are neighbours, too.
enum Turns : int64_t { HALVES = 0, PAIRS_APART = 1, PAIRS = 2 };

// What an expert's weight is: its share of a softmax of all logits, of its own logit's sigmoid, of a softmax of those
// within reach of the best (PhiMoE's two experts), or of a softmax of those chosen.
enum Routing : int64_t { SOFTMAX = 0, SIGMOID = 1, SPARSE_MIXER = 2, SOFTMAX_OF_CHOSEN = 3 };

struct Layer {
  int64_t dtype, isa, act, width, n_heads, n_kv_heads, head_width;
  double input_eps, post_eps, head_eps, scale, clip;  // clip: infinity where queries, keys and values are not clipped
  const void *input_norm, *post_norm, *query, *key, *value, *query_bias, *key_bias, *value_bias;
  const void *query_norm, *key_norm;  // null where heads have no norms
  int64_t norms_whole;                // whether one norm spans all heads of a row
  // Latent attention where `latent` is set: head_width is that of what is rotated, query_norm that of what query_down
  // makes, if there is one, key_norm the latents'; query_rank is 0 without it.
  const void *query_down, *query_down_bias, *latent, *latent_bias, *expand;
  int64_t query_rank, latent_width, pass_width, value_width, turns;
  const void* sinks;  // of each head a score beside those of keys (kernel.h); null: none
  int64_t window;     // keys that a token sees at most; 0: all
  const void *output, *output_bias;
  const void* router;  // null for a dense MLP: one expert for all rows
  int64_t n_experts, top_k, normalises, rounds;  // rounds: weights of experts, to dtype
  int64_t routing, wide_logits;                  // wide: float32, as of rows and weights in float32
  const void* router_bias;                       // null for none
  const float* correction;                       // added to scores for the choice alone; null for none
  int64_t n_groups, top_groups;                  // of experts, and those of them that are chosen from; 0 for no groups
  double scaling, jitter;                        // of weights; half of what PhiMoE's experts may be worse by
  const void *input_norm_bias, *post_norm_bias;  // null: root mean square norms, else layer norms
  int64_t norms_once;                            // whether root mean square norms are rounded once, after their weight
  const void* down_bias;                         // [n_experts, width], what an expert adds to its rows; null: nothing
  int64_t n_pieces;
  const int64_t* experts;  // gate, up, down, columns and bias of each piece of each expert
  const void *shared_gate, *shared_up, *shared_down;  // null: no expert for all rows beside those chosen
  const void* shared_weight;                          // null: added as it is
  int64_t shared_columns;
  // What changes from call to call.
  int64_t rows, n_new, n_past;  // rows: n_new tokens of each sequence, which it goes on with
  const void* x;                // [rows, width]
  void* y;
  const void *cosine, *sine;  // [rows, head_width], or one row for all
  int64_t table_stride;
  int64_t n_dropped;  // of n_past tokens, those that the buffers hold no more
  // Latents and what is rotated side by side; or buffers with room for the tokens held and n_new more. Strides in elements
  // of sequence, head and token.
  void *keys, *values;
  int64_t key_strides[3], value_strides[3];
  int64_t* counts;    // found: rows of each expert
  int64_t times[3];  // found: when the call began, when the MLP did, when all was done; ns of the monotonic clock
};

// All layers of a step, one after the other on the same rows. What is said here goes for each of them.
struct Layers {
  Layer* const* layers;  // of which keys, values and their strides are set
  int64_t n_layers, rows, n_past;
  const void* x;  // [rows, width]
  void* y;        // what the last norm makes of the last layer's sum
  const void *cosine, *sine;
  int64_t table_stride;
  const void *norm, *norm_bias;
  double eps;
  int64_t n_done;  // found: layers computed
};

// A whole step: token ids to logits. Of the layers all but what is the same for each of them in a call is set.
struct Forward {
  Layers layers;  // of which n_layers, rows, n_past, norm and eps are set, too
  const int64_t* ids;        // [rows]
  const int64_t* positions;  // [rows], or one for all where position_stride is 0; null: n_past
  int64_t position_stride;
  const int64_t* mask;  // n_mask numbers, none of them 0 where this call computes the step
  int64_t n_mask;
  const void* embedding;  // [vocab, width]
  int64_t vocab;
  const void *cosines, *sines;  // [n_positions, head_width] each, of the positions from first_position on
  int64_t first_position, n_positions;
  const void *head, *head_bias;  // [n_logits, width], [n_logits] or null
  int64_t n_logits;
  void* logits;      // [rows, n_logits]
  int64_t* times;    // found: when it began, when the embedding was there, when the MLP of each layer began and ended,
  int64_t n_parts;   // when the head was there; found: parts of the step that were computed, embedding and head with them
};

}  // namespace scheinfer
