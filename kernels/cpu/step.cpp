#include "step.h"

#include "arena.h"
#include "layers.h"
#include "sampling.h"

using namespace kodalle;

namespace {

thread_local Arena arena;

std::atomic<int64_t*> times{nullptr};  // see kodalle_time

Timer timer_of(int thread) {
  int64_t* by_thread = times.load(std::memory_order_relaxed);
  return Timer(by_thread == nullptr ? nullptr : by_thread + thread * kNumParts);
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Bytes of R rows as inputs of width K; those of float32 are the largest.
size_t inputs_size(int64_t R, int64_t K) {
  return Arena::padded(R * K * 4) + Arena::padded(R * 4) + Arena::padded(R * (K / kGroup + 1) * 4);
}

Inputs take_inputs(int64_t R, int64_t K) {
  Inputs inputs;
  inputs.packed = arena.take<uint8_t>(R * K * 4);
  inputs.scales = arena.take<float>(R);
  inputs.offsets = arena.take<int32_t>(R * (K / kGroup + 1));
  return inputs;
}

size_t own_size(int64_t R, int64_t widest, int64_t positions) {
  return Arena::padded(widest * 4) + Arena::padded(widest) + Arena::padded(2 * R * kLanes * 4) + Arena::padded(kQueries * positions * 4);
}

// The pieces of thread `number`, in memory that was taken for all threads.
Own own_of(uint8_t* memory, int number, int64_t R, int64_t widest, int64_t positions) {
  Own own;
  memory += number * own_size(R, widest, positions);
  own.row = reinterpret_cast<float*>(memory);
  memory += Arena::padded(widest * 4);
  own.rounded = memory;
  memory += Arena::padded(widest);
  own.panels = reinterpret_cast<float*>(memory);
  memory += Arena::padded(2 * R * kLanes * 4);
  own.scores = reinterpret_cast<float*>(memory);
  return own;
}

int find_runs(const Feed& feed, int* starts) {
  int count = 0;
  for (int r = 0; r < feed.num_rows; ++r)
    if (r == 0 || feed.sequences[r] != feed.sequences[r - 1]) starts[count++] = r;
  starts[count] = feed.num_rows;
  return count;
}

}  // namespace

extern "C" {

int32_t kodalle_interface() { return 2; }

void kodalle_time(int64_t* nanoseconds) { times.store(nanoseconds, std::memory_order_relaxed); }

int64_t kodalle_packed_bytes(int32_t kind, int64_t outputs, int64_t inputs) { return outputs / kLanes * panel_bytes(kind, inputs); }

void kodalle_pack(int32_t kind, int64_t outputs, int64_t inputs, const void* weight, const float* group_scales, uint8_t* panels) {
  pack(kind, outputs, inputs, weight, group_scales, panels);
}

void kodalle_multiply(const Linear* linear, int32_t num_rows, const float* x, float* y, int32_t num_threads) {
  const int64_t R = num_rows, K = linear->inputs;
  arena.begin(inputs_size(R, K) + num_threads * own_size(R, K, 0));
  const Inputs inputs = take_inputs(R, K);
  uint8_t* memory = arena.take<uint8_t>(num_threads * own_size(R, K, 0));
  run_together(num_threads, [&](int thread, Team& team) {
    const Own own = own_of(memory, thread, R, K, 0);
    const Tiles tiles(linear->kind, num_rows);
    const Share rows(num_rows, thread, team), panels(linear->outputs / kLanes, thread, team);
    for (int r = rows.first; r < rows.last; ++r) put_row(linear->kind, tiles, r, x + r * K, linear->inputs, own.rounded, inputs);
    team.wait();
    for (int p = panels.first; p < panels.last; ++p) {
      multiply_panel(*linear, p, tiles, inputs, own.panels, nullptr);
      for (int r = 0; r < num_rows; ++r) store(y + static_cast<int64_t>(r) * linear->outputs + p * kLanes, load(own.panels + r * kLanes));
    }
  });
}

void kodalle_feed(const Model* model, const Cache* cache, const Prefixes* prefixes, const Feed* feed, int32_t num_threads) {
  const int64_t R = feed->num_rows, C = model->dim, A = static_cast<int64_t>(model->num_heads) * model->head_dim, F = model->inner_dim;
  const int64_t inner = most(A, F), widest = most(C, inner);
  const int64_t positions = (num_blocks(cache->num_prefix) + cache->num_blocks) * kLanes;
  const size_t own = own_size(R, widest, positions);
  arena.begin(2 * Arena::padded(R * C * 4) + Arena::padded(R * 3 * A * 4) + Arena::padded(R * A * 4) + Arena::padded(R * F * 4) +
              inputs_size(R, C) + inputs_size(R, inner) + Arena::padded((R + 1) * 4) + num_threads * own);
  Pass pass;
  pass.num_rows = feed->num_rows;
  pass.x = arena.take<float>(R * C);
  pass.start = arena.take<float>(R * C);
  pass.qkv = arena.take<float>(R * 3 * A);
  pass.attended = arena.take<float>(R * A);
  pass.grown = arena.take<float>(R * F);
  pass.normed = take_inputs(R, C);
  pass.inner = take_inputs(R, inner);
  pass.run_starts = arena.take<int>(R + 1);
  pass.num_runs = find_runs(*feed, pass.run_starts);
  uint8_t* memory = arena.take<uint8_t>(num_threads * own);
  run_together(num_threads, [&](int thread, Team& team) {
    const Own own = own_of(memory, thread, R, widest, positions);
    Timer timer = timer_of(thread);
    Step{*model, *cache, *prefixes, *feed, pass, own, thread, team, timer}.run();
  });
}

void kodalle_predict(const Model* model, const Predict* predict, int32_t num_threads) {
  const int64_t R = predict->num_rows, C = model->dim, V = model->head.outputs;
  arena.begin(inputs_size(R, C) + num_threads * own_size(R, 2 * C, 0));
  const Inputs inputs = take_inputs(R, C);
  uint8_t* memory = arena.take<uint8_t>(num_threads * own_size(R, 2 * C, 0));
  run_together(num_threads, [&](int thread, Team& team) {
    Timer timer = timer_of(thread);
    const Own own = own_of(memory, thread, R, 2 * C, 0);
    const Tiles tiles(model->head.kind, predict->num_rows);
    const Share rows(predict->num_rows, thread, team), panels(model->head.outputs / kLanes, thread, team);
    for (int r = rows.first; r < rows.last; ++r) {
      normalise(predict->hidden + predict->rows[r] * C, model->head_norm, model->dim, own.row);
      if (predict->unconditional[r] >= 0) {  // the head is linear: guiding its input guides its output
        float* null = own.row + C;
        normalise(predict->hidden + predict->unconditional[r] * C, model->head_norm, model->dim, null);
        for (int c = 0; c < C; c += kLanes)
          store(own.row + c, load(null + c) + all(predict->guidance[r]) * (load(own.row + c) - load(null + c)));
      }
      timer.lap(kNormPart);
      put_row(model->head.kind, tiles, r, own.row, model->dim, own.rounded, inputs);
      timer.lap(kQuantisePart);
    }
    team.wait();
    timer.lap(kWaitPart);
    for (int p = panels.first; p < panels.last; ++p) {
      multiply_panel(model->head, p, tiles, inputs, own.panels, p + 1 < panels.last ? panel_at(model->head, p + 1) : nullptr);
      for (int r = 0; r < predict->num_rows; ++r) store(predict->logits + r * V + p * kLanes, load(own.panels + r * kLanes));
    }
    timer.lap(kHeadPart);
  });
}

void kodalle_sample(const Sample* sample, int32_t num_threads) {
  run_together(num_threads, [&](int thread, Team& team) {
    Timer timer = timer_of(thread);
    const Share rows(sample->num_rows, thread, team);
    for (int r = rows.first; r < rows.last; ++r) sample_row(*sample, r);
    timer.lap(kSamplingPart);
  });
}

}  // extern "C"
