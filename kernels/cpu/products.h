// Linear layers over packed weights: a panel is 16 outputs, and is read once for all rows of a tile.
//
// Weights come from memory once a step. While one panel is multiplied, the next one is prefetched, a share by each tile.
//
//     float32   panel (K, 16) floats
//     int8      AVX-512: (K / 4, 16, 4) bytes, weight + 128; AVX2: (K / 2, 16, 2) signed bytes
//     int4      groups of 64 inputs, each its (16,) float scales, then (8, 16, 4) bytes of two nibbles, weight + 8: lower
//               nibbles inputs 8 i + 0..3, upper ones 8 i + 4..7
//
// Inputs of a tile of n rows lie as (K, n): float32; integers -127..127 in fours of bytes, (K / 4, n, 4), or for AVX2 and
// int8 in pairs of 16 bits, (K / 2, n, 2).
//
// float32: a chain of fused multiply-adds over 256 ascending inputs, and the sum of these chains, ascending. Integers: sums
// are exact in any order; a group's sum times its scale is added by a fused multiply-add, ascending groups.
#pragma once

#include <cstring>

#include "lanes.h"
#include "step.h"

namespace kodalle {

constexpr int kGroup = 64;  // inputs that share a scale in int4
constexpr int kGroupBytes = 64 + 8 * 64;
constexpr int kChain = 256;  // inputs that float32 adds up in one chain

#ifdef __AVX512F__
constexpr int kTileRows = 16;
constexpr int kInt4TileRows = 8;
#else
constexpr int kTileRows = 6;
constexpr int kInt4TileRows = 4;
#endif

inline int64_t panel_bytes(int32_t kind, int64_t inputs) {
  if (kind == kFloat32) return inputs * kLanes * 4;
  if (kind == kInt8) return inputs * kLanes;
  return inputs / kGroup * kGroupBytes;
}

inline int tile_rows(int32_t kind) { return kind == kInt4 ? kInt4TileRows : kTileRows; }

// Rows in tiles of nearly equal height.
struct Tiles {
  int num_rows, count;
  Tiles(int32_t kind, int rows) : num_rows(rows), count((rows + tile_rows(kind) - 1) / tile_rows(kind)) {}
  int first(int tile) const { return num_rows * tile / count; }
  int of(int row) const {
    int tile = row * count / num_rows;
    while (first(tile + 1) <= row) ++tile;
    return tile;
  }
};

// R rows as a product's inputs.
struct Inputs {
  uint8_t* packed;   // tiles one after the other
  float* scales;     // (R,) of a row's integers
  int32_t* offsets;  // (R,) or (R, K / 64): what the unsigned weights add too much, negated
};

inline int64_t input_bytes(int32_t kind) {
#ifdef __AVX512F__
  return kind == kFloat32 ? 4 : 1;
#else
  return kind == kFloat32 ? 4 : kind == kInt8 ? 2 : 1;
#endif
}

// The next panel, read ahead a share at a time.
struct Ahead {
  const uint8_t* next;
  const uint8_t* end;
  void lines(int count) {
    for (int i = 0; i < count && next < end; ++i, next += 64)
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
  }
};

// ------------------------------------------------------------------------------------------------------ inputs

inline void put_floats(const float* x, int K, int row, int height, uint8_t* tile) {
  float* to = reinterpret_cast<float*>(tile) + row;
  for (int k = 0; k < K; ++k) to[static_cast<int64_t>(k) * height] = x[k];
}

// Rounds a row to -127..127 by its largest value. Returns the size of a step.
inline float quantise(const float* x, int K, uint8_t* to) {
  Floats most = all(0.0f);
  for (int k = 0; k < K; k += kLanes) most = max(most, abs(load(x + k)));
  const float scale = (largest(most) < 1.17549435e-38f ? 1.17549435e-38f : largest(most)) / 127.0f;
  // Conversion cuts the fraction off, so half more than 128 rounds to the nearest.
  for (int k = 0; k < K; k += kLanes) store_bytes(to + k, load(x + k) / all(scale) + all(128.5f));
  return scale;
}

inline void put_bytes(const uint8_t* rounded, int K, int row, int height, uint8_t* tile) {
  for (int k = 0; k < K; k += 4) {
    uint32_t four;
    std::memcpy(&four, rounded + k, 4);
    four ^= 0x80808080u;  // from around 128 to around 0
    std::memcpy(tile + (static_cast<int64_t>(k / 4) * height + row) * 4, &four, 4);
  }
}

inline void put_pairs(const uint8_t* rounded, int K, int row, int height, uint8_t* tile) {
  int16_t* to = reinterpret_cast<int16_t*>(tile) + 2 * row;
  for (int k = 0; k < K; k += 2, to += 2 * height) {
    to[0] = static_cast<int16_t>(rounded[k] - 128);
    to[1] = static_cast<int16_t>(rounded[k + 1] - 128);
  }
}

inline int32_t sum_of(const uint8_t* rounded, int count) {
  int32_t total = 0;
  for (int k = 0; k < count; ++k) total += rounded[k];
  return total - 128 * count;
}

// Lays out row `row` of R, x (K,). `rounded` is room for K bytes.
inline void put_row(int32_t kind, const Tiles& tiles, int row, const float* x, int K, uint8_t* rounded, const Inputs& inputs) {
  const int tile = tiles.of(row), first = tiles.first(tile), height = tiles.first(tile + 1) - first;
  uint8_t* to = inputs.packed + static_cast<int64_t>(first) * K * input_bytes(kind);
  if (kind == kFloat32) return put_floats(x, K, row - first, height, to);
  inputs.scales[row] = quantise(x, K, rounded);
  if (input_bytes(kind) == 2) return put_pairs(rounded, K, row - first, height, to);
  put_bytes(rounded, K, row - first, height, to);
  if (kind == kInt8) {
    inputs.offsets[row] = -128 * sum_of(rounded, K);
  } else {
    for (int group = 0; group < K / kGroup; ++group)
      inputs.offsets[static_cast<int64_t>(row) * (K / kGroup) + group] = -8 * sum_of(rounded + group * kGroup, kGroup);
  }
}

// ------------------------------------------------------------------------------------------------------ tiles
//
// A tile's function multiplies `Rows` rows by a panel: (Rows, 16) to `out`. `ahead` lines are prefetched every eight.

template <int Rows>
void float_tile(const uint8_t* panel, int K, const uint8_t* packed, const int32_t*, int, float* out, Ahead& ahead, int lines) {
  const float* w = reinterpret_cast<const float*>(panel);
  const float* x = reinterpret_cast<const float*>(packed);
  for (int start = 0; start < K; start += kChain) {
    Floats sums[Rows];
    for (int r = 0; r < Rows; ++r) sums[r] = all(0.0f);
    const int stop = K - start < kChain ? K : start + kChain;
    for (int k = start; k < stop; k += 8) {
      ahead.lines(lines);
      for (int i = 0; i < 8; ++i, w += kLanes, x += Rows) {
        const Floats weights = load(w);
        for (int r = 0; r < Rows; ++r) sums[r] = fma(weights, all(x[r]), sums[r]);
      }
    }
    for (int r = 0; r < Rows; ++r) store(out + r * kLanes, start == 0 ? sums[r] : load(out + r * kLanes) + sums[r]);
  }
}

inline int32_t four_bytes(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

#ifdef __AVX512F__

template <int Rows>
void int8_tile(const uint8_t* w, int K, const uint8_t* x, const int32_t* offsets, int, float* out, Ahead& ahead, int lines) {
  __m512i sums[Rows];
  for (int r = 0; r < Rows; ++r) sums[r] = _mm512_set1_epi32(offsets[r]);
  for (int k = 0; k < K; k += 32) {
    ahead.lines(lines);
    const int end = K - k < 32 ? (K - k) / 4 : 8;
    for (int i = 0; i < end; ++i, w += 64, x += 4 * Rows) {
      const __m512i weights = _mm512_loadu_si512(w);
      for (int r = 0; r < Rows; ++r)
        sums[r] = _mm512_dpbusd_epi32(sums[r], weights, _mm512_set1_epi32(four_bytes(x + 4 * r)));
    }
  }
  for (int r = 0; r < Rows; ++r) _mm512_storeu_ps(out + r * kLanes, _mm512_cvtepi32_ps(sums[r]));
}

template <int Rows>
void int4_tile(const uint8_t* w, int K, const uint8_t* x, const int32_t* offsets, int per_row, float* out, Ahead& ahead, int lines) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sums[Rows];
  for (int r = 0; r < Rows; ++r) sums[r] = _mm512_setzero_ps();
  for (int group = 0; group < K / kGroup; ++group) {
    ahead.lines(lines + (lines + 7) / 8);
    const __m512 scales = _mm512_loadu_ps(w);
    w += 64;
    __m512i part[Rows];
    for (int r = 0; r < Rows; ++r) part[r] = _mm512_set1_epi32(offsets[r * per_row + group]);
    for (int i = 0; i < 8; ++i, w += 64, x += 8 * Rows) {
      const __m512i both = _mm512_loadu_si512(w);
      const __m512i lower = _mm512_and_si512(both, nibble);
      const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      for (int r = 0; r < Rows; ++r) {
        part[r] = _mm512_dpbusd_epi32(part[r], lower, _mm512_set1_epi32(four_bytes(x + 4 * r)));
        part[r] = _mm512_dpbusd_epi32(part[r], upper, _mm512_set1_epi32(four_bytes(x + 4 * (Rows + r))));
      }
    }
    for (int r = 0; r < Rows; ++r) sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r]), scales, sums[r]);
  }
  for (int r = 0; r < Rows; ++r) _mm512_storeu_ps(out + r * kLanes, sums[r]);
}

