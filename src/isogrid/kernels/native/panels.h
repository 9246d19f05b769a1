// A panel of rows, feature-major, backwards through a stage: what it took, and what its weights get.
#pragma once

#include "stages.h"

namespace isogrid {

// Rows that one product takes, and terms that one sum of outer products takes.
constexpr int64_t kStep = 64;
// Rows of a panel: many where weights are read and their sums written for each, few where what stands for the rows then
// stays in the cache.
constexpr int64_t kMostPanelRows = 256;
constexpr int64_t kPanelBytes = 768 * 1024;

struct Panels {
  int64_t rows, width;
  template <typename... Factors>
  Panels(int64_t count, int64_t features, const Factors&... factors) : rows(count), width(kMostPanelRows) {
    const int64_t weights = (factors.numel() + ...), size = (factors.element_size(), ...);
    while (width > kStep && width * features * size > std::max(kPanelBytes, 4 * weights * size)) width /= 2;
  }
  Tile at(int64_t begin) const {  // of few strides: each makes new products
    const int64_t count = std::min(width, rows - begin);
    return rows <= kStep ? Tile(count) : Tile(count, width + kLane);
  }
};

// Feature-major rows as a product takes them on its right: pairs of features. Floats it takes as they are.
inline void right_side(const float*, const Tile&, int64_t, int64_t, float*) {}

inline void right_side(
    const BFloat16* rows, const Tile& tile, int64_t count, int64_t width, BFloat16* room) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t t = 0; t < width; t += kLane) {
      const auto* one = reinterpret_cast<const __m256i*>(rows + i * tile.stride + t);
      const auto* other = reinterpret_cast<const __m256i*>(rows + (i + 1) * tile.stride + t);
      const __m256i upper = i + 1 < count ? _mm256_loadu_si256(other) : _mm256_setzero_si256();
      _mm512_storeu_si512(
          room + i * width + 2 * t, _mm512_permutex2var_epi16(
                                        _mm512_castsi256_si512(_mm256_loadu_si256(one)), low,
                                        _mm512_castsi256_si512(upper)));
    }
}

// The same rows with features beside each other, as sums over rows take them on their right: (rows, count); bfloat16:
// (rows / 2, count, 2). Two neighbours of a row move as one unit.
template <typename scalar>
void by_rows(const scalar* rows, const Tile& tile, int64_t count, int64_t width, scalar* room) {
  constexpr int64_t pair = sizeof(float) / sizeof(scalar);
  auto* to = reinterpret_cast<float*>(room);
  turn(
      reinterpret_cast<const float*>(rows), tile.stride / pair, count, width / pair, width / pair, count,
      [&](int64_t t) { return to + t * count; });
}

inline void keep(const float* from, int64_t width, float* to) {
  for (int64_t t = 0; t < width; t += kLane) _mm512_storeu_ps(to + t, _mm512_loadu_ps(from + t));
}

inline void keep(const float* from, int64_t width, BFloat16* to) {
  for (int64_t t = 0; t < width; t += kLane)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + t), halves(_mm512_loadu_ps(from + t)));
}

inline void keep(const BFloat16* from, int64_t width, BFloat16* to) {
  for (int64_t t = 0; t < width; t += kLane)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + t), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + t)));
}

// work(part, first, count): so many numbers in equal parts.
struct Part {
  int64_t number, parts;
  void of(int64_t count, int64_t& first, int64_t& size) const {
    const int64_t each = ((count + parts - 1) / parts + kLane - 1) / kLane * kLane;
    first = std::min(number * each, count);
    size = std::min(each, count - first);
  }
};

// work(block, part): blocks to threads, or parts of each where there are few; one after the other where all add up.
template <typename F>
void over_parts(int64_t blocks, bool together, const F& work) {
  const int64_t threads = at::get_num_threads();
  const int64_t parts = threads == 1 ? 1 : together ? threads : (threads + blocks - 1) / blocks;
  at::parallel_for(0, together ? parts : blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t c = together ? 0 : n / parts; c < (together ? blocks : n / parts + 1); ++c)
        work(c, Part{n % parts, parts});
    at::native::cpublas::brgemm_release();
  });
}

