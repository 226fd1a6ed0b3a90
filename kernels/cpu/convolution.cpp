#include "convolution.h"

#include <cstring>

#include "arena.h"
#include "winograd.h"

using namespace kodalle;

namespace {

constexpr int kTile = 4;        // target pixels of a tile on a side
constexpr int kChain = 256;     // channels that are added up in one chain of fused multiply-adds
constexpr int kMostTiles = 64;  // of a block
constexpr int kMostSide = 8;
#ifdef __AVX512F__
constexpr int kRows = 14, kPanels = 2;  // tiles and panels of sixteen outputs that registers hold the sums of
#else
constexpr int kRows = 6, kPanels = 1;
#endif

int parts_of(int number, int most) { return (number + most - 1) / most; }
int start_of(int number, int part, int parts) { return static_cast<int>(static_cast<int64_t>(number) * part / parts); }
int least(int a, int b) { return a < b ? a : b; }
void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
int padded(int channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// The blocks of an image.
struct Blocks {
  int tiles_down, tiles_right, down, right;
  Blocks(const Convolution& convolution, int height, int width) {
    const int scale = convolution.doubled ? 2 : 1;
    // Spectra of a block are to stay in the second-level cache, and weights are to be read seldom.
    const int tiles = convolution.inputs <= 64 ? kMostTiles : convolution.inputs <= 256 ? 32 : 16;
    const int most_down = tiles < kMostTiles ? 4 : kMostSide;
    tiles_down = parts_of(scale * height, kTile);
    tiles_right = parts_of(scale * width, kTile);
    down = parts_of(tiles_down, most_down);
    right = parts_of(tiles_right, tiles / most_down);
  }
  int count() const { return down * right; }
};

// One block's tiles, and their groups of rows for the products.
struct Block {
  int top, left, height, width;  // in tiles
  int groups;
  Block(const Blocks& blocks, int number) {
    const int i = number / blocks.right, j = number % blocks.right;
    top = start_of(blocks.tiles_down, i, blocks.down);
    left = start_of(blocks.tiles_right, j, blocks.right);
    height = start_of(blocks.tiles_down, i + 1, blocks.down) - top;
    width = start_of(blocks.tiles_right, j + 1, blocks.right) - left;
    groups = parts_of(tiles(), kRows);
  }
  int tiles() const { return height * width; }
  int first(int group) const { return start_of(tiles(), group, groups); }
};

// ------------------------------------------------------------------------------------------------------ products

// Spectra (C / 16, .., Rows, 16), `step` floats from one sixteen of channels to the next, times a panel (C, Panels * 16)
// -> for each sixteen outputs (Rows, 16), `out_step` floats apart.
template <int Rows, int Panels>
void multiply(const float* spectra, int64_t step, const float* panel, int C, float* out, int64_t out_step, const float* next, int lines) {
  for (int start = 0; start < C; start += kChain) {
    Floats sums[Rows][Panels];
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Panels; ++p) sums[r][p] = all(0.0f);
    const int stop = least(C, start + kChain);
    for (int c = start; c < stop; c += kLanes, spectra += step) {
      for (int i = 0; i < kLanes; ++i, panel += Panels * kLanes) {
        Floats weights[Panels];
        for (int p = 0; p < Panels; ++p) weights[p] = load(panel + p * kLanes);
        for (int r = 0; r < Rows; ++r) {
          const Floats x = all(spectra[r * kLanes + i]);
          for (int p = 0; p < Panels; ++p) sums[r][p] = fma(x, weights[p], sums[r][p]);
        }
      }
      for (int i = 0; i < lines; ++i, next += kLanes) prefetch(next);
    }
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Panels; ++p) {
        float* to = out + p * out_step + r * kLanes;
        store(to, start == 0 ? sums[r][p] : load(to) + sums[r][p]);
      }
  }
}

using Multiply = void (*)(const float*, int64_t, const float*, int, float*, int64_t, const float*, int);

