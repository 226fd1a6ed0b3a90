// What a step computes between its products: norms, activations, residual sums; and the order of all.
//
// Every thread of the team runs each function. Rows, panels of outputs or heads are shared out among them, and they wait
// for each other before what others wrote is read.
#pragma once

#include <cmath>

#include "attention.h"
#include "products.h"
#include "threads.h"
#include "timer.h"

namespace kodalle {

// ------------------------------------------------------------------------------------------------------ rows

inline void normalise(const float* x, const LayerNorm& norm, int C, float* out) {
  Floats total = all(0.0f);
  for (int c = 0; c < C; c += kLanes) total += load(x + c);
  const Floats mean = all(sum(total) / static_cast<float>(C));
  Floats squares = all(0.0f);
  for (int c = 0; c < C; c += kLanes) {
    const Floats off = load(x + c) - mean;
    squares = fma(off, off, squares);
  }
  const Floats scale = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(C) + norm.epsilon));
  for (int c = 0; c < C; c += kLanes) store(out + c, fma((load(x + c) - mean) * scale, load(norm.weight + c), load(norm.bias + c)));
}

// A head's vector with a root mean square of 1, times `gain`.
inline void normalise_head(float* x, int D, float epsilon, float gain) {
  Floats squares = all(0.0f);
  for (int d = 0; d < D; d += kLanes) squares = fma(load(x + d), load(x + d), squares);
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(D) + epsilon) * gain;
  for (int d = 0; d < D; d += kLanes) store(x + d, load(x + d) * all(scale));
}

inline Floats gelu(Floats x) { return x * all(0.5f) * (all(1.0f) + erf(x * all(0.70710678118654752f))); }
inline Floats quick_gelu(Floats x) { return x / (all(1.0f) + exp(x * all(-1.702f))); }

// ------------------------------------------------------------------------------------------------------ the step

// A step's rows and what is computed of them. R rows; K the widest input of a linear layer.
struct Pass {
  int num_rows, num_runs;
  int64_t widest;
  float* x;         // (R, C)
  float* start;     // (R, C), the first layer's input
  float* qkv;       // (R, 3 H D)
  float* attended;  // (R, H D)
  float* grown;     // (R, F)
  Inputs normed;    // of the qkv and grow products
  Inputs inner;     // of the out and shrink products
  int* run_starts;  // (num_runs + 1,) first row of each sequence
};

// What each thread has for itself.
struct Own {
  float* row;        // (widest,)
  uint8_t* rounded;  // (widest,)
  float* panels;     // (2, R, 16)
  float* scores;     // (kQueries, positions)
};

struct Step {
  const Model& model;
  const Cache& cache;
  const Prefixes& prefixes;
  const Feed& feed;
  const Pass& pass;
  const Own& own;
  int thread;
  Team& team;
  Timer& timer;

  void run() const {
    embed();
    for (int number = 0; number < model.num_layers; ++number) {
      const Layer& layer = model.layers[number];
      normalise_rows(layer, layer.attention_norm, layer.qkv.kind, model.mixes != 0);
      wait();
      project(layer.qkv);
      wait(kQkvPart);
      attend_heads(number, layer.out.kind);
      wait(kAttentionPart);
      if (layer.out.kind != kFloat32) {
        put_rows(layer.out.kind, pass.attended, model.num_heads * model.head_dim);
        wait(kQuantisePart);
      }
      add_product(layer.out);
      wait(kOutPart);
      normalise_rows(layer, layer.feed_forward_norm, layer.grow.kind, false);
      wait();
      grow(layer);
      wait(kGrowPart);
      if (layer.shrink.kind != kFloat32) {
        put_rows(layer.shrink.kind, pass.grown, model.inner_dim);
        wait(kQuantisePart);
      }
      add_product(layer.shrink);
      wait(kShrinkPart);
    }
    const Share rows(pass.num_rows, thread, team);
    for (int r = rows.first; r < rows.last; ++r)
      std::memcpy(feed.hidden + feed.hidden_rows[r] * model.dim, pass.x + static_cast<int64_t>(r) * model.dim, model.dim * sizeof(float));
  }

