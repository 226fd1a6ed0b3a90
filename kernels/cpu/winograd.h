// Winograd's transforms of sixteen channels at a time: F(4x4, 3x3), and its form after a nearest-neighbour doubling.
//
// A row of the transform in is M(x) / (x - p), M the product of (x - q) over the finite points q: its leading coefficient is
// 1, so pairs of points share their even and odd parts. kernels/convolution.py scales the weights' transform to it.
//
// Sources: Lavin, Gray 2015, arXiv:1509.09308; points as in kernels/winograd.py.
#pragma once

#include "lanes.h"

namespace kodalle {

// Points 0, a, -a, 2a, -2a and infinity, a^2 = 1/2.
struct Plain {
  static constexpr int kEdge = 6;          // pixels that a tile reads on a side
  static constexpr int kStep = 4;          // source pixels from tile to tile
  static constexpr int kFrequencies = 6;   // on a side
  static constexpr int kSpectrum = 6;      // different ones among the transformed inputs
  static constexpr int kSource[] = {0, 1, 2, 3, 4, 5};  // which of them each frequency multiplies
  static constexpr float kRoot = 0.70710678118654752f;  // a

  static void in(const Floats (&d)[6], Floats (&v)[6]) {
    const Floats even_a = fma(d[2], all(-2.0f), d[4]), odd_a = fma(d[1], all(-2.0f), d[3]);
    const Floats even_b = fma(d[2], all(-0.5f), d[4]), odd_b = fma(d[1], all(-0.5f), d[3]);
    v[0] = fma(d[2], all(-2.5f), d[4]) + d[0];
    v[1] = fma(odd_a, all(kRoot), even_a);
    v[2] = fma(odd_a, all(-kRoot), even_a);
    v[3] = fma(odd_b, all(2 * kRoot), even_b);
    v[4] = fma(odd_b, all(-2 * kRoot), even_b);
    v[5] = fma(d[3], all(-2.5f), d[5]) + d[1];
  }

  static void out(const Floats (&m)[6], Floats (&y)[4]) {
    const Floats sum_a = m[1] + m[2], off_a = m[1] - m[2], sum_b = m[3] + m[4], off_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = fma(off_b, all(2.0f), off_a) * all(kRoot);
    y[2] = fma(sum_b, all(2.0f), sum_a * all(0.5f));
    y[3] = fma(fma(off_b, all(8.0f), off_a), all(0.5f * kRoot), m[5]);
  }
};

// Points 0, 1, 3/2, -3/2 and infinity; that of -1 is multiplied by zero. The small image's pixels repeat, so 3/2 and -3/2 read
// the same spectrum.
struct Doubled {
  static constexpr int kEdge = 4;
  static constexpr int kStep = 2;
  static constexpr int kFrequencies = 5;
  static constexpr int kSpectrum = 4;
  static constexpr int kSource[] = {0, 1, 2, 2, 3};

  static void in(const Floats (&e)[4], Floats (&v)[4]) {
    v[0] = fma(e[0], all(2.25f), fma(e[1], all(-3.25f), e[2]));
    v[1] = fma(e[1], all(-2.25f), e[2]);
    v[2] = e[2] - e[1];
    v[3] = fma(e[1], all(2.25f), fma(e[2], all(-3.25f), e[3]));
  }

  static void out(const Floats (&m)[5], Floats (&y)[4]) {
    const Floats sum = m[2] + m[3], off = m[2] - m[3];
    y[0] = m[0] + (m[1] + sum);
    y[1] = fma(off, all(1.5f), m[1]);
    y[2] = fma(sum, all(2.25f), m[1]);
    y[3] = fma(off, all(3.375f), m[1]) + m[4];
  }
};

// Pixels (kEdge x kEdge), rows `row` floats apart, neighbours 16 -> spectra `step` floats apart.
template <typename Kind>
inline void transform_in(const float* pixels, int64_t row, float* to, int64_t step) {
  constexpr int E = Kind::kEdge, S = Kind::kSpectrum;
  Floats half[S][E];
  for (int j = 0; j < E; ++j) {
    Floats d[E], v[S];
    for (int i = 0; i < E; ++i) d[i] = load(pixels + i * row + j * kLanes);
    Kind::in(d, v);
    for (int i = 0; i < S; ++i) half[i][j] = v[i];
  }
  for (int i = 0; i < S; ++i) {
    Floats v[S];
    Kind::in(half[i], v);
    for (int j = 0; j < S; ++j) store(to + (i * S + j) * step, v[j]);
  }
}

// Products of all frequencies, `step` floats apart -> 4 x 4 pixels.
template <typename Kind>
inline void transform_out(const float* products, int64_t step, Floats (&pixels)[4][4]) {
  constexpr int S = Kind::kFrequencies;
  Floats half[4][S];
  for (int j = 0; j < S; ++j) {
    Floats m[S], y[4];
    for (int i = 0; i < S; ++i) m[i] = load(products + (i * S + j) * step);
    Kind::out(m, y);
    for (int i = 0; i < 4; ++i) half[i][j] = y[i];
  }
  for (int i = 0; i < 4; ++i) Kind::out(half[i], pixels[i]);
}

}  // namespace kodalle
