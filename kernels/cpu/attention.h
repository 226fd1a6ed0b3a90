// One query over its caption's keys and values and then its sequence's own, one softmax over both.
//
// Keys lie sixteen positions side by side, (blocks, D, 16), so that a lane is a position and no sum crosses lanes but the
// softmax's. Values lie as (positions, D).
#pragma once

#include "lanes.h"

namespace kodalle {

// Positions that a query reads, in order.
struct Positions {
  const float* keys;    // (ceil(count / 16), D, 16)
  const float* values;  // (count, D)
  int count;
};

inline int num_blocks(int positions) { return (positions + kLanes - 1) / kLanes; }

template <int Blocks>
inline void scores_of_blocks(const float* q, const float* keys, int D, float* scores) {
  Floats sums[Blocks];
  for (int b = 0; b < Blocks; ++b) sums[b] = all(0.0f);
  const int64_t block = static_cast<int64_t>(D) * kLanes;
  for (const float* end = q + D; q < end; ++q, keys += kLanes) {
    const Floats query = all(*q);
    for (int b = 0; b < Blocks; ++b) sums[b] = fma(query, load(keys + b * block), sums[b]);
  }
  for (int b = 0; b < Blocks; ++b) store(scores + b * kLanes, sums[b]);
}

// Scores of all positions, -inf in the lanes of the last block that hold none. Returns the largest, by lane.
inline Floats scores_of(const float* q, const Positions& read, int D, float* scores) {
  const int blocks = num_blocks(read.count);
  Floats most = all(-__builtin_inff());
  if (blocks == 0) return most;
  const auto keys_of = [&](int block) { return read.keys + static_cast<int64_t>(block) * D * kLanes; };
  int b = 0;
  for (; b + 4 <= blocks; b += 4) scores_of_blocks<4>(q, keys_of(b), D, scores + b * kLanes);
  for (; b + 2 <= blocks; b += 2) scores_of_blocks<2>(q, keys_of(b), D, scores + b * kLanes);
  if (b < blocks) scores_of_blocks<1>(q, keys_of(b), D, scores + b * kLanes);
  float* last = scores + (blocks - 1) * kLanes;
  store(last, first_lanes(load(last), read.count - (blocks - 1) * kLanes, all(-__builtin_inff())));
  for (b = 0; b < blocks; ++b) most = max(most, load(scores + b * kLanes));
  return most;
}

// Turns scores into e^(score - most), 0 where there is no position, and adds them up by lane.
inline Floats weights_of(float* scores, int count, Floats most, Floats total) {
  for (int b = 0, blocks = num_blocks(count); b < blocks; ++b) {
    const Floats weights = first_lanes(exp(load(scores + b * kLanes) - most), count - b * kLanes, all(0.0f));
    store(scores + b * kLanes, weights);
    total += weights;
  }
  return total;
}

template <int Parts>
inline void add_values(const float* weights, const Positions& read, int D, float* out) {
  Floats sums[Parts];
  for (int j = 0; j < Parts; ++j) sums[j] = load(out + j * kLanes);
  const float* values = read.values;
  for (int p = 0; p < read.count; ++p, values += D) {
    const Floats weight = all(weights[p]);
    for (int j = 0; j < Parts; ++j) sums[j] = fma(weight, load(values + j * kLanes), sums[j]);
  }
  for (int j = 0; j < Parts; ++j) store(out + j * kLanes, sums[j]);
}

inline void add_all_values(const float* weights, Positions read, int D, float* out) {
  int d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes, read.values += 4 * kLanes) add_values<4>(weights, read, D, out + d);
  for (; d + 2 * kLanes <= D; d += 2 * kLanes, read.values += 2 * kLanes) add_values<2>(weights, read, D, out + d);
  for (; d < D; d += kLanes, read.values += kLanes) add_values<1>(weights, read, D, out + d);
}

// q (D,), divided by sqrt(D) -> out (D,). `scores` is room for the blocks of both.
inline void attend(const float* q, const Positions& prefix, const Positions& own, int D, float* scores, float* out) {
  float* own_scores = scores + num_blocks(prefix.count) * kLanes;
  const Floats most = all(largest(max(scores_of(q, prefix, D, scores), scores_of(q, own, D, own_scores))));
  const Floats total = weights_of(own_scores, own.count, most, weights_of(scores, prefix.count, most, all(0.0f)));
  for (int d = 0; d < D; d += kLanes) store(out + d, all(0.0f));
  add_all_values(scores, prefix, D, out);
  add_all_values(own_scores, own, D, out);
  const Floats sum_of_weights = all(sum(total));
  for (int d = 0; d < D; d += kLanes) store(out + d, load(out + d) / sum_of_weights);
}

}  // namespace kodalle
