// Inputs in another order, in two parts: what Low-Rank Light's products begin with.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace isogrid {

using at::Tensor;

constexpr int64_t kMovedNumbers = 1 << 15;  // numbers that a thread moves at least

// Numbers are only moved: all of one size are treated alike.
template <typename word>
void move_columns(const Tensor& x, const int32_t* order, Tensor& first, Tensor& rest) {
  const int64_t n = x.size(1), r = first.size(1);
  const auto* from = static_cast<const word*>(x.const_data_ptr());
  auto* one = static_cast<word*>(first.mutable_data_ptr());
  auto* two = static_cast<word*>(rest.mutable_data_ptr());
  at::parallel_for(0, x.size(0), std::max<int64_t>(kMovedNumbers / n, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const word* row = from + i * n;
      for (int64_t j = 0; j < r; ++j) one[i * r + j] = row[order[j]];
      for (int64_t j = r; j < n; ++j) two[i * (n - r) + j - r] = row[order[j]];
    }
  });
}

// x (rows, in), order (in,) -> x[:, order[:first]], x[:, order[first:]], both contiguous.
std::tuple<Tensor, Tensor> columns_cpu(const Tensor& x, const Tensor& order, int64_t first) {
  TORCH_CHECK(x.dim() == 2 && order.dim() == 1 && order.size(0) == x.size(1), "columns: rows (rows, in), an order (in,)");
  TORCH_CHECK(order.scalar_type() == at::kInt, "columns: an order of int32");
  TORCH_CHECK(0 <= first && first <= x.size(1), "columns: the first ", first, " of ", x.size(1));
  TORCH_CHECK(x.element_size() == 2 || x.element_size() == 4, "columns: numbers of 2 or 4 bytes");
  const Tensor rows = x.contiguous(), places = order.contiguous();
  const int32_t* place = places.const_data_ptr<int32_t>();
  const int64_t n = x.size(1);
  const bool inside = std::all_of(place, place + n, [n](int32_t j) { return 0 <= j && j < n; });
  TORCH_CHECK_INDEX(inside, "columns: an order of ", n, " inputs has numbers from 0 to ", n - 1);
  Tensor one = at::empty({x.size(0), first}, x.options()), two = at::empty({x.size(0), n - first}, x.options());
  if (n == 0) return {one, two};
  x.element_size() == 4 ? move_columns<uint32_t>(rows, place, one, two)
                        : move_columns<uint16_t>(rows, place, one, two);
  return {one, two};
}

TORCH_LIBRARY_FRAGMENT(isogrid, m) {
  m.def("columns(Tensor x, Tensor order, int first) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("columns", &columns_cpu);
}

}  // namespace isogrid
