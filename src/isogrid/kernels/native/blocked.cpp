// Products of rows with block-diagonal matrices, one stage or two, the intermediate in the cache.
//
// A tile of rows is transposed to feature-major, so that weights are the left operand as they are stored and every
// permutation of features is the address of a row. Small products run through PyTorch's own block GEMM (oneDNN).

#include "coupling.h"
#include "few.h"
#include "stages.h"

#include <torch/library.h>

namespace isogrid {

void check(const Tensor& x, const Tensor& weights, int64_t blocks, const char* what) {
  TORCH_CHECK(x.dim() == 2 && weights.dim() == 3, what, ": rows (rows, in) and blocks (k, q, p)");
  TORCH_CHECK(weights.size(0) == blocks || weights.size(0) == 1, what, ": ", blocks, " blocks, or one for all");
  TORCH_CHECK(x.scalar_type() == weights.scalar_type(), what, ": one dtype");
}

// The rows of a product: where they come from, where its outputs go, and a bias or none.
template <typename scalar>
struct Rows {
  const scalar* from;
  int64_t step, features, count;
  scalar* to;
  int64_t out_step, out_features;
  const float* bias;

  Rows(const Tensor& x, const Tensor& added, Tensor& y)
      : from(x.const_data_ptr<scalar>()), step(x.stride(0)), features(x.size(1)), count(x.size(0)),
        to(y.mutable_data_ptr<scalar>()), out_step(y.stride(0)), out_features(y.size(1)),
        bias(added.defined() ? added.const_data_ptr<float>() : nullptr) {}
  void take(int64_t begin, const Order& order, const Tile& tile, scalar* taken) const {
    load(from + begin * step, step, features, order, order.blocks * order.size, tile, taken);
  }
  // All outputs, or those from the first on.
  void give(int64_t begin, const Order& order, const Tile& tile, const float* found, int64_t first = 0) const {
    const int64_t last = std::min(out_features, first + order.blocks * order.size);
    if (first < last)
      store(
          found, order, bias == nullptr ? nullptr : bias + first, to + begin * out_step + first, out_step, last - first,
          tile);
  }
};

// Bytes of weights from which on tiles share them while they are in the cache, and how many tiles do.
constexpr int64_t kStreamed = 1024 * 1024;
constexpr int64_t kSharingTiles = 4;

// How rows are cut: into panels of so many tiles, whose products run together or tile by tile.
struct Cut {
  int64_t rows, width, tiles, together;