template <int Panels>
Multiply multiply_of(int rows) {
#define KODALLE_SIX multiply<1, Panels>, multiply<2, Panels>, multiply<3, Panels>, multiply<4, Panels>, multiply<5, Panels>, multiply<6, Panels>
#ifdef __AVX512F__
  static constexpr Multiply kBy[] = {KODALLE_SIX,          multiply<7, Panels>,  multiply<8, Panels>,  multiply<9, Panels>, multiply<10, Panels>,
                                     multiply<11, Panels>, multiply<12, Panels>, multiply<13, Panels>, multiply<14, Panels>};
#else
  static constexpr Multiply kBy[] = {KODALLE_SIX};
#endif
  return kBy[rows - 1];
}

// ------------------------------------------------------------------------------------------------------ a block

Floats silu(Floats x) { return x / (all(1.0f) + exp(all(0.0f) - x)); }

// A block's pixels of sixteen channels from `channel` on, activated, with their neighbours and zeros where the image ends.
template <typename Kind>
void fill(const Convolution& convolution, const Image& image, const Block& block, int channel, float* pixels) {
  const int rows = block.height * Kind::kStep + 2, columns = block.width * Kind::kStep + 2;
  const int top = block.top * Kind::kStep - 1, left = block.left * Kind::kStep - 1;
  const int first = left < 0 ? 1 : 0, last = least(columns, image.width - left);
  const bool activates = image.scale != nullptr;
  const Floats scale = activates ? load(image.scale + channel) : all(1.0f);
  const Floats shift = activates ? load(image.shift + channel) : all(0.0f);
  for (int i = 0; i < rows; ++i, pixels += columns * kLanes) {
    if (top + i < 0 || top + i >= image.height) {
      std::memset(pixels, 0, columns * kLanes * sizeof(float));
      continue;
    }
    const int64_t C = convolution.inputs;
    const float* from = image.source + (static_cast<int64_t>(top + i) * image.width + left) * C + channel;
    for (int j = 0; j < first; ++j) store(pixels + j * kLanes, all(0.0f));
    if (activates) {
      for (int j = first; j < last; ++j) {
        prefetch(from + j * C + kLanes);  // the next channels'
        store(pixels + j * kLanes, silu(fma(load(from + j * C), scale, shift)));
      }
    } else {
      for (int j = first; j < last; ++j) store(pixels + j * kLanes, load(from + j * C));
    }
    for (int j = last; j < columns; ++j) store(pixels + j * kLanes, all(0.0f));
  }
}

// Moments of sixteen channels over a block: sums around a value near the mean, so that squares lose nothing.
struct Sums {
  Floats origin, sum, squares, lowest, highest;
  int count = 0;
  void add(const Floats* pixels, int number) {
    if (count == 0) {
      origin = lowest = highest = pixels[0];
      sum = squares = all(0.0f);
    }
    Floats part = all(0.0f), part_squares = all(0.0f);  // two levels of sums round less than one
    for (int i = 0; i < number; ++i) {
      const Floats off = pixels[i] - origin;
      part += off;
      part_squares = fma(off, off, part_squares);
      lowest = min(lowest, pixels[i]);
      highest = max(highest, pixels[i]);
    }
    sum += part;
    squares += part_squares;
    count += number;
  }
  void write(float* to, int64_t step) const {
    const Floats number = all(static_cast<float>(count));
    const Floats off = sum / number;
    store(to, origin + off);
    store(to + step, max(squares / number - off * off, all(0.0f)));
    store(to + 2 * step, lowest);
    store(to + 3 * step, highest);
  }
};

struct Memory {
  float* pixels;    // of sixteen channels
  float* spectra;   // for each group of rows (C / 16, spectra, rows, 16)
  float* products;  // for each group of rows (kPanels, frequencies, rows, 16)
};

template <typename Kind>
struct Convolving {
  static constexpr int kSpectra = Kind::kSpectrum * Kind::kSpectrum;
  static constexpr int kProducts = Kind::kFrequencies * Kind::kFrequencies;
  const Convolution& convolution;
  const Image& image;
  const Memory& memory;

  static int64_t panel_floats(const Convolution& convolution, int panels) {
    return static_cast<int64_t>(kProducts) * convolution.inputs * panels * kLanes;
  }

