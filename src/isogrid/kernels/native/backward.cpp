// Gradients of the products: a panel of rows at a time, feature-major, blocks one after the other.
//
// Hidden units are multiplied anew: nothing is kept from the forward product but its inputs. Every sum over rows is
// made by one thread, in order.

#include "coupling.h"
#include "panels.h"

#include <torch/library.h>

namespace isogrid {

template <typename F>
void with_number(const Tensor& x, const F& work) {
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

std::tuple<Tensor, Tensor> blocked_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, int64_t blocks, bool in_turn, bool out_turn,
    std::array<bool, 2> wanted) {
  if (x.scalar_type() == at::kHalf) return in_floats(blocked_backward, g, x, w, blocks, in_turn, out_turn, wanted);
  const Tensor grad = in_rows(g), from = in_rows(x), weights = as_it_lies(w);
  const Panels panels(g.size(0), blocks * (2 * w.size(2) + w.size(1)), w);
  Tensor dx = like(x, wanted[0]), dw = room_for(weights, blocks, panels, wanted[1]);
  with_number(x, [&](auto number) {
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
  const Tensor grad = in_rows(g), from = in_rows(x), one = as_it_lies(first), two = as_it_lies(second);
  const Panels panels(g.size(0), 2 * k * (first.size(1) + first.size(2)) + l * second.size(1), first, second);
  Tensor dx = like(x, wanted[0]), dfirst = room_for(one, k, panels, wanted[1]);
  Tensor dsecond = room_for(two, l, panels, wanted[2]);
  with_number(x, [&](auto number) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor> blast_backward(
    const Tensor& g, const Tensor& x, const Tensor& right, const Tensor& coupling, const Tensor& left,
    std::array<bool, 4> wanted) {
  if (x.scalar_type() == at::kHalf) return in_floats(blast_backward, g, x, right, coupling, left, wanted);
  const int64_t b = right.size(0), r = right.size(1);
  const Tensor grad = in_rows(g), from = in_rows(x), one = as_it_lies(right), two = as_it_lies(left);
  const Tensor mixing = coupling.to(at::kFloat).contiguous();
  const Panels panels(g.size(0), b * (2 * right.size(2) + 3 * r + left.size(1)), right, left);
  Tensor dx = like(x, wanted[0]), dright = room_for(one, b, panels, wanted[1]);
  Tensor dleft = room_for(two, b, panels, wanted[3]), dcoupling = room_for(mixing, b, panels, wanted[2]);
  with_number(x, [&](auto number) {
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