  Cut(int64_t count, int64_t features, int64_t weight_bytes, bool panels) : rows(count), width(0), tiles(1), together(1) {
    const bool streamed = weight_bytes > kStreamed && rows > kMostRows;
    width = streamed ? kMostRows : tile_width(rows, features);
    if (!streamed && !panels) return;
    const int64_t all = (rows + width - 1) / width, threads = at::get_num_threads();
    tiles = std::clamp<int64_t>(all / threads, 1, kSharingTiles);
    together = streamed ? tiles : 1;
  }
  int64_t stride() const { return width + kLane; }
  Tile tile(int64_t count, int64_t t) const { return Tile(std::min(width, count - t * width), stride()); }
};

// found (out, rows) = blocks of weights · taken, feature-major, for some tiles; `take(c, t)` is what a block takes,
// `found(c, t)` where its outputs begin.
template <typename scalar, typename Take, typename Found>
void stage(
    const Weights<scalar>& w, int64_t c, int64_t first, int64_t count, int64_t tiles, const Take& take,
    const Found& found, const Cut& cut, int64_t rows) {
  const int64_t each = tiles > 1 ? kChunk : count;
  for (int64_t i = first; i < first + count; i += each)
    for (int64_t t = 0; t < tiles; ++t)
      multiply(
          std::min(each, first + count - i), cut.tile(rows, t).padded, w.in, w.data + c * w.block + i * w.step, w.step,
          take(c, t), cut.stride(), found(c, t) + i * cut.stride(), cut.stride());
}

// The weights of some outputs of each block, as a product takes them.
template <typename scalar>
Weights<scalar> straight(
    const Weights<scalar>& w, int64_t block, int64_t blocks, int64_t first, int64_t count, scalar* room, bool shared) {
  if (!w.turned) return {w.data + block * w.block + first * w.step, count, w.in, w.block, false, w.step};
  over_blocks(blocks, count, shared, [&](int64_t c, int64_t t, int64_t n) {
    w.outputs(block + c, first + t, n, room + (c * count + t) * w.in);
  });
  return {room, count, w.in, w.block == 0 ? 0 : count * w.in, false, w.in};
}

template <typename scalar>
void one_stage(const Rows<scalar>& rows, const Weights<scalar>& w, const Order& in, const Order& out) {
  const int64_t k = in.blocks;
  const Cut cut(rows.count, k * (w.in + w.out), k * w.in * w.out * sizeof(scalar), false);
  const bool shared = shares_tile(rows.count, cut.width, k * w.out * w.in);
  over_tiles(rows.count, cut.tiles * cut.width, [&](int64_t begin, int64_t count) {
    const int64_t tiles = (count + cut.width - 1) / cut.width;
    const int64_t before = k * in.pitch * cut.stride(), after = k * w.out * cut.stride();
    Scratch scratch;
    auto* taken = scratch.take<scalar>(tiles * before);
    auto* found = scratch.take<float>(tiles * after);
    for (int64_t t = 0; t < tiles; ++t) rows.take(begin + t * cut.width, in, cut.tile(count, t), taken + t * before);
    over_blocks(k, w.out, shared, [&](int64_t block, int64_t first, int64_t some) {
      stage(
          w, block, first, some, tiles, [&](int64_t c, int64_t t) { return taken + t * before + c * in.pitch * cut.stride(); },
          [&](int64_t c, int64_t t) { return found + t * after + c * w.out * cut.stride(); }, cut, count);
    });
    for (int64_t t = 0; t < tiles; ++t) rows.give(begin + t * cut.width, out, cut.tile(count, t), found + t * after);
  });
}

// Between two stages, in some tiles: `units` for each of them, which the second stage's blocks then take by number.
struct Hidden {
  float* units;
  int64_t step;  // from tile to tile
};

// The second stage of some blocks: number rho of block a stands at place(a, rho) among the hidden units.
template <typename scalar, typename Place>
void second_stage(
    const Weights<scalar>& w, int64_t blocks, bool shared, int64_t tiles, const Hidden& hidden, const Place& place,
    float* found, int64_t step, const Cut& cut, int64_t rows) {
  over_blocks(blocks, w.out, shared, [&](int64_t block, int64_t first, int64_t some) {
    Scratch scratch;
    const int64_t each = (w.in + 1) * cut.stride();
    auto* taken = scratch.take<scalar>(tiles * each);
    for (int64_t t = 0; t < tiles; ++t)
      narrow(
          w.in, cut.tile(rows, t).padded,
          [&](int64_t rho) { return hidden.units + t * hidden.step + place(block, rho) * cut.stride(); }, taken + t * each,
          cut.stride());
    stage(
        w, block, first, some, tiles, [&](int64_t, int64_t t) { return taken + t * each; },
        [&](int64_t c, int64_t t) { return found + t * step + c * w.out * cut.stride(); }, cut, rows);
  });
}

// Bytes of the weights of a group, and of its hidden units in a tile, that a second-level cache keeps beside the rest.
constexpr int64_t kGroupBytes = 256 * 1024;

template <typename scalar>
void two_stages(
    const Rows<scalar>& rows, const Weights<scalar>& first, const Weights<scalar>& second, Shuffle shuffle,
    const Order& in, const Order& out) {
  const int64_t k = shuffle.k, l = shuffle.l, r = shuffle.r, p = first.in, s = second.out, size = sizeof(scalar);
  if (shuffle.runs && !out.in_turn) {
    const int64_t run = shuffle.apart, tile_bytes = r * kMostRows * static_cast<int64_t>(sizeof(float));
    const int64_t bytes = std::max<int64_t>(std::max((k * run * p + s * r) * size, tile_bytes), 1);
    shuffle.group(std::max({kGroupBytes / bytes, (kLane + run - 1) / run, int64_t{1}}));
  }
  const bool grouped = shuffle.blocks < l, panels = grouped || first.turned || second.turned;
  const int64_t units = shuffle.units, n = shuffle.blocks;
  const int64_t features = (grouped ? 0 : k * p) + k * units + n * s;
  const Cut cut(rows.count, features, grouped ? 0 : (k * units * p + l * s * r) * size, panels);
  over_tiles(rows.count, cut.tiles * cut.width, [&](int64_t begin, int64_t count) {
    const int64_t tiles = (count + cut.width - 1) / cut.width, together = std::min(tiles, cut.together);
    const int64_t stride = cut.stride(), before = k * in.pitch * stride, after = n * s * stride;
    const bool shared = shares_tile(rows.count, cut.width, k * units * p);
    Scratch scratch;
    auto* taken = scratch.take<scalar>(tiles * before);
    const Hidden hidden{scratch.take<float>(together * k * units * stride), k * units * stride};
    auto* found = scratch.take<float>(together * after);
    auto* one = first.turned ? scratch.take<scalar>(k * units * p) : nullptr;
    auto* two = second.turned ? scratch.take<scalar>(n * s * r) : nullptr;
    for (int64_t t = 0; t < tiles; ++t) rows.take(begin + t * cut.width, in, cut.tile(count, t), taken + t * before);
    Shuffle dealt = shuffle;
    for (int64_t a = 0; a < l; a += n) {
      const int64_t some = std::min(n, l - a);
      if (some < n) dealt.group(some);
      const bool each = second.block != 0, all = first.block != 0;
      const auto w1 = straight(first, 0, all ? k : 1, grouped ? a * shuffle.apart : 0, dealt.units, one, shared);
      const auto w2 = straight(second, each ? a : 0, each ? some : 1, 0, s, two, shared);
      for (int64_t at = 0; at < tiles; at += together) {
        const int64_t left = count - at * cut.width, now = std::min(together, tiles - at);
        over_blocks(k, w1.out, shared, [&](int64_t block, int64_t start, int64_t outputs) {
          stage(
              w1, block, start, outputs, now,
              [&](int64_t c, int64_t t) { return taken + (at + t) * before + c * in.pitch * stride; },
              [&](int64_t c, int64_t t) { return hidden.units + t * hidden.step + c * w1.out * stride; }, cut, left);
        });
        second_stage(
            w2, some, shares_tile(rows.count, cut.width, some * s * r), now, hidden,
            [&](int64_t b, int64_t rho) { return dealt.place(b, rho); }, found, after, cut, left);
        for (int64_t t = 0; t < now; ++t) {
          const int64_t row = begin + (at + t) * cut.width;
          if (grouped)
            rows.give(row, Order(some, s, false), cut.tile(left, t), found + t * after, a * s);
          else
            rows.give(row, out, cut.tile(left, t), found + t * after);
        }
      }
    }
  });
}

template <typename scalar>
void blast_stages(
    const Rows<scalar>& rows, const Weights<scalar>& right, const float* mixing, const Weights<scalar>& left,
    const Order& in, const Order& out) {
  const int64_t b = in.blocks, r = right.out, p = right.in, s = left.out;
  const Cut cut(rows.count, b * (p + 2 * r + s), b * r * (p + s) * sizeof(scalar), false);
  over_tiles(rows.count, cut.tiles * cut.width, [&](int64_t begin, int64_t count) {
    const int64_t tiles = (count + cut.width - 1) / cut.width, stride = cut.stride();
    const int64_t before = b * in.pitch * stride, after = b * s * stride, between = b * r * stride;
    Scratch scratch;
    auto* taken = scratch.take<scalar>(tiles * before);
    auto* hidden = scratch.take<float>(tiles * between);
    const Hidden mixed{scratch.take<float>(tiles * between), between};
    auto* found = scratch.take<float>(tiles * after);
    for (int64_t t = 0; t < tiles; ++t) rows.take(begin + t * cut.width, in, cut.tile(count, t), taken + t * before);
    over_blocks(b, r, shares_tile(rows.count, cut.width, b * r * p), [&](int64_t block, int64_t first, int64_t some) {
      stage(
          right, block, first, some, tiles,
          [&](int64_t c, int64_t t) { return taken + t * before + c * in.pitch * stride; },
          [&](int64_t c, int64_t t) { return hidden + t * between + c * r * stride; }, cut, count);
    });
    for (int64_t t = 0; t < tiles; ++t)
      mix(b, r, mixing, hidden + t * between, mixed.units + t * between, cut.tile(count, t));
    second_stage(
        left, b, shares_tile(rows.count, cut.width, b * s * r), tiles, mixed,
        [&](int64_t i, int64_t rho) { return i * r + rho; }, found, after, cut, count);
    for (int64_t t = 0; t < tiles; ++t) rows.give(begin + t * cut.width, out, cut.tile(count, t), found + t * after);
  });
}

template <typename scalar>
void few_one_stage(const Rows<scalar>& rows, const Weights<scalar>& w, const Order& in, const Order& out) {
  const int64_t k = in.blocks, pitch = rounded(w.in);
  Scratch scratch;
  auto* taken = scratch.take<float>(rows.count * k * pitch);
  auto* found = scratch.take<float>(rows.count * k * w.out);
  few_load(rows.from, rows.count, rows.step, rows.features, in, pitch, taken);
  for_rows(rows.count, [&](auto count) { few_stage<decltype(count)::value>(w, k, taken, pitch, found); });
  few_store(found, rows.count, out, rows.bias, rows.to, rows.out_step, rows.out_features);
}

template <typename scalar>
void few_two_stages(
    const Rows<scalar>& rows, const Weights<scalar>& first, const Weights<scalar>& second, const Shuffle& shuffle,
    const Order& in, const Order& out) {
  const int64_t k = shuffle.k, l = shuffle.l, pitch = rounded(first.in), between = rounded(shuffle.r);
  Scratch scratch;
  auto* taken = scratch.take<float>(rows.count * k * pitch);
  auto* hidden = scratch.take<float>(rows.count * k * shuffle.q);
  auto* moved = scratch.take<float>(rows.count * l * between);
  auto* found = scratch.take<float>(rows.count * l * second.out);
  few_load(rows.from, rows.count, rows.step, rows.features, in, pitch, taken);
  for_rows(rows.count, [&](auto count) {
    few_stage<decltype(count)::value>(first, k, taken, pitch, hidden);
    few_deal(hidden, rows.count, shuffle, between, moved);
    few_stage<decltype(count)::value>(second, l, moved, between, found);
  });
  few_store(found, rows.count, out, rows.bias, rows.to, rows.out_step, rows.out_features);
}

template <typename scalar>
void few_blast(
    const Rows<scalar>& rows, const Weights<scalar>& right, const float* mixing, const Weights<scalar>& left,
    const Order& in, const Order& out) {
  const int64_t b = in.blocks, r = right.out, pitch = rounded(right.in), between = rounded(r);
  Scratch scratch;
  auto* taken = scratch.take<float>(rows.count * b * pitch);
  auto* hidden = scratch.take<float>(rows.count * b * r);
  auto* mixed = scratch.take<float>(rows.count * b * between);
  auto* found = scratch.take<float>(rows.count * b * left.out);
  few_load(rows.from, rows.count, rows.step, rows.features, in, pitch, taken);
  for_rows(rows.count, [&](auto count) {
    few_stage<decltype(count)::value>(right, b, taken, pitch, hidden);
    few_mix(hidden, rows.count, b, r, mixing, between, mixed);
    few_stage<decltype(count)::value>(left, b, mixed, between, found);
  });
  few_store(found, rows.count, out, rows.bias, rows.to, rows.out_step, rows.out_features);
}

void check_features(const Tensor& x, int64_t blocks, const Tensor& first, int64_t features, int64_t outputs) {
  TORCH_CHECK(
      x.size(1) <= blocks * first.size(2), "input has ", x.size(1), " features, at most ", blocks * first.size(2),
      " are expected");
  TORCH_CHECK(0 <= features && features <= outputs, "no ", features, " outputs");
}

Tensor as_floats(const std::optional<Tensor>& bias, int64_t features) {
  if (!bias.has_value()) return Tensor();
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == features, "a bias has ", features, " numbers");
  return bias->to(at::kFloat).contiguous();
}