 private:
  void wait() const {
    team.wait();
    timer.lap(kWaitPart);
  }

  void wait(Part part) const {  // after `part`
    timer.lap(part);
    wait();
  }

  // A thread embeds the rows that it normalises next.
  void embed() const {
    const int C = model.dim;
    const Share rows(pass.num_rows, thread, team);
    for (int r = rows.first; r < rows.last; ++r) {
      float* x = pass.x + static_cast<int64_t>(r) * C;
      const float* token = model.tokens + feed.tokens[r] * C;
      const float* position = model.positions + feed.positions[r] * C;
      for (int c = 0; c < C; c += kLanes) store(x + c, load(token + c) + load(position + c));
      if (model.mixes) std::memcpy(pass.start + static_cast<int64_t>(r) * C, x, C * sizeof(float));
    }
  }

  void normalise_rows(const Layer& layer, const LayerNorm& norm, int32_t kind, bool mixes) const {
    const int C = model.dim;
    const Tiles tiles(kind, pass.num_rows);
    const Share rows(pass.num_rows, thread, team);
    for (int r = rows.first; r < rows.last; ++r) {
      float* x = pass.x + static_cast<int64_t>(r) * C;
      const float* start = pass.start + static_cast<int64_t>(r) * C;
      if (mixes)
        for (int c = 0; c < C; c += kLanes) store(x + c, load(x + c) * all(layer.keep) + load(start + c) * all(layer.add));
      normalise(x, norm, C, own.row);
      timer.lap(kNormPart);
      put_row(kind, tiles, r, own.row, C, own.rounded, pass.normed);
      timer.lap(kQuantisePart);
    }
  }

  void put_rows(int32_t kind, const float* from, int width) const {
    const Tiles tiles(kind, pass.num_rows);
    const Share rows(pass.num_rows, thread, team);
    for (int r = rows.first; r < rows.last; ++r)
      put_row(kind, tiles, r, from + static_cast<int64_t>(r) * width, width, own.rounded, pass.inner);
  }

  // Part of a row of the inner float32 inputs (R, K): inputs k .. k + count - 1.
  void put_part(const float* values, int row, int k, int count, int K) const {
    const Tiles tiles(kFloat32, pass.num_rows);
    const int tile = tiles.of(row), first = tiles.first(tile), height = tiles.first(tile + 1) - first;
    float* packed = reinterpret_cast<float*>(pass.inner.packed) + static_cast<int64_t>(first) * K;
    put_floats(values, count, row - first, height, reinterpret_cast<uint8_t*>(packed + static_cast<int64_t>(k) * height));
  }

  template <typename Use>
  void each_panel(const Linear& linear, const Inputs& inputs, const Use& use) const {
    const Tiles tiles(linear.kind, pass.num_rows);
    const Share panels(linear.outputs / kLanes, thread, team);
    for (int p = panels.first; p < panels.last; ++p) {
      multiply_panel(linear, p, tiles, inputs, own.panels, p + 1 < panels.last ? panel_at(linear, p + 1) : nullptr);
      for (int r = 0; r < pass.num_rows; ++r) use(r, p * kLanes, load(own.panels + r * kLanes));
    }
  }

  void project(const Linear& qkv) const {
    each_panel(qkv, pass.normed, [&](int r, int n, Floats y) { store(pass.qkv + static_cast<int64_t>(r) * qkv.outputs + n, y); });
  }

  void add_product(const Linear& linear) const {
    each_panel(linear, pass.inner, [&](int r, int n, Floats y) {
      float* x = pass.x + static_cast<int64_t>(r) * model.dim + n;
      store(x, load(x) + y);
    });
  }