  void block(int number, const Block& block) const {
    for (int c = 0; c < convolution.inputs; c += kLanes) {
      fill<Kind>(convolution, image, block, c, memory.pixels);
      spectra(block, c);
    }
    const int panels = padded(convolution.outputs) / kLanes;
    const float* weights = convolution.panels;
    for (int panel = 0; panel < panels; panel += kPanels) {
      const int count = least(kPanels, panels - panel);
      if (count == kPanels) {
        products<kPanels>(block, panel, weights);
      } else {
        products<1>(block, panel, weights);
      }
      weights += panel_floats(convolution, count);
      for (int p = 0; p < count; ++p) pixels(number, block, panel + p, memory.products + p * kProducts * kRows * kLanes);
    }
    if (image.moments != nullptr) image.counts[number] = static_cast<float>(target_pixels(block));
  }

  int64_t target_pixels(const Block& block) const {
    const int height = least(kTile * block.height, target_height() - kTile * block.top);
    return static_cast<int64_t>(height) * least(kTile * block.width, target_width() - kTile * block.left);
  }

  int target_height() const { return convolution.doubled ? 2 * image.height : image.height; }
  int target_width() const { return convolution.doubled ? 2 * image.width : image.width; }

  void spectra(const Block& block, int channel) const {
    const int64_t row = (block.width * Kind::kStep + 2) * kLanes;
    for (int group = 0; group < block.groups; ++group) {
      const int first = block.first(group), height = block.first(group + 1) - first;
      float* to = memory.spectra + (static_cast<int64_t>(first) * convolution.inputs + static_cast<int64_t>(channel) * height) * kSpectra;
      for (int r = 0; r < height; ++r) {
        const int i = (first + r) / block.width, j = (first + r) % block.width;
        transform_in<Kind>(memory.pixels + i * Kind::kStep * row + j * Kind::kStep * kLanes, row, to + r * kLanes, height * kLanes);
      }
    }
  }

  template <int Panels>
  void products(const Block& block, int panel, const float* weights) const {
    const int64_t C = convolution.inputs, size = C * Panels * kLanes;
    const int lines = parts_of(Panels * kLanes, block.groups);  // of the next panel, for each sixteen channels
    for (int f = 0; f < kProducts; ++f, weights += size) {
      const int source = Kind::kSource[f / Kind::kFrequencies] * Kind::kSpectrum + Kind::kSource[f % Kind::kFrequencies];
      for (int group = 0; group < block.groups; ++group) {
        const int first = block.first(group), height = block.first(group + 1) - first;
        const float* from = memory.spectra + static_cast<int64_t>(first) * C * kSpectra + static_cast<int64_t>(source) * height * kLanes;
        float* to = memory.products + static_cast<int64_t>(group) * kPanels * kProducts * kRows * kLanes + f * height * kLanes;
        multiply_of<Panels>(height)(from, static_cast<int64_t>(kSpectra) * height * kLanes, weights, static_cast<int>(C), to,
                                    kProducts * kRows * kLanes, weights + size + group * size / block.groups, lines);
      }
    }
  }

  // Sixteen outputs of a block.
  void pixels(int number, const Block& block, int panel, const float* products) const {
    const int64_t K = convolution.outputs, row = K * target_width();
    const int width = least(kLanes, static_cast<int>(K) - panel * kLanes);
    const Floats bias = load(convolution.bias + panel * kLanes);
    Sums sums;
    for (int group = 0; group < block.groups; ++group, products += kPanels * kProducts * kRows * kLanes) {
      const int first = block.first(group), height = block.first(group + 1) - first;
      for (int r = 0; r < height; ++r) {
        Floats tile[kTile][kTile];
        transform_out<Kind>(products + r * kLanes, height * kLanes, tile);
        const int top = kTile * (block.top + (first + r) / block.width), left = kTile * (block.left + (first + r) % block.width);
        float* to = image.target + top * row + left * K + panel * kLanes;
        const int rows = least(kTile, target_height() - top), columns = least(kTile, target_width() - left);
        if (rows == kTile && columns == kTile && width == kLanes) {
          write<true>(tile, bias, to, row, kTile, kTile, kLanes, sums);
        } else {
          write<false>(tile, bias, to, row, rows, columns, width, sums);
        }
      }
    }
    if (image.moments != nullptr) {
      const int64_t step = padded(convolution.outputs);
      sums.write(image.moments + 4 * step * number + panel * kLanes, step);
    }
  }