// work(number of the dtype, whether there are few rows)
template <typename F>
void by_dtype(const Tensor& x, const F& work) {
  const bool few = x.size(0) <= kFewRows;
  if (x.size(0) == 0) return;
  if (x.scalar_type() == at::kFloat)
    few ? work(float{}, std::true_type{}) : work(float{}, std::false_type{});
  else
    few ? work(BFloat16{}, std::true_type{}) : work(BFloat16{}, std::false_type{});
}

// y[out(c, t)] = sum_j w[c, t, j] x[in(c, j)]; features beyond the input's are zero, beyond `features` left out.
Tensor blocked_cpu(
    const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t blocks, bool in_turn, bool out_turn,
    int64_t features) {
  if (x.scalar_type() == at::kHalf) return in_floats(blocked_cpu, x, w, bias, blocks, in_turn, out_turn, features);
  check(x, w, blocks, "blocked");
  check_features(x, blocks, w, features, blocks * w.size(1));
  const Tensor from = in_rows(x), weights = w.contiguous(), added = as_floats(bias, features);
  Tensor y = at::empty({x.size(0), features}, x.options());
  by_dtype(x, [&](auto number, auto few) {
    using scalar = decltype(number);
    const Rows<scalar> rows(from, added, y);
    const Weights<scalar> stage(weights);
    const Order out(blocks, w.size(1), out_turn);
    if constexpr (few)
      few_one_stage(rows, stage, Order(blocks, w.size(2), in_turn), out);
    else
      one_stage(rows, stage, Order(blocks, w.size(2), in_turn, kPaired<scalar>), out);
  });
  return y;
}

