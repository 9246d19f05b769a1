// Products of one to four rows with a matrix held as its nonzero values and a mask of one bit an entry.
//
// A register of weights is the next values spread out by sixteen bits of the mask: all that is read from memory are the
// values and the mask, and reading is what takes the time.

#include "few.h"

#include <torch/library.h>

#include <bit>
#include <cstring>

namespace isogrid {

using at::Tensor;

constexpr int64_t kWord = 64;  // entries whose bits are read at once

// The bits of entries `word * 64` … of a row of `bytes` bytes; none beyond its end.
inline uint64_t bits_of(const uint8_t* row, int64_t bytes, int64_t word) {
  uint64_t bits = 0;
  if (bytes - word * 8 >= 8)
    std::memcpy(&bits, row + word * 8, 8);
  else
    std::memcpy(&bits, row + word * 8, bytes - word * 8);
  return bits;
}

inline __m512 sixteen(const float* from) {
  return _mm512_loadu_ps(from);
}

inline __m512 sixteen(const at::BFloat16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Up to sixteen values, as many as there are before `end`.
template <typename scalar>
inline __m512 next(const scalar* from, const scalar* end) {
  const int64_t left = end - from;
  return sixteen(from, left >= kLane ? 0xffff : static_cast<__mmask16>((1u << left) - 1));
}

// found[n] = row of the matrix . x[n] for R rows x, `step` numbers apart, zeros up to a whole word. Returns where the
// values of the next row begin.
template <int R, typename scalar>
inline void sparse_dots(
    const scalar* values, const scalar* end, const uint8_t* mask, int64_t bytes, const float* x, int64_t step,
    float* found, int64_t out_step) {
  __m512 sums[R][2];
  for (int m = 0; m < R; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (int64_t word = 0; word * 8 < bytes; ++word) {
    const uint64_t bits = bits_of(mask, bytes, word);
    const bool inside = end - values >= kWord + kLane;  // whole registers may be read from any of its places
    for (int quarter = 0; quarter < 4; ++quarter) {
      // Counted from the word's beginning, so that no quarter waits for the one before.
      const int64_t before = std::popcount(bits & ((uint64_t{1} << (16 * quarter)) - 1));
      const auto sixteenth = static_cast<__mmask16>(bits >> (16 * quarter));
      const __m512 nearest = inside ? sixteen(values + before) : next(std::min(values + before, end), end);
      const __m512 weights = _mm512_maskz_expand_ps(sixteenth, nearest);
      for (int m = 0; m < R; ++m)
        sums[m][quarter % 2] = _mm512_fmadd_ps(
            weights, _mm512_loadu_ps(x + m * step + word * kWord + quarter * kLane), sums[m][quarter % 2]);
    }
    values += std::popcount(bits);
  }
  for (int m = 0; m < R; ++m) found[m * out_step] = _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]));
}

template <typename scalar>
void sparse_rows(const Tensor& x, const Tensor& values, const Tensor& mask, Tensor& y) {
  const int64_t rows = x.size(0), n = x.size(1), outputs = mask.size(0), bytes = mask.size(1);
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  std::vector<int64_t> begins(outputs + 1, 0);
  for (int64_t e = 0; e < outputs; ++e) {
    int64_t count = 0;
    for (int64_t word = 0; word * 8 < bytes; ++word) count += std::popcount(bits_of(bits + e * bytes, bytes, word));
    begins[e + 1] = begins[e] + count;
  }
  TORCH_CHECK(begins[outputs] == values.numel(), "sparse: ", values.numel(), " values for ", begins[outputs], " places");
  const Order whole(1, n, false), all(1, outputs, false);
  const int64_t pitch = (n + kWord - 1) / kWord * kWord;
  Scratch scratch;
  auto* taken = scratch.take<float>(rows * pitch);
  auto* found = scratch.take<float>(rows * outputs);
  few_load(x.const_data_ptr<scalar>(), rows, x.stride(0), n, whole, pitch, taken);
  const scalar* numbers = values.const_data_ptr<scalar>();
  const scalar* end = numbers + values.numel();
  const int64_t stored = values.numel() * sizeof(scalar) / std::max<int64_t>(outputs, 1) + bytes;
  for_rows(rows, [&](auto count) {
    at::parallel_for(0, outputs, std::max<int64_t>(kThreadBytes / std::max<int64_t>(stored, 1), 1), [&](int64_t a, int64_t b) {
      for (int64_t e = a; e < b; ++e)
        sparse_dots<decltype(count)::value>(
            numbers + begins[e], end, bits + e * bytes, bytes, taken, pitch, found + e, outputs);
    });
  });
  few_store(found, rows, all, nullptr, y.mutable_data_ptr<scalar>(), y.stride(0), outputs);
}

// y[n, e] = sum over the ones j of the mask's row e: x[n, j] times the next value.
Tensor sparse_cpu(const Tensor& x, const Tensor& values, const Tensor& mask) {
  if (x.scalar_type() == at::kHalf) return in_floats(sparse_cpu, x, values, mask);
  TORCH_CHECK(x.dim() == 2 && values.dim() == 1 && mask.dim() == 2, "sparse: rows (rows, in), values and a mask");
  TORCH_CHECK(x.scalar_type() == values.scalar_type(), "sparse: one dtype");
  TORCH_CHECK(mask.size(1) == (x.size(1) + 7) / 8, "sparse: a mask of ", mask.size(1), " bytes for ", x.size(1), " inputs");
  TORCH_CHECK(0 < x.size(0) && x.size(0) <= kFewRows, "sparse: one to ", kFewRows, " rows, got ", x.size(0));
  const Tensor rows = x.contiguous(), numbers = values.contiguous(), bits = mask.contiguous();
  Tensor y = at::empty({x.size(0), mask.size(0)}, x.options());
  x.scalar_type() == at::kFloat ? sparse_rows<float>(rows, numbers, bits, y)
                                : sparse_rows<at::BFloat16>(rows, numbers, bits, y);
  return y;
}

TORCH_LIBRARY_FRAGMENT(isogrid, m) {
  m.def("sparse(Tensor x, Tensor values, Tensor mask) -> Tensor");
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("sparse", &sparse_cpu);
}

}  // namespace isogrid
