// Products of rows with block-diagonal matrices, one stage or two, the intermediate in the cache.
//
// A tile of rows is transposed to feature-major, so that weights are the left operand as they are stored and every
// permutation of features is the address of a row. Small products run through PyTorch's own block GEMM (oneDNN).

#include "few.h"
#include "tiles.h"
#include "turned.h"

#include <torch/library.h>

namespace isogrid {

using at::Tensor;

// How the features of an input or output are dealt to blocks of a size: block by block, or in turn.
struct Order {
  int64_t blocks, size;
  bool in_turn;
  int64_t pitch;  // rows from one block to the next
  Order(int64_t count, int64_t each, bool turn, bool paired = false)
      : blocks(count), size(each), in_turn(turn), pitch(paired ? each + each % 2 : each) {}
  bool straight() const { return !in_turn && pitch == size; }
  int64_t row(int64_t feature) const {  // where a feature stands when blocks are contiguous
    return in_turn ? (feature % blocks) * pitch + feature / blocks : feature / size * pitch + feature % size;
  }
};

template <typename scalar>
constexpr bool kPaired = !std::is_same_v<scalar, float>;  // neighbours of a block share a 32-bit unit

void check(const Tensor& x, const Tensor& weights, const char* what) {
  TORCH_CHECK(x.dim() == 2 && weights.dim() == 3, what, ": rows (rows, in) and blocks (k, q, p)");
  TORCH_CHECK(x.scalar_type() == weights.scalar_type(), what, ": one dtype");
}

template <typename scalar>
void one_stage(const Tensor& x, const Tensor& w, bool in_turn, bool out_turn, Tensor& y) {
  const int64_t rows = x.size(0), k = w.size(0), q = w.size(1), p = w.size(2);
  const Order in(k, p, in_turn, kPaired<scalar>), out(k, q, out_turn);
  const int64_t width = tile_width(rows, k * p + k * q);
  const scalar *from = x.const_data_ptr<scalar>(), *weights = w.const_data_ptr<scalar>();
  scalar* to = y.mutable_data_ptr<scalar>();
  over_tiles(rows, width, [&](int64_t begin, int64_t count) {
    const Tile tile(count);
    Scratch scratch;
    auto* taken = scratch.take<scalar>(k * in.pitch * tile.stride);
    auto* found = scratch.take<float>(k * q * tile.stride);
    load(from + begin * x.stride(0), x.stride(0), x.size(1), in, k * p, tile, taken);
    over_blocks(k, q, shares_tile(rows, width, w.numel()), [&](int64_t c, int64_t t, int64_t n) {
      product(
          n, p, weights + (c * q + t) * p, taken + c * in.pitch * tile.stride, found + (c * q + t) * tile.stride, tile);
    });
    store(found, out, to + begin * y.stride(0), y.stride(0), y.size(1), tile);
  });
}

template <typename scalar>
void two_stages(const Tensor& x, const Tensor& first, const Tensor& second, bool interleave, Tensor& y) {
  const int64_t rows = x.size(0), k = first.size(0), q = first.size(1), p = first.size(2);
  const int64_t l = second.size(0), s = second.size(1), r = second.size(2);
  const Order in(k, p, false, kPaired<scalar>), out(l, s, interleave);
  const int64_t width = tile_width(rows, k * p + k * q + l * s);
  const scalar *from = x.const_data_ptr<scalar>(), *one = first.const_data_ptr<scalar>();
  const scalar* two = second.const_data_ptr<scalar>();
  scalar* to = y.mutable_data_ptr<scalar>();
  over_tiles(rows, width, [&](int64_t begin, int64_t count) {
    const Tile tile(count);
    Scratch scratch;
    auto* taken = scratch.take<scalar>(k * in.pitch * tile.stride);
    auto* hidden = scratch.take<float>(k * q * tile.stride);
    auto* found = scratch.take<float>(l * s * tile.stride);
    load(from + begin * x.stride(0), x.stride(0), x.size(1), in, k * p, tile, taken);
    over_blocks(k, q, shares_tile(rows, width, first.numel()), [&](int64_t c, int64_t t, int64_t n) {
      product(n, p, one + (c * q + t) * p, taken + c * in.pitch * tile.stride, hidden + (c * q + t) * tile.stride, tile);
    });
    over_blocks(l, s, shares_tile(rows, width, second.numel()), [&](int64_t a, int64_t sigma, int64_t n) {
      Scratch inner;
      auto* block = inner.take<scalar>((r + 1) * tile.stride);
      narrow(hidden + a * tile.stride, l * tile.stride, r, tile, block);  // hidden unit e: number e / l of block e mod l
      product(n, r, two + (a * s + sigma) * r, block, found + (a * s + sigma) * tile.stride, tile);
    });
    store(found, out, to + begin * y.stride(0), y.stride(0), y.size(1), tile);
  });
}

template <typename scalar>
void blast_stages(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, Tensor& y) {
  const int64_t rows = x.size(0), b = right.size(0), r = right.size(1), p = right.size(2), s = left.size(1);
  const Order in(b, p, false, kPaired<scalar>), out(b, s, false);
  const int64_t width = tile_width(rows, b * (p + 2 * r + s));
  const scalar *from = x.const_data_ptr<scalar>(), *one = right.const_data_ptr<scalar>();
  const scalar* two = left.const_data_ptr<scalar>();
  const float* mixing = coupling.const_data_ptr<float>();  // (row blocks, column blocks, rank)
  scalar* to = y.mutable_data_ptr<scalar>();
  over_tiles(rows, width, [&](int64_t begin, int64_t count) {
    const Tile tile(count);
    Scratch scratch;
    auto* taken = scratch.take<scalar>(b * in.pitch * tile.stride);
    auto* hidden = scratch.take<float>(b * r * tile.stride);
    auto* mixed = scratch.take<float>(b * r * tile.stride);
    auto* found = scratch.take<float>(b * s * tile.stride);
    load(from + begin * x.stride(0), x.stride(0), x.size(1), in, b * p, tile, taken);
    over_blocks(b, r, shares_tile(rows, width, right.numel()), [&](int64_t j, int64_t t, int64_t n) {
      product(n, p, one + (j * r + t) * p, taken + j * in.pitch * tile.stride, hidden + (j * r + t) * tile.stride, tile);
    });
    mix(b, r, mixing, hidden, mixed, tile);
    over_blocks(b, s, shares_tile(rows, width, left.numel()), [&](int64_t i, int64_t sigma, int64_t n) {
      Scratch inner;
      auto* block = inner.take<scalar>((r + 1) * tile.stride);
      narrow(mixed + i * r * tile.stride, tile.stride, r, tile, block);
      product(n, r, two + (i * s + sigma) * r, block, found + (i * s + sigma) * tile.stride, tile);
    });
    store(found, out, to + begin * y.stride(0), y.stride(0), y.size(1), tile);
  });
}

template <typename scalar>
void few_one_stage(const Tensor& x, const Tensor& w, bool in_turn, bool out_turn, Tensor& y) {
  const int64_t rows = x.size(0), k = w.size(0), q = w.size(1), p = w.size(2), pitch = rounded(p);
  const Order in(k, p, in_turn), out(k, q, out_turn);
  Scratch scratch;
  auto* taken = scratch.take<float>(rows * k * pitch);
  auto* found = scratch.take<float>(rows * k * q);
  few_load(x.const_data_ptr<scalar>(), rows, x.stride(0), x.size(1), in, pitch, taken);
  for_rows(rows, [&](auto count) {
    few_stage<decltype(count)::value>(w.const_data_ptr<scalar>(), k, q, p, taken, pitch, found);
  });
  few_store(found, rows, out, y.mutable_data_ptr<scalar>(), y.stride(0), y.size(1));
}

template <typename scalar>
void few_two_stages(const Tensor& x, const Tensor& first, const Tensor& second, bool interleave, Tensor& y) {
  const int64_t rows = x.size(0), k = first.size(0), q = first.size(1), p = first.size(2), pitch = rounded(p);
  const int64_t l = second.size(0), s = second.size(1), r = second.size(2), between = rounded(r);
  const Order in(k, p, false), dealt(l, r, true), out(l, s, interleave);
  Scratch scratch;
  auto* taken = scratch.take<float>(rows * k * pitch);
  auto* hidden = scratch.take<float>(rows * k * q);
  auto* moved = scratch.take<float>(rows * l * between);
  auto* found = scratch.take<float>(rows * l * s);
  few_load(x.const_data_ptr<scalar>(), rows, x.stride(0), x.size(1), in, pitch, taken);
  for_rows(rows, [&](auto count) {
    few_stage<decltype(count)::value>(first.const_data_ptr<scalar>(), k, q, p, taken, pitch, hidden);
    few_load(hidden, rows, k * q, k * q, dealt, between, moved);
    few_stage<decltype(count)::value>(second.const_data_ptr<scalar>(), l, s, r, moved, between, found);
  });
  few_store(found, rows, out, y.mutable_data_ptr<scalar>(), y.stride(0), y.size(1));
}

template <typename scalar>
void few_blast(const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, Tensor& y) {
  const int64_t rows = x.size(0), b = right.size(0), r = right.size(1), p = right.size(2), s = left.size(1);
  const int64_t pitch = rounded(p), between = rounded(r);
  const Order in(b, p, false), out(b, s, false);
  const float* mixing = coupling.const_data_ptr<float>();
  Scratch scratch;
  auto* taken = scratch.take<float>(rows * b * pitch);
  auto* hidden = scratch.take<float>(rows * b * r);
  auto* mixed = scratch.take<float>(rows * b * between);
  auto* found = scratch.take<float>(rows * b * s);
  few_load(x.const_data_ptr<scalar>(), rows, x.stride(0), x.size(1), in, pitch, taken);
  for_rows(rows, [&](auto count) {
    few_stage<decltype(count)::value>(right.const_data_ptr<scalar>(), b, r, p, taken, pitch, hidden);
    std::fill(mixed, mixed + rows * b * between, 0.0f);
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < b; ++j) {
          const float *scale = mixing + (i * b + j) * r, *from = hidden + (n * b + j) * r;
          float* to = mixed + (n * b + i) * between;
          for (int64_t rho = 0; rho < r; ++rho) to[rho] += scale[rho] * from[rho];
        }
    few_stage<decltype(count)::value>(left.const_data_ptr<scalar>(), b, s, r, mixed, between, found);
  });
  few_store(found, rows, out, y.mutable_data_ptr<scalar>(), y.stride(0), y.size(1));
}