// left (m, n) · rows (n, tile): `left` gives some rows of its matrix, `give` takes each row of a step's columns.
template <typename scalar, typename Left, typename Give>
void product(int64_t m, int64_t n, const Left& left, const scalar* rows, const Tile& tile, const Give& give) {
  Scratch scratch;
  auto* turned = scratch.take<scalar>(kChunk * n);
  auto* paired = kPaired<scalar> ? scratch.take<scalar>((n + 1) * tile.padded) : nullptr;
  for (int64_t t = 0; t < tile.padded && paired != nullptr; t += kStep)
    right_side(rows + t, tile, n, std::min(kStep, tile.padded - t), paired + t * (n + 1));
  for (int64_t i = 0; i < m; i += kChunk) {
    const int64_t some = std::min(kChunk, m - i);
    const Matrix<scalar> a = left(i, some, turned);
    for (int64_t t = 0; t < tile.padded; t += kStep) {
      const int64_t width = std::min(kStep, tile.padded - t);
      if constexpr (kPaired<scalar>)
        give(i, some, t, width, a, Matrix<scalar>{paired + t * (n + 1), width});
      else
        give(i, some, t, width, a, Matrix<scalar>{rows + t, tile.stride});
    }
  }
}

// The same, each row of floats rounded to its place.
template <typename scalar, typename Left, typename Place>
void product_at(int64_t m, int64_t n, const Left& left, const scalar* rows, const Tile& tile, const Place& place) {
  Scratch scratch;
  auto* found = scratch.take<float>(kChunk * (kStep + kLane));
  product(m, n, left, rows, tile, [&](int64_t i, int64_t some, int64_t t, int64_t width, auto a, auto b) {
    multiply(some, width, n, a.data, a.step, b.data, b.step, found, kStep + kLane);
    for (int64_t j = 0; j < some; ++j) keep(found + j * (kStep + kLane), width, place(i + j) + t);
  });
}

// The same, straight to floats or added to them.
template <typename scalar, typename Left>
void product_into(
    int64_t m, int64_t n, const Left& left, const scalar* rows, const Tile& tile, float* to, bool more) {
  product(m, n, left, rows, tile, [&](int64_t i, int64_t some, int64_t t, int64_t width, auto a, auto b) {
    multiply(some, width, n, a.data, a.step, b.data, b.step, to + i * tile.stride + t, tile.stride, more);
  });
}

// left (m, tile) · right (n, tile)^T: added to `sums`, or rounded to `whole` where there are no other rows.
template <typename scalar>
void outer_products(
    int64_t m, int64_t n, const scalar* left, const scalar* right, const Tile& tile, float* sums, scalar* whole,
    int64_t step, bool more) {
  Scratch scratch;
  auto* by_row = scratch.take<scalar>(tile.padded * n + 2 * kLane);
  auto* found = whole == nullptr ? nullptr : scratch.take<float>(kChunk * n + kLane);
  for (int64_t t = 0; t < tile.padded; t += kStep)
    by_rows(right + t, tile, n, std::min(kStep, tile.padded - t), by_row + t * n);
  for (int64_t i = 0; i < m; i += kChunk) {
    const int64_t some = std::min(kChunk, m - i), pitch = found == nullptr ? step : n;
    float* to = found == nullptr ? sums + i * step : found;
    for (int64_t t = 0; t < tile.padded; t += kStep)
      multiply(
          some, n, std::min(kStep, tile.padded - t), left + i * tile.stride + t, tile.stride, by_row + t * n, n, to,
          pitch, more || t > 0);
    for (int64_t j = 0; j < some && found != nullptr; ++j) round_to(found + j * n, n, whole + (i + j) * step);
  }
}

// A stage, what it took, and the gradients of its blocks as they lie: sums of floats, or numbers where all rows are in
// one panel.
template <typename scalar>
struct Stage {
  Weights<scalar> w;
  int64_t blocks;
  float* sums;
  scalar* whole;
  bool together() const { return w.block == 0 && blocks > 1; }
  bool wanted() const { return sums != nullptr || whole != nullptr; }

  // hidden (count, tile) of each block = outputs first … of the block · taken.
  void forward(int64_t first, int64_t count, const scalar* taken, const Tile& tile, scalar* hidden) const {
    over_parts(blocks, false, [&](int64_t c, const Part& part) {
      int64_t start, some;
      part.of(count, start, some);
      scalar* to = hidden + (c * count + start) * tile.stride;
      const auto left = [&](int64_t i, int64_t n, scalar* room) { return w.outputs(c, first + start + i, n, room); };
      product_at(some, w.in, left, taken + c * w.in * tile.stride, tile, [&](int64_t i) { return to + i * tile.stride; });
    });
  }

