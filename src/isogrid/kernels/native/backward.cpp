// Gradients of the products: a panel of rows at a time, feature-major, blocks one after the other.
//
// Hidden units are multiplied anew: nothing is kept from the forward product but its inputs. Every sum over rows is
// made by one thread, in order.

#include "stages.h"

#include <torch/library.h>

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

// Any number of them.
inline void keep_some(const float* from, int64_t count, float* to) {
  std::copy(from, from + count, to);
}

inline void keep_some(const float* from, int64_t count, BFloat16* to) {
  for (int64_t j = 0; j < count; j += kLane) {
    const __mmask16 mask = lanes(count - j);
    _mm256_mask_storeu_epi16(to + j, mask, halves(_mm512_maskz_loadu_ps(mask, from + j)));
  }
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

// Rows of a product's left side, and of sums, that stay in the first cache meanwhile.
constexpr int64_t kChunk = 64;

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
    for (int64_t j = 0; j < some && found != nullptr; ++j) keep_some(found + j * n, n, whole + (i + j) * step);
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

template <typename F>
void by_dtype(const Tensor& x, const F& work) {
  if (x.scalar_type() == at::kFloat)
    work(float{});
  else
    work(BFloat16{});
}

// Room for the gradient of a stage's weights: sums of floats, rounded once in the end; or the rounded numbers, where no
// other panel and no other block adds to them.
Tensor room_for(const Tensor& w, int64_t blocks, const Panels& panels, bool wanted) {
  if (!wanted) return at::empty({0}, w.options());
  const bool once = panels.rows <= panels.width && (blocks == 1 || w.size(0) > 1);
  Tensor found = at::empty_like(w, w.options().dtype(once ? w.scalar_type() : at::kFloat));
  return panels.rows > 0 ? found : found.zero_();
}

template <typename scalar>
Stage<scalar> stage_of(const Tensor& w, int64_t blocks, Tensor& gradient) {
  Stage<scalar> stage{Weights<scalar>(w), blocks, nullptr, nullptr};
  if (gradient.numel() > 0 && gradient.scalar_type() == at::kFloat)
    stage.sums = gradient.mutable_data_ptr<float>();
  else if (gradient.numel() > 0)
    stage.whole = gradient.mutable_data_ptr<scalar>();
  return stage;
}

Tensor like(const Tensor& x, bool wanted) {
  return wanted ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
}

Tensor rows_of(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous();
}

std::tuple<Tensor, Tensor> blocked_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, int64_t blocks, bool in_turn, bool out_turn,
    std::array<bool, 2> wanted) {
  if (x.scalar_type() == at::kHalf) return in_floats(blocked_backward, g, x, w, blocks, in_turn, out_turn, wanted);
  const Tensor grad = rows_of(g), from = rows_of(x), weights = as_it_lies(w);
  const Panels panels(g.size(0), blocks * (2 * w.size(2) + w.size(1)), w);
  Tensor dx = like(x, wanted[0]), dw = room_for(weights, blocks, panels, wanted[1]);
  by_dtype(x, [&](auto number) {
    using scalar = decltype(number);
    const auto stage = stage_of<scalar>(weights, blocks, dw);
    const Order in(blocks, stage.w.in, in_turn), out(blocks, stage.w.out, out_turn);
    for (int64_t begin = 0; begin < g.size(0); begin += panels.width) {
      const Tile tile = panels.at(begin);
      Scratch scratch;
      auto* given = scratch.take<scalar>(blocks * out.size * tile.stride);
      auto* taken = wanted[1] ? scratch.take<scalar>(blocks * in.size * tile.stride) : nullptr;
      auto* dtaken = wanted[0] ? scratch.take<float>(blocks * in.size * tile.stride) : nullptr;
      take(grad, begin, out, tile, given);
      if (taken != nullptr) take(from, begin, in, tile, taken);
      first_backward(stage, 0, out.size, given, taken, tile, dtaken, false, begin > 0);
      if (dtaken != nullptr) give<scalar>(dtaken, begin, in, tile, dx);
    }
  });
  return {dx, dw.to(w.scalar_type())};
}

// Hidden units of a panel that are held at once, in bytes.
constexpr int64_t kHiddenBytes = 2 * 1024 * 1024;