#else

template <int Rows>
void int8_tile(const uint8_t* w, int K, const uint8_t* x, const int32_t*, int, float* out, Ahead& ahead, int lines) {
  __m256i low[Rows], high[Rows];
  for (int r = 0; r < Rows; ++r) low[r] = high[r] = _mm256_setzero_si256();
  for (int k = 0; k < K; k += 32) {
    ahead.lines(lines);
    const int end = K - k < 32 ? (K - k) / 2 : 16;
    for (int i = 0; i < end; ++i, w += 32, x += 4 * Rows) {
      const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
      const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16)));
      for (int r = 0; r < Rows; ++r) {
        const __m256i pair = _mm256_set1_epi32(four_bytes(x + 4 * r));
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(first, pair));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(second, pair));
      }
    }
  }
  for (int r = 0; r < Rows; ++r) store(out + r * kLanes, Floats{_mm256_cvtepi32_ps(low[r]), _mm256_cvtepi32_ps(high[r])});
}

// Eight outputs of a group: sums of pairs fit into 16 bits, 16 * 15 * 127 = 30,480.
template <int Rows>
inline void int4_half(const uint8_t* w, const uint8_t* x, __m256i (&part)[Rows]) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half) {
    __m256i pairs[Rows];
    for (int r = 0; r < Rows; ++r) pairs[r] = _mm256_setzero_si256();
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 64 * i));
      const __m256i lower = _mm256_and_si256(both, nibble);
      const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
      for (int r = 0; r < Rows; ++r) {
        const __m256i near = _mm256_set1_epi32(four_bytes(x + 8 * Rows * i + 4 * r));
        const __m256i far = _mm256_set1_epi32(four_bytes(x + 8 * Rows * i + 4 * (Rows + r)));
        pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(lower, near));
        pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(upper, far));
      }
    }
    for (int r = 0; r < Rows; ++r) part[r] = _mm256_add_epi32(part[r], _mm256_madd_epi16(pairs[r], ones));
  }
}

