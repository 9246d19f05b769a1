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
  Panels(int64_t count, int64_t features, int64_t weights, int64_t size) : rows(count), width(kMostPanelRows) {
    while (width > kStep && width * features * size > std::max(kPanelBytes, 2 * weights * size)) width /= 2;
  }
  Tile at(int64_t begin) const {  // of few strides: each makes new products
    const int64_t count = std::min(width, rows - begin);
    return rows <= kStep ? Tile(count) : Tile(count, width + kLane);
  }
};

// Columns `from` … of feature-major rows, as a product takes them on its right.
inline Matrix<float> right_side(const float* rows, const Tile& tile, int64_t, int64_t, float*) {
  return {rows, tile.stride};
}

inline Matrix<BFloat16> right_side(
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
  return {room, width};
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
  for (int64_t t = 0; t < width; t += kLane) {
    const __m512i wide = pairs(_mm512_loadu_ps(from + t), _mm512_setzero_ps());
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + t), _mm512_cvtepi32_epi16(wide));
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

// to(i)[t] = row i of a (m, n) · rows (n, tile), in a step's columns; `to` takes each row of floats.
template <typename scalar, typename Give>
void product(
    int64_t m, int64_t n, const Matrix<scalar>& a, const scalar* rows, const Tile& tile, const Give& give) {
  Scratch scratch;
  auto* room = kPaired<scalar> ? scratch.take<scalar>((n + 1) * kStep) : nullptr;
  auto* found = scratch.take<float>(m * (kStep + kLane));
  for (int64_t t = 0; t < tile.padded; t += kStep) {
    const int64_t width = std::min(kStep, tile.padded - t);
    const Matrix<scalar> b = right_side(rows + t, tile, n, width, room);
    multiply(m, width, n, a.data, a.step, b.data, b.step, found, kStep + kLane);
    for (int64_t i = 0; i < m; ++i) give(i, t, width, found + i * (kStep + kLane));
  }
}

// The same, straight to floats or added to them.
template <typename scalar>
void product_into(
    int64_t m, int64_t n, const Matrix<scalar>& a, const scalar* rows, const Tile& tile, float* to, bool more) {
  Scratch scratch;
  auto* room = kPaired<scalar> ? scratch.take<scalar>((n + 1) * kStep) : nullptr;
  for (int64_t t = 0; t < tile.padded; t += kStep) {
    const int64_t width = std::min(kStep, tile.padded - t);
    const Matrix<scalar> b = right_side(rows + t, tile, n, width, room);
    multiply(m, width, n, a.data, a.step, b.data, b.step, to + t, tile.stride, more);
  }
}

// sums (m, n) += left (m, tile) · right (n, tile)^T
template <typename scalar>
void outer_products(
    int64_t m, int64_t n, const scalar* left, const scalar* right, const Tile& tile, float* sums, int64_t step,
    bool more) {
  Scratch scratch;
  auto* room = scratch.take<scalar>(kStep * n + 2 * kLane);
  for (int64_t t = 0; t < tile.padded; t += kStep) {
    const int64_t width = std::min(kStep, tile.padded - t);
    by_rows(right + t, tile, n, width, room);
    multiply(m, n, width, left + t, tile.stride, room, n, sums, step, more || t > 0);
  }
}

// A stage, what it took, and the sums of its gradients: blocks as the weights lie.
template <typename scalar>
struct Stage {
  Weights<scalar> w;
  int64_t blocks;
  float* sums;
  bool together() const { return w.block == 0 && blocks > 1; }

  // hidden (count, tile) of each block = outputs first … of the block · taken.
  void forward(int64_t first, int64_t count, const scalar* taken, const Tile& tile, scalar* hidden) const {
    over_parts(blocks, false, [&](int64_t c, const Part& part) {
      int64_t start, some;
      part.of(count, start, some);
      if (some == 0) return;
      Scratch scratch;
      auto* room = scratch.take<scalar>(w.turned ? some * w.in : 0);
      const Matrix<scalar> a = w.outputs(c, first + start, some, room);
      scalar* to = hidden + (c * count + start) * tile.stride;
      product(some, w.in, a, taken + c * w.in * tile.stride, tile, [&](int64_t i, int64_t t, int64_t width, const float* row) {
        keep(row, width, to + i * tile.stride + t);
      });
    });
  }