  template <bool Whole>
  void write(Floats (&tile)[kTile][kTile], Floats bias, float* to, int64_t row, int rows, int columns, int width, Sums& sums) const {
    const int64_t K = convolution.outputs;
    for (int i = 0; i < (Whole ? kTile : rows); ++i) {
      for (int j = 0; j < (Whole ? kTile : columns); ++j) {
        float* place = to + i * row + j * K;
        prefetch(place + kLanes);  // the next panel's
        Floats& y = tile[i][j];
        y = y + bias;
        if (Whole) {
          if (image.add) y = y + load(place);
          store(place, y);
        } else {
          alignas(64) float some[kLanes] = {};
          if (image.add) std::memcpy(some, place, width * sizeof(float));
          if (image.add) y = y + load(some);
          store(some, y);
          std::memcpy(place, some, width * sizeof(float));
        }
      }
      if (image.moments != nullptr && !Whole) sums.add(tile[i], columns);
    }
    if (image.moments != nullptr && Whole) sums.add(&tile[0][0], kTile * kTile);
  }
};

thread_local Arena arena;

template <typename Kind>
void convolve(const Convolution& convolution, const Image& image, int first, int last) {
  const Blocks blocks(convolution, image.height, image.width);
  const int64_t C = convolution.inputs;
  constexpr int64_t kSide = kMostSide * Kind::kStep + 2, kPixels = kSide * kSide;
  constexpr int64_t kGroups = (kMostTiles + kRows - 1) / kRows;
  const int64_t spectra = kMostTiles * C * Convolving<Kind>::kSpectra;
  constexpr int64_t kSums = kGroups * kPanels * Convolving<Kind>::kProducts * kRows * kLanes;
  arena.begin(Arena::padded(kPixels * kLanes * 4) + Arena::padded(spectra * 4) + Arena::padded(kSums * 4));
  Memory memory;
  memory.pixels = arena.take<float>(kPixels * kLanes);
  memory.spectra = arena.take<float>(spectra);
  memory.products = arena.take<float>(kSums);
  const Convolving<Kind> convolving{convolution, image, memory};
  for (int number = first; number < last; ++number) convolving.block(number, Block(blocks, number));
}

int frequencies(const Convolution& convolution) { return convolution.doubled ? 25 : 36; }

}  // namespace

extern "C" {

int32_t kodalle_convolution_interface() { return 1; }

int64_t kodalle_convolution_floats(const Convolution* convolution) {
  return static_cast<int64_t>(frequencies(*convolution)) * convolution->inputs * padded(convolution->outputs);
}

void kodalle_pack_convolution(const Convolution* convolution, const float* spectra, float* to) {
  const int64_t C = convolution->inputs, K = convolution->outputs;
  const int panels = padded(convolution->outputs) / kLanes;
  for (int panel = 0; panel < panels; panel += kPanels) {
    const int width = least(kPanels, panels - panel) * kLanes;
    for (int f = 0; f < frequencies(*convolution); ++f)
      for (int64_t c = 0; c < C; ++c, to += width) {
        const int64_t first = panel * kLanes, there = K - first < width ? K - first : width;
        std::memcpy(to, spectra + (f * C + c) * K + first, there * sizeof(float));
        std::memset(to + there, 0, (width - there) * sizeof(float));
      }
  }
}

int32_t kodalle_convolution_blocks(const Convolution* convolution, int32_t height, int32_t width) {
  return Blocks(*convolution, height, width).count();
}

void kodalle_convolve(const Convolution* convolution, const Image* image, int32_t first, int32_t last) {
  if (convolution->doubled) {
    convolve<Doubled>(*convolution, *image, first, last);
  } else {
    convolve<Plain>(*convolution, *image, first, last);
  }
}

}  // extern "C"