template <int Rows>
void int4_tile(const uint8_t* w, int K, const uint8_t* x, const int32_t* offsets, int per_row, float* out, Ahead& ahead, int lines) {
  for (int r = 0; r < Rows; ++r) store(out + r * kLanes, all(0.0f));
  for (int group = 0; group < K / kGroup; ++group, w += kGroupBytes, x += kGroup * Rows) {
    ahead.lines(lines + (lines + 7) / 8);
    for (int half = 0; half < 2; ++half) {
      const __m256 scales = _mm256_loadu_ps(reinterpret_cast<const float*>(w) + 8 * half);
      __m256i part[Rows];
      for (int r = 0; r < Rows; ++r) part[r] = _mm256_set1_epi32(offsets[r * per_row + group]);
      int4_half<Rows>(w + 64 + 32 * half, x, part);
      for (int r = 0; r < Rows; ++r) {
        float* to = out + r * kLanes + 8 * half;
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[r]), scales, _mm256_loadu_ps(to)));
      }
    }
  }
}

#endif

using Tile = void (*)(const uint8_t*, int, const uint8_t*, const int32_t*, int, float*, Ahead&, int);

#define KODALLE_TILES_TO_6(tile) tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>
#ifdef __AVX512F__
#define KODALLE_TILES(tile) \
  KODALLE_TILES_TO_6(tile), tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>, tile<15>, tile<16>
constexpr Tile kInt4Tiles[] = {KODALLE_TILES_TO_6(int4_tile), int4_tile<7>, int4_tile<8>};
#else
#define KODALLE_TILES(tile) KODALLE_TILES_TO_6(tile)
constexpr Tile kInt4Tiles[] = {int4_tile<1>, int4_tile<2>, int4_tile<3>, int4_tile<4>};
#endif
constexpr Tile kFloatTiles[] = {KODALLE_TILES(float_tile)};
constexpr Tile kInt8Tiles[] = {KODALLE_TILES(int8_tile)};

