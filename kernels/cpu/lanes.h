// Sixteen float32 lanes: one AVX-512 register, or two AVX2 registers.
//
// Every operation is written out, a fused multiply-add included (the build forbids others), and sums across lanes have
// one order. So a program in these lanes gives the same bits on both instruction sets.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace kodalle {

constexpr int kLanes = 16;

#ifdef __AVX512F__

struct Floats {
  __m512 v;
};
struct Mask {
  __mmask16 v;
};

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats all(float a) { return {_mm512_set1_ps(a)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Mask operator<(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Floats select(Mask m, Floats yes, Floats no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
inline Floats lane_numbers() {
  return {_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)};
}
inline Floats round(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n
inline Floats scaled_by_power(Floats a, Floats n) {
  __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(exponent))};
}
// a = m * 2^e with m in [sqrt(1/2), sqrt(2)), for normal a > 0
inline Floats split_exponent(Floats a, Floats* e) {
  const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x3f3504f3));
  *e = {_mm512_cvtepi32_ps(_mm512_srai_epi32(bits, 23))};
  const __m512i mantissa = _mm512_and_si512(bits, _mm512_set1_epi32(0x007fffff));
  return {_mm512_castsi512_ps(_mm512_add_epi32(mantissa, _mm512_set1_epi32(0x3f3504f3)))};
}
// Cut to whole numbers, as bytes
inline void store_bytes(uint8_t* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v)));
}
inline __m256 low_half(Floats a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Floats a) { return _mm512_extractf32x8_ps(a.v, 1); }

#else

struct Floats {
  __m256 lo, hi;
};
struct Mask {
  __m256 lo, hi;
};

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Floats all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Mask operator<(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Floats select(Mask m, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline Floats lane_numbers() {
  return {_mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set_ps(15, 14, 13, 12, 11, 10, 9, 8)};
}
inline Floats round(Floats a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
inline __m256 scaled_by_power(__m256 a, __m256 n) {
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
inline Floats scaled_by_power(Floats a, Floats n) {
  return {scaled_by_power(a.lo, n.lo), scaled_by_power(a.hi, n.hi)};
}
inline __m256 split_exponent(__m256 a, __m256* e) {
  const __m256i bits = _mm256_sub_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(0x3f3504f3));
  *e = _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 23));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
  return _mm256_castsi256_ps(_mm256_add_epi32(mantissa, _mm256_set1_epi32(0x3f3504f3)));
}
inline Floats split_exponent(Floats a, Floats* e) { return {split_exponent(a.lo, &e->lo), split_exponent(a.hi, &e->hi)}; }
inline void store_bytes(uint8_t* p, Floats a) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline __m256 low_half(Floats a) { return a.lo; }
inline __m256 high_half(Floats a) { return a.hi; }

#endif

inline Floats operator+=(Floats& a, Floats b) { return a = a + b; }

// The lanes' sum: halves are added to each other, down to one.
inline float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// The first `count` lanes of `a`, `other` in the rest.
inline Floats first_lanes(Floats a, int count, Floats other) {
  return select(lane_numbers() < all(static_cast<float>(count)), a, other);
}

template <int N>
inline Floats polynomial(Floats x, const float (&coefficients)[N]) {  // highest power first
  Floats y = all(coefficients[0]);
  for (int i = 1; i < N; ++i) y = fma(y, x, all(coefficients[i]));
  return y;
}

// e^x to 2 units of the last digit; below -87.3 the smallest normal number.
inline Floats exp(Floats x) {
  constexpr float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = min(max(x, all(-87.3365f)), all(88.3762f));
  const Floats n = round(x * all(1.44269504088896341f));
  Floats r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  const Floats y = fma(polynomial(r, kTerms), r * r, r) + all(1.0f);
  return scaled_by_power(y, n);
}

// Natural logarithm of normal positive numbers, to 2 units of the last digit.
inline Floats log(Floats x) {
  constexpr float kTerms[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                              -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  Floats e;
  const Floats m = split_exponent(x, &e) - all(1.0f);
  const Floats square = m * m;
  Floats y = polynomial(m, kTerms) * m * square;
  y = fma(e, all(-2.12194440e-4f), y);
  y = fma(square, all(-0.5f), y);
  return fma(e, all(0.693359375f), m + y);
}

// The error function to 3e-7, by a quotient of polynomials.
inline Floats erf(Floats x) {
  constexpr float kAbove[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                              -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  constexpr float kBelow[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                              -7.37332916720468e-03f, -1.42647390514189e-02f};
  x = min(max(x, all(-4.0f)), all(4.0f));
  const Floats square = x * x;
  return x * polynomial(square, kAbove) / polynomial(square, kBelow);
}

}  // namespace kodalle
