// What a stage is: how features are dealt to its blocks, how its weights lie, which units the next stage takes.
#pragma once

#include "tiles.h"

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

inline Tensor in_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous();
}

// A product of float16 in floats: processors that multiply these are few, PyTorch's own products of them many times
// slower than turning them into floats and back.
inline Tensor as_float(const Tensor& value) {
  return value.scalar_type() == at::kHalf ? value.to(at::kFloat) : value;  // codes stay what they are
}

template <typename T>
T as_float(const T& value) {
  return value;
}

inline Tensor as_half(const Tensor& value) {
  return value.to(at::kHalf);
}

template <typename... T>
std::tuple<T...> as_half(const std::tuple<T...>& values) {
  return std::apply([](const auto&... one) { return std::tuple<T...>{as_half(one)...}; }, values);
}

template <typename Product, typename... Arguments>
auto in_floats(const Product& product, const Arguments&... arguments) {
  return as_half(product(as_float(arguments)...));
}

// Part of a matrix, its rows `step` numbers apart.
template <typename scalar>
struct Matrix {
  const scalar* data;
  int64_t step;
};

// A stage's blocks (out, in), or their transposes as they lie in memory: one after the other, or one for all.
template <typename scalar>
struct Weights {
  const scalar* data;
  int64_t out, in;
  int64_t block;  // numbers from one block to the next, 0: one for all
  bool turned;    // a block lies as (in, out)
  int64_t step;   // numbers from one row of what lies there to the next

  Weights(const scalar* at, int64_t outputs, int64_t inputs, int64_t apart, bool transposed, int64_t pitch)
      : data(at), out(outputs), in(inputs), block(apart), turned(transposed), step(pitch) {}
  explicit Weights(const Tensor& w)  // as `as_it_lies` gives it
      : Weights(
            w.const_data_ptr<scalar>(), w.size(1), w.size(2), w.size(0) == 1 ? 0 : w.stride(0), lies_turned(w),
            lies_turned(w) ? w.stride(2) : w.stride(1)) {}

  static bool lies_turned(const Tensor& w) { return w.stride(2) != 1 && w.stride(1) == 1 && w.size(2) > 1; }

  // Outputs first … of a block, (count, in); transposed into `room` where they lie the other way.
  Matrix<scalar> outputs(int64_t c, int64_t first, int64_t count, scalar* room) const {
    const scalar* at = data + c * block;
    if (!turned) return {at + first * step, step};
    turn(at + first, step, in, count, count, in, [&](int64_t f) { return room + f * in; });
    return {room, in};
  }
  // Inputs start … of the transposed block, (some, count), against outputs first … of it.
  Matrix<scalar> inputs(
      int64_t c, int64_t start, int64_t some, int64_t first, int64_t count, scalar* room) const {
    const scalar* at = data + c * block;
    if (turned) return {at + start * step + first, step};
    turn(at + first * step + start, step, count, some, some, count, [&](int64_t f) { return room + f * count; });
    return {room, count};
  }
};

// Blocks that a `Weights` can take: contiguous, or transposes of contiguous ones.
inline Tensor as_it_lies(const Tensor& w) {
  const int64_t q = w.size(1), p = w.size(2);
  const bool blocks = w.size(0) == 1 || w.stride(0) == q * p;
  const bool straight = (w.stride(2) == 1 || p == 1) && (w.stride(1) == p || q == 1);
  const bool turned = w.stride(1) == 1 && w.stride(2) == q;
  return blocks && (straight || turned) ? w : w.contiguous();
}

// Which unit of the first stage (k blocks of q) is which number of which block of the second (l blocks of r).
// In turn: unit e = c q + t is number e / l of block e mod l. In runs: unit t of block c is number c n + t mod n of
// block t / n, n = q / l: every block of the second stage takes a run of each block of the first.
struct Shuffle {
  int64_t k, q, l, r;
  bool runs;
  std::vector<int64_t> unit;  // the place of number rho of a group's first block among the group's units
  int64_t apart;              // from the units of a block to those of the next
  int64_t blocks, units;      // of a group: blocks of the second stage, units of each block of the first

  Shuffle(int64_t inner, int64_t hidden, int64_t outer, int64_t taken, bool in_runs)
      : k(inner), q(hidden), l(outer), r(taken), runs(in_runs) {
    group(outer);
  }
  // Nothing dealt: what a coupling between the stages takes and gives.
  Shuffle(int64_t count, int64_t size) : Shuffle(count, size, count, size, true) {
    units = apart = size;
    for (int64_t rho = 0; rho < size; ++rho) unit[rho] = rho;
  }
  // Groups of so many blocks of the second stage, which take their units from nobody else's.
  void group(int64_t count) {
    blocks = runs ? std::min(count, l) : l;
    units = runs ? q / l * blocks : q;
    const int64_t run = runs ? std::max<int64_t>(q / l, 1) : 1;
    apart = run;
    unit.resize(r);
    for (int64_t rho = 0; rho < r; ++rho) unit[rho] = runs ? rho / run * units + rho % run : rho * l;
  }
  int64_t place(int64_t a, int64_t rho) const { return unit[rho] + a * apart; }
};

}  // namespace isogrid