void check_features(const Tensor& x, const Tensor& first, int64_t features, const Tensor& last) {
  TORCH_CHECK(
      x.size(1) <= first.size(0) * first.size(2), "input has ", x.size(1), " features, at most ",
      first.size(0) * first.size(2), " are expected");
  TORCH_CHECK(0 <= features && features <= last.size(0) * last.size(1), "no ", features, " outputs");
}

Tensor in_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous();
}

// y[out(c, t)] = sum_j w[c, t, j] x[in(c, j)]; features beyond the input's are zero, beyond `features` left out.
Tensor blocked_cpu(const Tensor& x, const Tensor& w, bool in_turn, bool out_turn, int64_t features) {
  check(x, w, "blocked");
  check_features(x, w, features, w);
  const Tensor rows = in_rows(x), weights = w.contiguous();
  Tensor y = at::empty({x.size(0), features}, x.options());
  const bool few = x.size(0) > 0 && x.size(0) <= kFewRows;
  if (x.scalar_type() == at::kFloat)
    few ? few_one_stage<float>(rows, weights, in_turn, out_turn, y) : one_stage<float>(rows, weights, in_turn, out_turn, y);
  else
    few ? few_one_stage<at::BFloat16>(rows, weights, in_turn, out_turn, y) : one_stage<at::BFloat16>(rows, weights, in_turn, out_turn, y);
  return y;
}

