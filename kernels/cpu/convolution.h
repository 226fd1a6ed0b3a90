// The C interface: 3x3 convolutions of one image, stride 1, zero padding 1, with what stands before and after them.
//
//     source -> SiLU(scale * x + shift) -> (doubled) -> convolution + bias -> target (+=) -> moments by channel
//
// H x W source pixels, C channels in, K out; C a multiple of 16. All numbers are float32, channels last. An image is computed
// in blocks of tiles of 4 x 4 target pixels; blocks are independent, and which they are depends on C, H and W alone. So no bit
// depends on the number of threads, on other images or on the instruction set.
#pragma once

#include <cstdint>

extern "C" {

// Packed by kodalle_pack_convolution.
struct Convolution {
  int32_t inputs;   // C
  int32_t outputs;  // K
  int32_t doubled;  // the source is enlarged twofold first, each pixel to 2 x 2
  const float* panels;
  const float* bias;  // (K, padded to a multiple of 16)
};

struct Image {
  int32_t height, width;  // H, W
  const float* source;    // (H, W, C)
  const float* scale;     // (C,); null: no activation
  const float* shift;     // (C,)
  float* target;          // (H, W, K), doubled (2 H, 2 W, K)
  int32_t add;            // onto what the target holds
  float* moments;         // (blocks, 4, K padded): mean, variance, lowest, highest of a block's pixels; null: not wanted
  float* counts;          // (blocks,) pixels
};

__attribute__((visibility("default"))) int32_t kodalle_convolution_interface();
__attribute__((visibility("default"))) int64_t kodalle_convolution_floats(const Convolution* convolution);
// spectra (36 or 25 frequencies, C, K) -> panels, at a cache line
__attribute__((visibility("default"))) void kodalle_pack_convolution(const Convolution* convolution, const float* spectra, float* panels);
__attribute__((visibility("default"))) int32_t kodalle_convolution_blocks(const Convolution* convolution, int32_t height, int32_t width);
// Blocks first .. last - 1, on the calling thread
__attribute__((visibility("default"))) void kodalle_convolve(const Convolution* convolution, const Image* image, int32_t first, int32_t last);

}  // extern "C"
