// Queries of one sequence over its caption's keys and values and then its own, one softmax over both for each query.
//
// Keys lie sixteen positions side by side, (blocks, D, 16), so that a lane is a position and no sum crosses lanes but the
// softmax's. Values lie as (positions, D). Up to four queries read a key or value together: each has the order of sums that
// it has alone.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace kodalle {

constexpr int kQueries = 4;

// Positions in order.
struct Positions {
  const float* keys;    // (ceil(count / 16), D, 16)
  const float* values;  // (count, D)
};

// Q queries of one sequence, at most kQueries.
struct Queries {
  const float* q[kQueries];  // (D,), divided by sqrt(D)
  float* out[kQueries];      // (D,)
  int own[kQueries];         // own positions that each reads, ascending
};

inline int num_blocks(int positions) { return (positions + kLanes - 1) / kLanes; }

// ------------------------------------------------------------------------------------------------------ scores

// Of `Blocks` blocks of keys: (Q, Blocks * 16) in rows of `stride`.
template <int Q, int Blocks>
inline void scores_of_blocks(const Queries& queries, const float* keys, int D, float* scores, int64_t stride) {
  Floats sums[Q][Blocks];
  for (int i = 0; i < Q; ++i)
    for (int b = 0; b < Blocks; ++b) sums[i][b] = all(0.0f);
  const int64_t block = static_cast<int64_t>(D) * kLanes;
  for (int d = 0; d < D; ++d, keys += kLanes) {
    Floats of_blocks[Blocks];
    for (int b = 0; b < Blocks; ++b) of_blocks[b] = load(keys + b * block);
    for (int i = 0; i < Q; ++i) {
      const Floats query = all(queries.q[i][d]);
      for (int b = 0; b < Blocks; ++b) sums[i][b] = fma(query, of_blocks[b], sums[i][b]);
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int b = 0; b < Blocks; ++b) store(scores + i * stride + b * kLanes, sums[i][b]);
}

template <int Q>
inline void scores_of(const Queries& queries, const float* keys, int blocks, int D, float* scores, int64_t stride) {
  const auto keys_of = [&](int block) { return keys + static_cast<int64_t>(block) * D * kLanes; };
  int b = 0;
  for (; b + 4 <= blocks; b += 4) scores_of_blocks<Q, 4>(queries, keys_of(b), D, scores + b * kLanes, stride);
  for (; b + 2 <= blocks; b += 2) scores_of_blocks<Q, 2>(queries, keys_of(b), D, scores + b * kLanes, stride);
  if (b < blocks) scores_of_blocks<Q, 1>(queries, keys_of(b), D, scores + b * kLanes, stride);
}

// The largest of `count` scores by lane. Lanes of the last block that hold no position become -inf.
inline Floats largest_of(float* scores, int count) {
  const int blocks = num_blocks(count);
  Floats most = all(-__builtin_inff());
  if (blocks == 0) return most;
  float* last = scores + (blocks - 1) * kLanes;
  store(last, first_lanes(load(last), count - (blocks - 1) * kLanes, all(-__builtin_inff())));
  for (int b = 0; b < blocks; ++b) most = max(most, load(scores + b * kLanes));
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

// ------------------------------------------------------------------------------------------------------ values

// Adds positions `first` .. `last` - 1 to 16 * Parts channels from `d` on. Weights (Q, ..) in rows of `stride`.
template <int Q, int Parts>
inline void add_values(const Queries& queries, int query, const float* weights, int64_t stride, const float* values, int first, int last,
                       int D, int d) {
  Floats sums[Q][Parts];
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < Parts; ++j) sums[i][j] = load(queries.out[query + i] + d + j * kLanes);
  values += static_cast<int64_t>(first) * D + d;
  for (int p = first; p < last; ++p, values += D) {
    Floats parts[Parts];
    for (int j = 0; j < Parts; ++j) parts[j] = load(values + j * kLanes);
    for (int i = 0; i < Q; ++i) {
      const Floats weight = all(weights[i * stride + p]);
      for (int j = 0; j < Parts; ++j) sums[i][j] = fma(weight, parts[j], sums[i][j]);
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < Parts; ++j) store(queries.out[query + i] + d + j * kLanes, sums[i][j]);
}

// Of queries `query` .. `query` + Q - 1.
template <int Q>
inline void add_all_values(const Queries& queries, int query, const float* weights, int64_t stride, const float* values, int first,
                           int last, int D) {
  int d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) add_values<Q, 4>(queries, query, weights, stride, values, first, last, D, d);
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) add_values<Q, 2>(queries, query, weights, stride, values, first, last, D, d);
  for (; d < D; d += kLanes) add_values<Q, 1>(queries, query, weights, stride, values, first, last, D, d);
}

// ------------------------------------------------------------------------------------------------------ both

// `scores` is room for kQueries times `stride`, the blocks of `num_prefix` and of all own positions.
template <int Q>
inline void attend(const Queries& queries, const Positions& prefix, int num_prefix, const Positions& own, int D, float* scores, int64_t stride) {
  const int prefix_blocks = num_blocks(num_prefix), most_own = queries.own[Q - 1], fewest_own = queries.own[0];
  float* own_scores = scores + prefix_blocks * kLanes;
  scores_of<Q>(queries, prefix.keys, prefix_blocks, D, scores, stride);
  scores_of<Q>(queries, own.keys, num_blocks(most_own), D, own_scores, stride);
  Floats totals[Q];
  for (int i = 0; i < Q; ++i) {
    float *of_prefix = scores + i * stride, *of_own = own_scores + i * stride;
    const Floats most = all(largest(max(largest_of(of_prefix, num_prefix), largest_of(of_own, queries.own[i]))));
    totals[i] = weights_of(of_own, queries.own[i], most, weights_of(of_prefix, num_prefix, most, all(0.0f)));
    for (int d = 0; d < D; d += kLanes) store(queries.out[i] + d, all(0.0f));
  }
  add_all_values<Q>(queries, 0, scores, stride, prefix.values, 0, num_prefix, D);
  add_all_values<Q>(queries, 0, own_scores, stride, own.values, 0, fewest_own, D);
  for (int i = 0; i < Q; ++i) {
    add_all_values<1>(queries, i, own_scores + i * stride, stride, own.values, fewest_own, queries.own[i], D);
    const Floats sum_of_weights = all(sum(totals[i]));
    for (int d = 0; d < D; d += kLanes) store(queries.out[i] + d, load(queries.out[i] + d) / sum_of_weights);
  }
}

inline void attend(int count, const Queries& queries, const Positions& prefix, int num_prefix, const Positions& own, int D,
                   float* scores, int64_t stride) {
  static_assert(kQueries == 4);
  if (count == 4) return attend<4>(queries, prefix, num_prefix, own, D, scores, stride);
  if (count == 3) return attend<3>(queries, prefix, num_prefix, own, D, scores, stride);
  if (count == 2) return attend<2>(queries, prefix, num_prefix, own, D, scores, stride);
  attend<1>(queries, prefix, num_prefix, own, D, scores, stride);
}

}  // namespace kodalle