// Two stages: hidden unit e = c q + t of the first is number e / l of block e mod l of the second.
Tensor two_stage_cpu(const Tensor& x, const Tensor& first, const Tensor& second, bool interleave, int64_t features) {
  check(x, first, "two_stage");
  check(x, second, "two_stage");
  check_features(x, first, features, second);
  TORCH_CHECK(first.size(0) * first.size(1) == second.size(0) * second.size(2), "two_stage: hidden sizes differ");
  const Tensor rows = in_rows(x), one = first.contiguous(), two = second.contiguous();
  Tensor y = at::empty({x.size(0), features}, x.options());
  const bool few = x.size(0) > 0 && x.size(0) <= kFewRows;
  if (x.scalar_type() == at::kFloat)
    few ? few_two_stages<float>(rows, one, two, interleave, y) : two_stages<float>(rows, one, two, interleave, y);
  else
    few ? few_two_stages<at::BFloat16>(rows, one, two, interleave, y) : two_stages<at::BFloat16>(rows, one, two, interleave, y);
  return y;
}

// y_i = left_i sum_j coupling[i, j] * (right_j x_j)
Tensor blast_cpu(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, int64_t features) {
  check(x, right, "blast");
  check(x, left, "blast");
  check_features(x, right, features, left);
  const Tensor rows = in_rows(x), one = right.contiguous(), two = left.contiguous();
  const Tensor mixing = coupling.to(at::kFloat).contiguous();
  Tensor y = at::empty({x.size(0), features}, x.options());
  const bool few = x.size(0) > 0 && x.size(0) <= kFewRows;
  if (x.scalar_type() == at::kFloat)
    few ? few_blast<float>(rows, one, mixing, two, y) : blast_stages<float>(rows, one, mixing, two, y);
  else
    few ? few_blast<at::BFloat16>(rows, one, mixing, two, y) : blast_stages<at::BFloat16>(rows, one, mixing, two, y);
  return y;
}