std::tuple<Tensor, Tensor, Tensor> two_stage_backward(
    const Tensor& g, const Tensor& x, const Tensor& first, const Tensor& second, at::IntArrayRef blocks, bool in_runs,
    bool interleave, std::array<bool, 3> wanted) {
  if (x.scalar_type() == at::kHalf)
    return in_floats(two_stage_backward, g, x, first, second, blocks, in_runs, interleave, wanted);
  const int64_t k = blocks[0], l = blocks[1];
  const Tensor grad = rows_of(g), from = rows_of(x), one = as_it_lies(first), two = as_it_lies(second);
  const Panels panels(g.size(0), 2 * k * (first.size(1) + first.size(2)) + l * second.size(1), first, second);
  Tensor dx = like(x, wanted[0]), dfirst = room_for(one, k, panels, wanted[1]);
  Tensor dsecond = room_for(two, l, panels, wanted[2]);
  by_dtype(x, [&](auto number) {
    using scalar = decltype(number);
    const auto before = stage_of<scalar>(one, k, dfirst), after = stage_of<scalar>(two, l, dsecond);
    const Order in(k, before.w.in, false), out(l, after.w.out, interleave);
    Shuffle shuffle(k, before.w.out, l, after.w.in, in_runs);
    const int64_t bytes = after.w.in * panels.at(0).stride * static_cast<int64_t>(sizeof(scalar));
    shuffle.group(std::max<int64_t>(kHiddenBytes / bytes, 1));
    const int64_t n = shuffle.blocks, run = shuffle.apart;
    for (int64_t begin = 0; begin < g.size(0); begin += panels.width) {
      const Tile tile = panels.at(begin);
      const bool back = wanted[0] || wanted[1];
      Scratch scratch;
      auto* given = scratch.take<scalar>(l * out.size * tile.stride);
      auto* taken = wanted[1] || wanted[2] ? scratch.take<scalar>(k * in.size * tile.stride) : nullptr;
      auto* hidden = wanted[2] ? scratch.take<scalar>(k * shuffle.units * tile.stride) : nullptr;
      auto* dhidden = back ? scratch.take<scalar>(k * shuffle.units * tile.stride) : nullptr;
      auto* dtaken = wanted[0] ? scratch.take<float>(k * in.size * tile.stride) : nullptr;
      take(grad, begin, out, tile, given);
      if (taken != nullptr) take(from, begin, in, tile, taken);
      shuffle.group(n);
      for (int64_t a = 0; a < l; a += n) {
        const int64_t some = std::min(n, l - a);
        if (some < n) shuffle.group(some);
        const int64_t start = in_runs ? a * run : 0, units = shuffle.units;
        if (hidden != nullptr) before.forward(start, units, taken, tile, hidden);
        second_backward(after, a, some, shuffle, given, hidden, tile, dhidden, begin > 0);
        if (back) first_backward(before, start, units, dhidden, taken, tile, dtaken, a > 0, begin > 0);
      }
      if (dtaken != nullptr) give<scalar>(dtaken, begin, in, tile, dx);
    }
  });
  return {dx, dfirst.to(x.scalar_type()), dsecond.to(x.scalar_type())};
}

// What a coupling (row blocks, column blocks, rank) makes of hidden units, and what it gets back.
template <typename scalar>
__m512 sixteen_of(const scalar* from);
template <>
__m512 sixteen_of(const float* from) {
  return _mm512_loadu_ps(from);
}
template <>
__m512 sixteen_of(const BFloat16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// to[i, rho] = sum_j coupling[i, j, rho] from[j, rho]; transposed: [j, i, rho].
template <typename scalar>
void coupled(
    int64_t b, int64_t r, const float* coupling, bool transposed, const scalar* from, const Tile& tile, scalar* to) {
  at::parallel_for(0, r, std::max<int64_t>(r / at::get_num_threads(), 1), [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kMostPanelRows];
    for (int64_t rho = begin; rho < end; ++rho)
      for (int64_t i = 0; i < b; ++i) {
        for (int64_t t = 0; t < tile.padded; t += kLane) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t j = 0; j < b; ++j) {
            const float scale = coupling[(transposed ? j * b + i : i * b + j) * r + rho];
            sum = _mm512_fmadd_ps(_mm512_set1_ps(scale), sixteen_of(from + (j * r + rho) * tile.stride + t), sum);
          }
          _mm512_store_ps(sums + t, sum);
        }
        keep(sums, tile.padded, to + (i * r + rho) * tile.stride);
      }
  });
}