// Two stages: which unit of the first is which number of the second, see `Shuffle`.
Tensor two_stage_cpu(
    const Tensor& x, const Tensor& first, const Tensor& second, const std::optional<Tensor>& bias,
    at::IntArrayRef blocks, bool in_runs, bool interleave, int64_t features) {
  if (x.scalar_type() == at::kHalf)
    return in_floats(two_stage_cpu, x, first, second, bias, blocks, in_runs, interleave, features);
  const int64_t k = blocks[0], l = blocks[1];
  check(x, first, k, "two_stage");
  check(x, second, l, "two_stage");
  check_features(x, k, first, features, l * second.size(1));
  TORCH_CHECK(k * first.size(1) == l * second.size(2), "two_stage: hidden sizes differ");
  TORCH_CHECK(!in_runs || first.size(1) % l == 0, "two_stage: runs are equal only where l divides q");
  const bool many = x.size(0) > kFewRows;
  const Tensor from = in_rows(x), one = many ? as_it_lies(first) : first.contiguous();
  const Tensor two = many ? as_it_lies(second) : second.contiguous(), added = as_floats(bias, features);
  const Shuffle shuffle(k, first.size(1), l, second.size(2), in_runs);
  Tensor y = at::empty({x.size(0), features}, x.options());
  by_dtype(x, [&](auto number, auto few) {
    using scalar = decltype(number);
    const Rows<scalar> rows(from, added, y);
    const Weights<scalar> before(one), after(two);
    const Order out(l, second.size(1), interleave);
    if constexpr (few)
      few_two_stages(rows, before, after, shuffle, Order(k, first.size(2), false), out);
    else
      two_stages(rows, before, after, shuffle, Order(k, first.size(2), false, kPaired<scalar>), out);
  });
  return y;
}