// y[c] = x[c] w[c]: the product with the transposed blocks, on the blocks as they are stored.
void turned_blocks(const Tensor& x, const Tensor& w, Tensor& y) {
  const int64_t rows = x.size(0), k = w.size(0), q = w.size(1), p = w.size(2), width = kMostRows;
  if (x.scalar_type() == at::kFloat) {
    const float *from = x.const_data_ptr<float>(), *weights = w.const_data_ptr<float>();
    float* to = y.mutable_data_ptr<float>();
    over_tiles(rows, tile_width(rows, 0), [&](int64_t begin, int64_t count) {
      for (int64_t c = 0; c < k; ++c)
        turned_block(
            from + begin * x.stride(0) + c * q, x.stride(0), count, q, p, weights + c * q * p,
            to + begin * y.stride(0) + c * p, y.stride(0));
    });
    return;
  }
  const int64_t even = q + q % 2;
  const at::BFloat16 *from = x.const_data_ptr<at::BFloat16>(), *weights = w.const_data_ptr<at::BFloat16>();
  const Tensor packed = at::empty({k, even, p}, w.options());
  auto* pairs_of = packed.mutable_data_ptr<at::BFloat16>();
  at::BFloat16* to = y.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, k, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) pack_block(weights + c * q * p, q, p, pairs_of + c * even * p);
  });
  over_tiles(rows, tile_width(rows, 0), [&](int64_t begin, int64_t count) {
    Scratch scratch;
    auto* found = scratch.take<float>(width * p);
    auto* whole = q % 2 ? scratch.take<at::BFloat16>(width * even) : nullptr;
    for (int64_t c = 0; c < k; ++c) {
      const at::BFloat16* block = from + begin * x.stride(0) + c * q;
      int64_t step = x.stride(0);
      if (whole != nullptr) {  // the last number of each row is paired with a zero
        for (int64_t t = 0; t < count; ++t) {
          std::copy(block + t * step, block + t * step + q, whole + t * even);
          whole[t * even + q] = 0;
        }
        block = whole;
        step = even;
      }
      at::native::cpublas::brgemm(count, p, even, step, p, p, false, block, pairs_of + c * even * p, found, true);
      for (int64_t t = 0; t < count; ++t)
        to_bfloat16(found + t * p, p, to + (begin + t) * y.stride(0) + c * p);
    }
  });
}

