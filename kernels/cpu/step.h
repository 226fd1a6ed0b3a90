// The C interface: a decode step of the transformer, over packed weights and a KV cache. Shapes in C order.
//
// R rows computed, C model dim, H heads, D head dim, F feed-forward inner dim, V image vocabulary, L layers, S sequences in
// the cache, P prefix positions, N own positions. All floating-point numbers are float32. C, H D, F, D and V are
// multiples of 16.
//
// A row is one position of one sequence. Its bits depend on nothing but its sequence's tokens: not on the other rows,
// the number of threads or the instruction set.
#pragma once

#include <cstdint>

extern "C" {

enum WeightKind : int32_t { kFloat32 = 0, kInt8 = 1, kInt4 = 2 };
enum Activation : int32_t { kGeglu = 0, kGelu = 1, kQuickGelu = 2 };

// A linear layer of K inputs and N outputs, packed by kodalle_pack.
struct Linear {
  int32_t kind;
  int32_t inputs;
  int32_t outputs;
  const uint8_t* panels;
  const float* scales;  // (N,) of an output's integers; int8 alone
  const float* bias;    // (N,) or null
};

struct LayerNorm {
  const float* weight;  // (C,)
  const float* bias;    // (C,)
  float epsilon;
};

struct Layer {
  LayerNorm attention_norm;
  Linear qkv;
  Linear out;
  LayerNorm feed_forward_norm;
  Linear grow;    // C -> [value: F | gate: F], or F without a gate
  Linear shrink;  // F -> C
  float keep;     // x <- keep * x + add * the first layer's input; 1 and 0 where there are no such scalars
  float add;
};

struct Model {
  int32_t dim, num_layers, num_heads, head_dim, inner_dim;  // C, L, H, D, F
  int32_t activation;
  int32_t normalises_heads;  // queries and keys have a root mean square of 1
  int32_t mixes;             // layers have keep and add
  float query_gain;          // of queries, where heads are normalised
  float head_epsilon;
  const Layer* layers;
  const float* tokens;     // (V, C)
  const float* positions;  // (N + 1, C)
  LayerNorm head_norm;
  Linear head;  // C -> V
};

struct Cache {
  int32_t num_sequences;  // S
  int32_t num_blocks;     // of 16 own positions
  int32_t num_prefix;     // P
  float* keys;            // (L, S, H, num_blocks, D, 16)
  float* values;          // (L, S, H, num_blocks * 16, D)
};

// Where each sequence's caption lies; S entries each, null where no sequence is.
struct Prefixes {
  const float* const* keys;        // each (L, H, ceil(P / 16), D, 16), positions beyond P zero
  const float* const* values;      // each (H, P, D) of the first layer
  const int64_t* values_per_layer;  // from one layer's values to the next one's
};

// Feeds R tokens through the layers. Rows of one sequence follow one another, at ascending positions.
struct Feed {
  int32_t num_rows;
  const int64_t* tokens;      // (R,)
  const int64_t* sequences;   // (R,) in the cache
  const int64_t* positions;   // (R,) own positions, where their keys and values go
  const int64_t* hidden_rows;  // (R,) rows of `hidden` that are written
  float* hidden;              // (.., C) the last layer's output
};

// Logits of what comes after `num_rows` outputs of the last layer.
struct Predict {
  int32_t num_rows;
  const float* hidden;           // (.., C)
  const int64_t* rows;           // (num_rows,) of `hidden`
  const int64_t* unconditional;  // (num_rows,) the same of their unconditional sequences; -1: no guidance
  const float* guidance;         // (num_rows,) scales
  float* logits;                 // (num_rows, V)
};

// Samples one token a row: argmax(scores / temperature + Gumbel noise), ties to the lowest id.
struct Sample {
  int32_t num_rows;
  int32_t num_tokens;      // V
  const float* scores;     // (num_rows, V) logits; -inf where a filter removed them
  const float* temperature;  // (num_rows,); 0: no noise
  const int64_t* seeds;
  const int64_t* candidates;
  const int64_t* positions;
  int64_t* tokens;    // (num_rows,)
  uint8_t* is_close;  // (num_rows,) whether another token's score is so near that rounding may decide
};

// Where a call's time goes.
enum Part : int32_t {
  kNormPart,  // and embedding
  kQuantisePart,
  kQkvPart,
  kAttentionPart,
  kOutPart,
  kGrowPart,
  kActivationPart,  // GEGLU alone: others are counted as kGrowPart
  kShrinkPart,
  kHeadPart,
  kSamplingPart,
  kWaitPart,  // for other threads
  kNumParts,
};

__attribute__((visibility("default"))) int32_t kodalle_interface();
// From now on calls add the time of each thread to `nanoseconds`, (threads, kNumParts). Null: they do not look at the clock.
__attribute__((visibility("default"))) void kodalle_time(int64_t* nanoseconds);
__attribute__((visibility("default"))) int64_t kodalle_packed_bytes(int32_t kind, int64_t outputs, int64_t inputs);
__attribute__((visibility("default"))) void kodalle_pack(int32_t kind, int64_t outputs, int64_t inputs, const void* weight, const float* group_scales, uint8_t* panels);
__attribute__((visibility("default"))) void kodalle_multiply(const Linear* linear, int32_t num_rows, const float* x, float* y, int32_t num_threads);
__attribute__((visibility("default"))) void kodalle_feed(const Model* model, const Cache* cache, const Prefixes* prefixes, const Feed* feed, int32_t num_threads);
__attribute__((visibility("default"))) void kodalle_predict(const Model* model, const Predict* predict, int32_t num_threads);
__attribute__((visibility("default"))) void kodalle_sample(const Sample* sample, int32_t num_threads);

}  // extern "C"