// y_i = left_i sum_j coupling[i, j] * (right_j x_j)
Tensor blast_cpu(
    const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left, const std::optional<Tensor>& bias,
    int64_t features) {
  if (x.scalar_type() == at::kHalf) return in_floats(blast_cpu, x, right, coupling, left, bias, features);
  const int64_t b = right.size(0);
  check(x, right, b, "blast");
  check(x, left, b, "blast");
  check_features(x, b, right, features, b * left.size(1));
  const Tensor from = in_rows(x), one = right.contiguous(), two = left.contiguous();
  const Tensor mixing = coupling.to(at::kFloat).contiguous(), added = as_floats(bias, features);
  Tensor y = at::empty({x.size(0), features}, x.options());
  by_dtype(x, [&](auto number, auto few) {
    using scalar = decltype(number);
    const Rows<scalar> rows(from, added, y);
    const Weights<scalar> before(one), after(two);
    const Order out(b, left.size(1), false);
    const float* scale = mixing.const_data_ptr<float>();
    if constexpr (few)
      few_blast(rows, before, scale, after, Order(b, right.size(2), false), out);
    else
      blast_stages(rows, before, scale, after, Order(b, right.size(2), false, kPaired<scalar>), out);
  });
  return y;
}

TORCH_LIBRARY(isogrid, m) {
  m.def(
      "blocked(Tensor x, Tensor w, Tensor? bias, int blocks, bool in_turn, bool out_turn, int features) -> Tensor");
  m.def(
      "two_stage(Tensor x, Tensor first, Tensor second, Tensor? bias, int[2] blocks, bool in_runs, bool interleave, "
      "int features) -> Tensor");
  m.def("blast(Tensor x, Tensor right, Tensor coupling, Tensor left, Tensor? bias, int features) -> Tensor");
  m.def(
      "blocked_backward(Tensor g, Tensor x, Tensor w, int blocks, bool in_turn, bool out_turn, bool[2] wanted) -> "
      "(Tensor, Tensor)");
  m.def(
      "two_stage_backward(Tensor g, Tensor x, Tensor first, Tensor second, int[2] blocks, bool in_runs, "
      "bool interleave, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "blast_backward(Tensor g, Tensor x, Tensor right, Tensor coupling, Tensor left, bool[4] wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("blocked", &blocked_cpu);
  m.impl("two_stage", &two_stage_cpu);
  m.impl("blast", &blast_cpu);
}

}  // namespace isogrid
