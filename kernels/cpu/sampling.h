// Gumbel noise by counter-based Philox, and the token of the highest score: `kernels.reference.sample` in lanes.
//
// Random bits are equal to the reference's. Logarithms are within some units of the last digit, so where two scores are
// too near to be sure of the reference's choice, the row is marked, and the caller asks the reference.
#pragma once

#include "step.h"
#include "words.h"

namespace kodalle {

constexpr float kClose = 1e-4f;  // of scores; ours differ from the reference's by less than a tenth of that

// Ten rounds of Philox-4x32 on sixteen counters (Salmon et al. 2011).
inline void philox(uint64_t seed, Words (&c)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply(c[0], 0xD2511F53u, &high0, &low0);
    multiply(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ all_words(k0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ all_words(k1);
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// -log(-log1p(-v)) of v = (bits + 1/2) / 2^32, bits as rounded to float32.
inline Floats gumbel(Floats bits) {
  const Floats v = min((bits + all(0.5f)) * all(2.3283064365386963e-10f), all(1.0f - 5.9604644775390625e-08f));
  const Floats rest = all(1.0f) - v, lost = all(1.0f) - rest;  // what of v the subtraction kept
  // log1p(-v) = log(rest) * v / lost; -v where nothing was kept
  const Floats ratio = log(rest) * v / max(lost, all(5.9604644775390625e-08f));
  const Floats logarithm = select(all(0.0f) < lost, all(0.0f) - ratio, v);
  return all(0.0f) - log(logarithm);
}

struct Best {
  Floats scores, ids, second;  // by lane: the highest score, the first token that has it, and the next score
  Best() : scores(all(-__builtin_inff())), ids(all(0.0f)), second(all(-__builtin_inff())) {}
  void see(Floats score, Floats id) {
    const Mask is_higher = scores < score;
    second = max(second, min(scores, score));
    ids = select(is_higher, id, ids);
    scores = select(is_higher, score, scores);
  }
};

inline void take_best(const Best& best, int64_t* token, uint8_t* is_close) {
  alignas(64) float scores[kLanes], ids[kLanes], second[kLanes];
  store(scores, best.scores);
  store(ids, best.ids);
  store(second, best.second);
  int first = 0;
  for (int i = 1; i < kLanes; ++i)
    if (scores[i] > scores[first] || (scores[i] == scores[first] && ids[i] < ids[first])) first = i;
  const float most = scores[first], margin = kClose * (1.0f + __builtin_fabsf(most));
  float next = second[first];
  for (int i = 0; i < kLanes; ++i)
    if (i != first && scores[i] > next) next = scores[i];
  *token = static_cast<int64_t>(ids[first]);
  *is_close = !(most - next > margin);  // true of NaN and of two infinities as well
}

// Token t takes word t & 3 of the Philox call with counter (t >> 2, position, candidate, 0). A block of sixteen calls
// covers 64 tokens; a lane then holds every fourth token, in ascending order.
inline void sample_row(const Sample& sample, int row) {
  const int V = sample.num_tokens;
  const float* scores = sample.scores + static_cast<int64_t>(row) * V;
  const float temperature = sample.temperature[row];
  const Floats divisor = all(temperature > 0 ? temperature : 1.0f);
  Best best;
  alignas(64) float bits[4 * kLanes];
  for (int first = 0; first < V; first += 4 * kLanes) {
    if (temperature > 0) {
      Words words[4] = {by_quarters(static_cast<uint32_t>(first / 4)), all_words(static_cast<uint32_t>(sample.positions[row])),
                        all_words(static_cast<uint32_t>(sample.candidates[row])), all_words(0)};
      philox(static_cast<uint64_t>(sample.seeds[row]), words);
      store_interleaved(bits, to_floats(words[0]), to_floats(words[1]), to_floats(words[2]), to_floats(words[3]));
    }
    for (int part = first; part < V && part < first + 4 * kLanes; part += kLanes) {
      Floats score = load(scores + part) / divisor;
      if (temperature > 0) score += gumbel(load(bits + part - first));
      best.see(score, lane_numbers() + all(static_cast<float>(part)));
    }
  }
  take_best(best, sample.tokens + row, sample.is_close + row);
}

}  // namespace kodalle
