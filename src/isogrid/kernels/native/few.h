// One to four rows, as in decoding: weights are read once, and reading them is all that takes time.
#pragma once

#include "stages.h"

namespace isogrid {

constexpr int64_t kFewRows = 4;
// A second thread costs some microseconds: as much as reading this many bytes.
constexpr int64_t kThreadBytes = 128 * 1024;

inline int64_t rounded(int64_t count) {
  return (count + kLane - 1) / kLane * kLane;
}

inline __m512 sixteen(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

inline __m512 sixteen(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// found[n] = weights . x[n] for R rows x, `step` numbers apart. One row of weights at a time: memory gives a single
// stream twice as fast as four beside each other, and better without being asked beforehand.
template <int R, typename scalar>
inline void dots(const scalar* weights, int64_t n, const float* x, int64_t step, float* found, int64_t out_step) {
  __m512 even[R], odd[R];
  for (int m = 0; m < R; ++m) even[m] = odd[m] = _mm512_setzero_ps();
  int64_t j = 0;
  for (; j + 2 * kLane <= n; j += 2 * kLane) {
    const __m512 low = sixteen(weights + j, 0xffff), high = sixteen(weights + j + kLane, 0xffff);
    for (int m = 0; m < R; ++m) {
      even[m] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + m * step + j), even[m]);
      odd[m] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + m * step + j + kLane), odd[m]);
    }
  }
  for (; j < n; j += kLane) {
    const __mmask16 mask = n - j >= kLane ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512 last = sixteen(weights + j, mask);
    for (int m = 0; m < R; ++m)  // zeros up to a whole register
      even[m] = _mm512_fmadd_ps(last, _mm512_loadu_ps(x + m * step + j), even[m]);
  }
  for (int m = 0; m < R; ++m) found[m * out_step] = _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m]));
}

// One stage: block c of `blocks` takes numbers c * pitch … of x and gives c * out …
template <int R, typename scalar>
void few_stage(const Weights<scalar>& w, int64_t blocks, const float* x, int64_t pitch, float* found) {
  const int64_t step = blocks * pitch, out_step = blocks * w.out;
  const int64_t grain = std::max<int64_t>(kThreadBytes / std::max<int64_t>(w.in * sizeof(scalar), 1), 1);
  at::parallel_for(0, blocks * w.out, grain, [&](int64_t begin, int64_t end) {
    int64_t c = begin / w.out, t = begin % w.out;
    for (int64_t e = begin; e < end; ++e) {
      dots<R>(w.data + c * w.block + t * w.step, w.in, x + c * pitch, step, found + e, out_step);
      if (++t == w.out) t = 0, ++c;
    }
  });
}

template <typename F>
void for_rows(int64_t rows, const F& work) {
  switch (rows) {
    case 1: return work(std::integral_constant<int, 1>{});
    case 2: return work(std::integral_constant<int, 2>{});
    case 3: return work(std::integral_constant<int, 3>{});
    default: return work(std::integral_constant<int, 4>{});
  }
}

// Rows as floats, every block at a multiple of 16 numbers, zeros between.
template <typename scalar>
void few_load(const scalar* x, int64_t rows, int64_t step, int64_t features, const Order& order, int64_t pitch, float* to) {
  std::fill(to, to + rows * order.blocks * pitch, 0.0f);
  for (int64_t n = 0; n < rows; ++n) {
    float* row = to + n * order.blocks * pitch;
    const scalar* from = x + n * step;
    if (order.in_turn) {
      for (int64_t f = 0; f < features; ++f)
        row[f % order.blocks * pitch + f / order.blocks] = static_cast<float>(from[f]);
      continue;
    }
    for (int64_t c = 0; c * order.size < features; ++c)
      for (int64_t j = 0; j < std::min(order.size, features - c * order.size); ++j)
        row[c * pitch + j] = static_cast<float>(from[c * order.size + j]);
  }
}

// Hidden units to the blocks of the second stage, each at a multiple of 16 numbers, zeros between.
inline void few_deal(const float* hidden, int64_t rows, const Shuffle& shuffle, int64_t pitch, float* to) {
  std::fill(to, to + rows * shuffle.l * pitch, 0.0f);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t a = 0; a < shuffle.l; ++a) {
      const float* from = hidden + n * shuffle.k * shuffle.q + a * shuffle.apart;
      float* block = to + (n * shuffle.l + a) * pitch;
      for (int64_t rho = 0; rho < shuffle.r; ++rho) block[rho] = from[shuffle.unit[rho]];
    }
}

template <typename scalar>
void few_store(
    const float* found, int64_t rows, const Order& order, const float* bias, scalar* y, int64_t step,
    int64_t features) {
  for (int64_t n = 0; n < rows; ++n) {
    const float* from = found + n * order.blocks * order.size;
    for (int64_t f = 0; f < features; ++f)
      y[n * step + f] = static_cast<scalar>(from[order.row(f)] + (bias == nullptr ? 0.0f : bias[f]));
  }
}

}  // namespace isogrid