// dw[c] = y[c]^T x[c], summed over rows in float.
template <typename scalar>
void gram_blocks(const Tensor& y, const Tensor& x, int64_t k, Tensor& dw) {
  const int64_t rows = y.size(0), q = dw.size(1), p = dw.size(2);
  const scalar *left = y.const_data_ptr<scalar>(), *right = x.const_data_ptr<scalar>();
  float* to = dw.mutable_data_ptr<float>();
  // Blocks, or parts of the rows of one, to each thread: every sum is made by one thread, in order.
  const int64_t part = std::max<int64_t>((q + at::get_num_threads() - 1) / at::get_num_threads(), 1);
  const int64_t parts = k >= at::get_num_threads() ? 1 : (q + part - 1) / part, each = (q + parts - 1) / parts;
  at::parallel_for(0, k * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t c = n / parts, start = n % parts * each, some = std::min(each, q - start);
      if (some <= 0) continue;
      Scratch scratch;
      auto* turned = scratch.take<scalar>(some * (kGramRows + kLane));
      scalar* paired = kPaired<scalar> ? scratch.take<scalar>((kGramRows + 1) * p + 2 * kLane) : nullptr;
      for (int64_t begin = 0; begin < rows; begin += kGramRows) {
        const Tile tile(std::min(kGramRows, rows - begin));
        turn_tile(left + begin * y.stride(0) + c * q + start, y.stride(0), some, tile, turned);
        const scalar* block = right + begin * x.stride(0) + c * p;
        float* sum = to + (c * q + start) * p;
        if constexpr (kPaired<scalar>) {
          for (int64_t t = 0; t < tile.rows; t += 2)
            pair_rows(
                block + t * x.stride(0), t + 1 < tile.rows ? block + (t + 1) * x.stride(0) : nullptr, p, paired + t * p);
          at::native::cpublas::brgemm(
              some, p, tile.rows + tile.rows % 2, tile.stride, p, p, begin > 0, turned, paired, sum, true);
        } else {
          at::native::cpublas::brgemm(
              some, p, tile.rows, tile.stride, x.stride(0), p, begin > 0, turned, block, sum, false);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

Tensor turned_cpu(const Tensor& x, const Tensor& w) {
  check(x, w, "turned");
  TORCH_CHECK(x.size(1) == w.size(0) * w.size(1), "turned: features of x are those that the blocks give");
  const Tensor rows = in_rows(x), weights = w.contiguous();
  Tensor y = at::empty({x.size(0), w.size(0) * w.size(2)}, x.options());
  if (x.size(0) > 0) turned_blocks(rows, weights, y);
  return y;
}

Tensor gram_cpu(const Tensor& y, const Tensor& x, int64_t blocks) {
  TORCH_CHECK(y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "gram: as many rows of both");
  TORCH_CHECK(y.size(1) % blocks == 0 && x.size(1) % blocks == 0, "gram: blocks divide the features");
  const Tensor left = in_rows(y), right = in_rows(x);
  Tensor dw = at::empty({blocks, y.size(1) / blocks, x.size(1) / blocks}, x.options().dtype(at::kFloat));
  if (y.size(0) == 0) return dw.zero_().to(x.scalar_type());
  if (x.scalar_type() == at::kFloat)
    gram_blocks<float>(left, right, blocks, dw);
  else
    gram_blocks<at::BFloat16>(left, right, blocks, dw);
  return dw.to(x.scalar_type());
}

TORCH_LIBRARY(isogrid, m) {
  m.def("turned(Tensor x, Tensor w) -> Tensor");
  m.def("gram(Tensor y, Tensor x, int blocks) -> Tensor");
  m.def("blocked(Tensor x, Tensor w, bool in_turn, bool out_turn, int features) -> Tensor");
  m.def("two_stage(Tensor x, Tensor first, Tensor second, bool interleave, int features) -> Tensor");
  m.def("blast(Tensor x, Tensor right, Tensor coupling, Tensor left, int features) -> Tensor");
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("turned", &turned_cpu);
  m.impl("gram", &gram_cpu);
  m.impl("blocked", &blocked_cpu);
  m.impl("two_stage", &two_stage_cpu);
  m.impl("blast", &blast_cpu);
}

}  // namespace isogrid
