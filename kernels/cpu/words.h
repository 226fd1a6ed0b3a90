// Sixteen lanes of 32-bit words: what Philox computes in.
#pragma once

#include "lanes.h"

namespace kodalle {

#ifdef __AVX512F__

struct Words {
  __m512i v;
};

inline Words all_words(uint32_t a) { return {_mm512_set1_epi32(static_cast<int>(a))}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }

// High and low halves of 32 x 32 bit products: of the even lanes, and of the odd ones.
inline void multiply(Words a, uint32_t b, Words* high, Words* low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  constexpr __mmask16 kOdd = 0xAAAA;
  *high = {_mm512_mask_blend_epi32(kOdd, _mm512_srli_epi64(even, 32), odd)};
  *low = {_mm512_mask_blend_epi32(kOdd, even, _mm512_slli_epi64(odd, 32))};
}

// first .. first + 15, those of a quarter of the register four apart: see `store_interleaved`.
inline Words by_quarters(uint32_t first) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return {_mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(first)))};
}

inline Floats to_floats(Words a) { return {_mm512_cvtepu32_ps(a.v)}; }

// Stores a, b, c and d of each word of `by_quarters` one after the other, words in ascending order.
inline void store_interleaved(float* p, Floats a, Floats b, Floats c, Floats d) {
  const __m512 ab = _mm512_unpacklo_ps(a.v, b.v), cd = _mm512_unpacklo_ps(c.v, d.v);
  const __m512 ab_above = _mm512_unpackhi_ps(a.v, b.v), cd_above = _mm512_unpackhi_ps(c.v, d.v);
  _mm512_storeu_ps(p, _mm512_shuffle_ps(ab, cd, 0x44));
  _mm512_storeu_ps(p + 16, _mm512_shuffle_ps(ab, cd, 0xEE));
  _mm512_storeu_ps(p + 32, _mm512_shuffle_ps(ab_above, cd_above, 0x44));
  _mm512_storeu_ps(p + 48, _mm512_shuffle_ps(ab_above, cd_above, 0xEE));
}

#else

struct Words {
  __m256i lo, hi;
};

inline Words all_words(uint32_t a) { return {_mm256_set1_epi32(static_cast<int>(a)), _mm256_set1_epi32(static_cast<int>(a))}; }
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }

inline void multiply(__m256i a, __m256i factor, __m256i* high, __m256i* low) {
  const __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline void multiply(Words a, uint32_t b, Words* high, Words* low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  multiply(a.lo, factor, &high->lo, &low->lo);
  multiply(a.hi, factor, &high->hi, &low->hi);
}

inline Words by_quarters(uint32_t first) {
  const __m256i start = _mm256_set1_epi32(static_cast<int>(first));
  return {_mm256_add_epi32(_mm256_set_epi32(13, 9, 5, 1, 12, 8, 4, 0), start),
          _mm256_add_epi32(_mm256_set_epi32(15, 11, 7, 3, 14, 10, 6, 2), start)};
}

// Both halves of a word are exact, so their sum is rounded once.
inline __m256 to_floats(__m256i a) {
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xFFFF)));
  return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
}
inline Floats to_floats(Words a) { return {to_floats(a.lo), to_floats(a.hi)}; }

inline void store_interleaved(float* p, __m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
  const __m256 ab_above = _mm256_unpackhi_ps(a, b), cd_above = _mm256_unpackhi_ps(c, d);
  _mm256_storeu_ps(p, _mm256_shuffle_ps(ab, cd, 0x44));
  _mm256_storeu_ps(p + 16, _mm256_shuffle_ps(ab, cd, 0xEE));
  _mm256_storeu_ps(p + 32, _mm256_shuffle_ps(ab_above, cd_above, 0x44));
  _mm256_storeu_ps(p + 48, _mm256_shuffle_ps(ab_above, cd_above, 0xEE));
}
inline void store_interleaved(float* p, Floats a, Floats b, Floats c, Floats d) {
  store_interleaved(p, a.lo, b.lo, c.lo, d.lo);
  store_interleaved(p + 8, a.hi, b.hi, c.hi, d.hi);
}

#endif

}  // namespace kodalle