  // Sums of a block, or of the outputs first … of it: gradient (count, tile) times taken (in, tile).
  void add(
      int64_t c, int64_t first, int64_t count, const scalar* gradient, const scalar* taken, const Tile& tile,
      bool more, const Part& part) const {
    int64_t start, some;
    part.of(w.turned ? w.in : count, start, some);
    if (some == 0) return;
    float* to = sums + c * w.block;
    const bool again = more || (together() && c > 0);
    if (w.turned)
      outer_products(
          some, count, taken + start * tile.stride, gradient, tile, to + start * w.step + first, w.step, again);
    else
      outer_products(
          some, w.in, gradient + start * tile.stride, taken, tile, to + (first + start) * w.step, w.step, again);
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
      Scratch scratch;
      auto* room = scratch.take<scalar>(w.turned ? 0 : w.in * count);
      Matrix<scalar> a = w.inputs(c, first, count, room);
      a.data += start * a.step;
      if (some > 0) product_into(some, count, a, grad, tile, dtaken + (c * w.in + start) * tile.stride, more);
    }
    if (stage.sums != nullptr)
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
    Scratch scratch;
    if (dhidden != nullptr) {
      int64_t start, some;
      part.of(w.in, start, some);
      auto* room = scratch.take<scalar>(w.turned ? 0 : w.in * w.out);
      Matrix<scalar> left = w.inputs(c, 0, w.out, room);
      left.data += start * left.step;
      if (some > 0)
        product(some, w.out, left, grad, tile, [&](int64_t i, int64_t t, int64_t width, const float* row) {
          keep(row, width, dhidden + shuffle.place(a, start + i) * tile.stride + t);
        });
    }
    if (stage.sums == nullptr) return;
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

// Sums in float, where the gradient of these weights is wanted; in the end they are rounded once.
Tensor sums_like(const Tensor& w, bool wanted) {
  if (!wanted) return at::empty({0}, w.options());
  return at::empty_like(w, w.options().dtype(at::kFloat));
}

Tensor like(const Tensor& x, bool wanted) {
  return wanted ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
}

float* numbers(Tensor& sums) {
  return sums.numel() > 0 ? sums.mutable_data_ptr<float>() : nullptr;
}

Tensor rows_of(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous();
}

void none_where_no_rows(int64_t rows, std::initializer_list<Tensor*> sums) {
  if (rows == 0)
    for (Tensor* one : sums) one->zero_();
}

std::tuple<Tensor, Tensor> blocked_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, int64_t blocks, bool in_turn, bool out_turn,
    std::array<bool, 2> wanted) {
  const Tensor grad = rows_of(g), from = rows_of(x), weights = as_it_lies(w);
  Tensor dx = like(x, wanted[0]), dw = sums_like(weights, wanted[1]);
  none_where_no_rows(g.size(0), {&dw});
  by_dtype(x, [&](auto number) {
    using scalar = decltype(number);
    const Stage<scalar> stage{Weights<scalar>(weights), blocks, numbers(dw)};
    const Order in(blocks, stage.w.in, in_turn), out(blocks, stage.w.out, out_turn);
    const Panels panels(g.size(0), blocks * (2 * in.size + out.size), w.numel(), sizeof(scalar));
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
  const int64_t k = blocks[0], l = blocks[1];
  const Tensor grad = rows_of(g), from = rows_of(x), one = as_it_lies(first), two = as_it_lies(second);
  Tensor dx = like(x, wanted[0]), dfirst = sums_like(one, wanted[1]), dsecond = sums_like(two, wanted[2]);
  none_where_no_rows(g.size(0), {&dfirst, &dsecond});
  by_dtype(x, [&](auto number) {
    using scalar = decltype(number);
    const Stage<scalar> before{Weights<scalar>(one), k, numbers(dfirst)};
    const Stage<scalar> after{Weights<scalar>(two), l, numbers(dsecond)};
    const Order in(k, before.w.in, false), out(l, after.w.out, interleave);
    Shuffle shuffle(k, before.w.out, l, after.w.in, in_runs);
    const Panels panels(
        g.size(0), 2 * k * (in.size + before.w.out) + l * out.size, first.numel() + second.numel(), sizeof(scalar));
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
  const int64_t b = right.size(0), r = right.size(1);
  const Tensor grad = rows_of(g), from = rows_of(x), one = as_it_lies(right), two = as_it_lies(left);
  const Tensor mixing = coupling.to(at::kFloat).contiguous();
  Tensor dx = like(x, wanted[0]), dright = sums_like(one, wanted[1]), dleft = sums_like(two, wanted[3]);
  Tensor dcoupling = sums_like(mixing, wanted[2]);
  none_where_no_rows(g.size(0), {&dright, &dcoupling, &dleft});
  by_dtype(x, [&](auto number) {
    using scalar = decltype(number);
    const Stage<scalar> before{Weights<scalar>(one), b, numbers(dright)}, after{Weights<scalar>(two), b, numbers(dleft)};
    const Order in(b, before.w.in, false), out(b, after.w.out, false);
    const Shuffle straight_on(b, r);
    const float* scale = mixing.const_data_ptr<float>();
    const bool back = wanted[0] || wanted[1], again = wanted[2] || wanted[3];
    const Panels panels(
        g.size(0), b * (2 * in.size + 3 * r + out.size), right.numel() + left.numel(), sizeof(scalar));
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
      if (wanted[2]) coupling_backward(b, r, dmixed, hidden, tile, numbers(dcoupling), begin > 0);
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