  // Of a block, or of the outputs first … of it: gradient (count, tile) times taken (in, tile).
  void add(
      int64_t c, int64_t first, int64_t count, const scalar* gradient, const scalar* taken, const Tile& tile,
      bool more, const Part& part) const {
    int64_t start, some;
    part.of(w.turned ? w.in : count, start, some);
    if (some == 0) return;
    const int64_t at = c * w.block + (w.turned ? start * w.step + first : (first + start) * w.step);
    float* to = sums == nullptr ? nullptr : sums + at;
    scalar* rounded = whole == nullptr ? nullptr : whole + at;
    const bool again = more || (together() && c > 0);
    if (w.turned)
      outer_products(some, count, taken + start * tile.stride, gradient, tile, to, rounded, w.step, again);
    else
      outer_products(some, w.in, gradient + start * tile.stride, taken, tile, to, rounded, w.step, again);
  }
};

// A panel of rows, feature-major, missing features zero.
template <typename scalar>
void take(const Tensor& x, int64_t begin, const Order& order, const Tile& tile, scalar* to) {
  const scalar* from = x.const_data_ptr<scalar>() + begin * x.stride(0);
  const int64_t steps = (tile.padded + kStep - 1) / kStep;
  at::parallel_for(0, steps, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t t = n * kStep, width = std::min(kStep, tile.padded - t);
      turn(
          from + t * x.stride(0), x.stride(0), tile.rows - t, x.size(1), order.blocks * order.size, width,
          [&](int64_t f) { return to + order.row(f) * tile.stride + t; });
    }
  });
}

template <typename scalar>
void give(const float* found, int64_t begin, const Order& order, const Tile& tile, Tensor& dx) {
  scalar* to = dx.mutable_data_ptr<scalar>() + begin * dx.stride(0);
  const int64_t steps = (tile.rows + kStep - 1) / kStep;
  at::parallel_for(0, steps, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t t = n * kStep;
      store(
          found + t, order, nullptr, to + t * dx.stride(0), dx.stride(0), dx.size(1),
          Tile(std::min(kStep, tile.rows - t), tile.stride));
    }
  });
}

// The first stage's gradients in a panel: of its input, added to what other groups gave, and of its weights.
template <typename scalar>
void first_backward(
    const Stage<scalar>& stage, int64_t first, int64_t count, const scalar* gradient, const scalar* taken,
    const Tile& tile, float* dtaken, bool more, bool more_sums) {
  const Weights<scalar>& w = stage.w;
  over_parts(stage.blocks, stage.together(), [&](int64_t c, const Part& part) {
    const scalar* grad = gradient + c * count * tile.stride;
    if (dtaken != nullptr) {
      int64_t start, some;
      part.of(w.in, start, some);
      const auto left = [&](int64_t i, int64_t n, scalar* room) {
        return w.inputs(c, start + i, n, first, count, room);
      };
      product_into(some, count, left, grad, tile, dtaken + (c * w.in + start) * tile.stride, more);
    }
    if (stage.wanted())
      stage.add(c, first, count, grad, taken + c * w.in * tile.stride, tile, more_sums, part);
  });
}

// The second stage's, blocks first … of it: of the units that it took, in the first stage's order, and of its weights.
template <typename scalar>
void second_backward(
    const Stage<scalar>& stage, int64_t first, int64_t count, const Shuffle& shuffle, const scalar* gradient,
    const scalar* hidden, const Tile& tile, scalar* dhidden, bool more_sums) {
  const Weights<scalar>& w = stage.w;
  over_parts(count, stage.together(), [&](int64_t a, const Part& part) {
    const int64_t c = first + a;
    const scalar* grad = gradient + c * w.out * tile.stride;
    if (dhidden != nullptr) {
      int64_t start, some;
      part.of(w.in, start, some);
      const auto left = [&](int64_t i, int64_t n, scalar* room) {
        return w.inputs(c, start + i, n, 0, w.out, room);
      };
      product_at(some, w.out, left, grad, tile, [&](int64_t i) {
        return dhidden + shuffle.place(a, start + i) * tile.stride;
      });
    }
    if (!stage.wanted()) return;
    Scratch scratch;
    auto* taken = scratch.take<scalar>(w.in * tile.stride);
    for (int64_t rho = 0; rho < w.in; ++rho)
      keep(hidden + shuffle.place(a, rho) * tile.stride, tile.padded, taken + rho * tile.stride);
    stage.add(c, 0, w.out, grad, taken, tile, more_sums, part);
  });
}

}  // namespace isogrid