  void grow(const Layer& layer) const {
    const int F = model.inner_dim;
    const auto keep = [&](int r, int n, Floats y) {
      if (layer.shrink.kind != kFloat32) return store(pass.grown + static_cast<int64_t>(r) * F + n, y);
      alignas(64) float sixteen[kLanes];
      store(sixteen, y);
      put_part(sixteen, r, n, kLanes, F);
    };
    if (model.activation == kGelu) return each_panel(layer.grow, pass.normed, [&](int r, int n, Floats y) { keep(r, n, gelu(y)); });
    if (model.activation == kQuickGelu) return each_panel(layer.grow, pass.normed, [&](int r, int n, Floats y) { keep(r, n, quick_gelu(y)); });
    const Tiles tiles(layer.grow.kind, pass.num_rows);
    const Share panels(F / kLanes, thread, team);
    float* gates = own.panels + static_cast<int64_t>(pass.num_rows) * kLanes;
    for (int p = panels.first; p < panels.last; ++p) {
      multiply_panel(layer.grow, p, tiles, pass.normed, own.panels, panel_at(layer.grow, p + F / kLanes));
      multiply_panel(layer.grow, p + F / kLanes, tiles, pass.normed, gates, p + 1 < panels.last ? panel_at(layer.grow, p + 1) : nullptr);
      timer.lap(kGrowPart);
      for (int r = 0; r < pass.num_rows; ++r) keep(r, p * kLanes, load(own.panels + r * kLanes) * gelu(load(gates + r * kLanes)));
      timer.lap(kActivationPart);
    }
  }

  void attend_heads(int number, int32_t kind) const {
    const Share tasks(model.num_heads * pass.num_runs, thread, team);
    for (int task = tasks.first; task < tasks.last; ++task) attend_run(number, task / pass.num_runs, task % pass.num_runs, kind);
  }

  // A head of the rows of one sequence: keys and values of all are kept before the first row reads them.
  void attend_run(int number, int head, int run, int32_t kind) const {
    const int D = model.head_dim, H = model.num_heads, first = pass.run_starts[run], last = pass.run_starts[run + 1];
    const int64_t sequence = feed.sequences[first];
    const int64_t place = (static_cast<int64_t>(number) * cache.num_sequences + sequence) * H + head;
    const int64_t size = static_cast<int64_t>(cache.num_blocks) * kLanes * D;
    float *keys = cache.keys + place * size, *values = cache.values + place * size;
    for (int r = first; r < last; ++r) keep_key_and_value(r, head, keys, values);
    const int64_t prefix_blocks = num_blocks(cache.num_prefix);
    const Positions prefix{
        prefixes.keys[sequence] + (static_cast<int64_t>(number) * H + head) * prefix_blocks * D * kLanes,
        prefixes.values[sequence] + number * prefixes.values_per_layer[sequence] + static_cast<int64_t>(head) * cache.num_prefix * D};
    const int64_t stride = (prefix_blocks + cache.num_blocks) * kLanes;
    for (int from = first; from < last; from += kQueries) {
      const int count = last - from < kQueries ? last - from : kQueries;
      Queries queries;
      for (int i = 0; i < count; ++i) {
        float* q = pass.qkv + static_cast<int64_t>(from + i) * 3 * H * D + head * D;
        if (model.normalises_heads) normalise_head(q, D, model.head_epsilon, model.query_gain);
        queries.q[i] = q;
        queries.out[i] = pass.attended + static_cast<int64_t>(from + i) * H * D + head * D;
        queries.own[i] = static_cast<int>(feed.positions[from + i]) + 1;
      }
      attend(count, queries, prefix, cache.num_prefix, {keys, values}, D, own.scores, stride);
      if (kind == kFloat32)
        for (int i = 0; i < count; ++i) put_part(queries.out[i], from + i, head * D, D, H * D);
    }
  }

  void keep_key_and_value(int r, int head, float* keys, float* values) const {
    const int D = model.head_dim, H = model.num_heads;
    const int64_t position = feed.positions[r];
    float* key = pass.qkv + static_cast<int64_t>(r) * 3 * H * D + (H + head) * D;
    if (model.normalises_heads) normalise_head(key, D, model.head_epsilon, 1.0f);
    float* to = keys + position / kLanes * D * kLanes + position % kLanes;
    for (int d = 0; d < D; ++d) to[d * kLanes] = key[d];
    std::memcpy(values + position * D, key + H * D, D * sizeof(float));
  }
};

}  // namespace kodalle