// ------------------------------------------------------------------------------------------------------ panels

// Outputs 16 * panel .. + 15 of all rows: (R, 16) to `out`. `next` is read ahead.
inline void multiply_panel(const Linear& linear, int panel, const Tiles& tiles, const Inputs& inputs, float* out, const uint8_t* next) {
  const int K = linear.inputs, per_row = linear.kind == kInt4 ? K / kGroup : 1;
  const int64_t size = panel_bytes(linear.kind, K);
  const Tile* by_height = linear.kind == kFloat32 ? kFloatTiles : linear.kind == kInt8 ? kInt8Tiles : kInt4Tiles;
  Ahead ahead{next, next == nullptr ? nullptr : next + size};
  const int lines = (8 + tiles.count - 1) / tiles.count;
  for (int tile = 0; tile < tiles.count; ++tile) {
    const int first = tiles.first(tile), height = tiles.first(tile + 1) - first;
    by_height[height - 1](linear.panels + panel * size, K, inputs.packed + static_cast<int64_t>(first) * K * input_bytes(linear.kind),
                          inputs.offsets + static_cast<int64_t>(first) * per_row, per_row, out + first * kLanes, ahead, lines);
  }
  if (linear.kind == kInt8) {
    const Floats scales = load(linear.scales + panel * kLanes);
    for (int r = 0; r < tiles.num_rows; ++r) store(out + r * kLanes, load(out + r * kLanes) * scales * all(inputs.scales[r]));
  } else if (linear.kind == kInt4) {
    for (int r = 0; r < tiles.num_rows; ++r) store(out + r * kLanes, load(out + r * kLanes) * all(inputs.scales[r]));
  }
  if (linear.bias != nullptr) {
    const Floats bias = load(linear.bias + panel * kLanes);
    for (int r = 0; r < tiles.num_rows; ++r) store(out + r * kLanes, load(out + r * kLanes) + bias);
  }
}

inline const uint8_t* panel_at(const Linear& linear, int panel) {
  return linear.panels + panel * panel_bytes(linear.kind, linear.inputs);
}

// ------------------------------------------------------------------------------------------------------ packing

// weight (N, K): float32; for int8 signed bytes; for int4 signed bytes -8..7, and group_scales (N, K / 64).
inline void pack(int32_t kind, int64_t outputs, int64_t K, const void* weight, const float* group_scales, uint8_t* to) {
  const float* floats = static_cast<const float*>(weight);
  const int8_t* bytes = static_cast<const int8_t*>(weight);
  for (int64_t first = 0; first < outputs; first += kLanes) {
    if (kind == kFloat32) {
      float* panel = reinterpret_cast<float*>(to + first / kLanes * panel_bytes(kind, K));
      for (int n = 0; n < kLanes; ++n)
        for (int64_t k = 0; k < K; ++k) panel[k * kLanes + n] = floats[(first + n) * K + k];
    } else if (kind == kInt8) {
      uint8_t* panel = to + first / kLanes * panel_bytes(kind, K);
#ifdef __AVX512F__
      constexpr int kAtOnce = 4, kOffset = 128;
#else
      constexpr int kAtOnce = 2, kOffset = 0;
#endif
      for (int n = 0; n < kLanes; ++n)
        for (int64_t k = 0; k < K; ++k)
          panel[(k / kAtOnce * kLanes + n) * kAtOnce + k % kAtOnce] = static_cast<uint8_t>(bytes[(first + n) * K + k] + kOffset);
    } else {
      for (int64_t group = 0; group < K / kGroup; ++group) {
        uint8_t* part = to + first / kLanes * panel_bytes(kind, K) + group * kGroupBytes;
        for (int n = 0; n < kLanes; ++n) {
          std::memcpy(part + 4 * n, group_scales + (first + n) * (K / kGroup) + group, 4);
          const int8_t* from = bytes + (first + n) * K + group * kGroup;
          for (int k = 0; k < kGroup; ++k) {
            uint8_t& both = part[64 + (k / 8 * kLanes + n) * 4 + k % 4];
            const uint8_t nibble = static_cast<uint8_t>(from[k] + 8);
            both = k % 8 < 4 ? nibble : static_cast<uint8_t>(both | nibble << 4);
          }
        }
      }
    }
  }
}

}  // namespace kodalle