// sums[i, j, rho] += sum over rows of gradient[i, rho] hidden[j, rho]
template <typename scalar>
void coupling_backward(
    int64_t b, int64_t r, const scalar* gradient, const scalar* hidden, const Tile& tile, float* sums, bool more) {
  at::parallel_for(0, r, std::max<int64_t>(r / at::get_num_threads(), 1), [&](int64_t begin, int64_t end) {
    for (int64_t rho = begin; rho < end; ++rho)
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < b; ++j) {
          const scalar *left = gradient + (i * r + rho) * tile.stride, *right = hidden + (j * r + rho) * tile.stride;
          __m512 sum = _mm512_setzero_ps(), other = sum;
          int64_t t = 0;
          for (; t + 2 * kLane <= tile.padded; t += 2 * kLane) {
            sum = _mm512_fmadd_ps(sixteen_of(left + t), sixteen_of(right + t), sum);
            other = _mm512_fmadd_ps(sixteen_of(left + t + kLane), sixteen_of(right + t + kLane), other);
          }
          if (t < tile.padded) sum = _mm512_fmadd_ps(sixteen_of(left + t), sixteen_of(right + t), sum);
          float& to = sums[(i * b + j) * r + rho];
          to = (more ? to : 0.0f) + _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
        }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> blast_backward(
    const Tensor& g, const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left,
    std::array<bool, 4> wanted) {
  if (x.scalar_type() == at::kHalf) return in_floats(blast_backward, g, x, right, coupling, left, wanted);
  const int64_t b = right.size(0), r = right.size(1);
  const Tensor grad = rows_of(g), from = rows_of(x), one = as_it_lies(right), two = as_it_lies(left);
  const Tensor mixing = coupling.to(at::kFloat).contiguous();
  const Panels panels(g.size(0), b * (2 * right.size(2) + 3 * r + left.size(1)), right, left);
  Tensor dx = like(x, wanted[0]), dright = room_for(one, b, panels, wanted[1]);
  Tensor dleft = room_for(two, b, panels, wanted[3]), dcoupling = room_for(mixing, b, panels, wanted[2]);
  by_dtype(x, [&](auto number) {
    using scalar = decltype(number);
    const auto before = stage_of<scalar>(one, b, dright), after = stage_of<scalar>(two, b, dleft);
    const Order in(b, before.w.in, false), out(b, after.w.out, false);
    const Shuffle straight_on(b, r);
    const float* scale = mixing.const_data_ptr<float>();
    const bool back = wanted[0] || wanted[1], again = wanted[2] || wanted[3];
    for (int64_t begin = 0; begin < g.size(0); begin += panels.width) {
      const Tile tile = panels.at(begin);
      Scratch scratch;
      auto* given = scratch.take<scalar>(b * out.size * tile.stride);
      auto* taken = wanted[1] || again ? scratch.take<scalar>(b * in.size * tile.stride) : nullptr;
      auto* hidden = again ? scratch.take<scalar>(b * r * tile.stride) : nullptr;
      auto* mixed = scratch.take<scalar>(b * r * tile.stride);  // then the gradient of the units before
      auto* dmixed = back || wanted[2] ? scratch.take<scalar>(b * r * tile.stride) : nullptr;
      auto* dtaken = wanted[0] ? scratch.take<float>(b * in.size * tile.stride) : nullptr;
      take(grad, begin, out, tile, given);
      if (taken != nullptr) take(from, begin, in, tile, taken);
      if (again) before.forward(0, r, taken, tile, hidden);
      if (wanted[3]) coupled(b, r, scale, false, hidden, tile, mixed);
      second_backward(after, 0, b, straight_on, given, mixed, tile, dmixed, begin > 0);
      if (wanted[2]) coupling_backward(b, r, dmixed, hidden, tile, dcoupling.mutable_data_ptr<float>(), begin > 0);
      if (!back) continue;
      coupled(b, r, scale, true, dmixed, tile, mixed);
      first_backward(before, 0, r, mixed, taken, tile, dtaken, false, begin > 0);
      if (dtaken != nullptr) give<scalar>(dtaken, begin, in, tile, dx);
    }
  });
  const auto dtype = x.scalar_type();
  return {dx, dright.to(dtype), dcoupling.to(coupling.scalar_type()), dleft.to(dtype)};
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("blocked_backward", &blocked_backward);
  m.impl("two_stage_backward", &two_stage_backward);
  m.impl("blast_backward", &blast_backward);
}

}  // namespace isogrid
