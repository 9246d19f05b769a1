// Steps in subspaces of gradients: gradients are read once a product, weights are read and written once a step.
//
// W (m, n) is a weight and G its gradient; a basis P has r columns, on the left (m, r) or on the right (n, r).

#include "tiles.h"

#include <torch/library.h>

#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>

namespace isogrid {

using at::Tensor;

// The register tile of a lift: rows of W by columns of W.
constexpr int64_t kLiftRows = 6, kPanel = 64, kPanelLanes = kPanel / kLane;
// Rows of G that a product with its transpose holds in registers.
constexpr int64_t kHeld = 16;
// Numbers of a block of coordinates that stays in the second-level cache while G passes by.
constexpr int64_t kCoordinates = 64 * 1024;
// How far ahead memory is asked for: processors stop at the end of a page, and rows are rarely longer.
constexpr int64_t kAhead = 512;
// Rows that sums down the columns take at once.
constexpr int64_t kStripe = 8;
// Numbers that are summed before a sum in float64 takes over, whichever thread does it.
constexpr int64_t kSummed = 4096;
// Products of fewer operations than this are not worth a second thread.
constexpr int64_t kGrainOperations = 1 << 18;

inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

inline int64_t grain(int64_t operations_of_one) {
  return std::max<int64_t>(1, kGrainOperations / std::max<int64_t>(operations_of_one, 1));
}

const float* numbers(const Tensor& x, const char* what) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), what, " is to be contiguous, of float32");
  return x.const_data_ptr<float>();
}

float* own_numbers(Tensor& x, const char* what) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), what, " is to be contiguous, of float32");
  return x.mutable_data_ptr<float>();
}

// Sum of squares of `count` numbers in a fixed order.
double squared_sum(const float* from, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    const int64_t end = std::min(begin + kSummed, count);
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = begin;
    for (; i + 4 * kLane <= end; i += 4 * kLane)
      for (int64_t z = 0; z < 4; ++z) {
        _mm_prefetch(from + i + z * kLane + kAhead, _MM_HINT_T0);
        const __m512 value = _mm512_loadu_ps(from + i + z * kLane);
        sum[z] = _mm512_fmadd_ps(value, value, sum[z]);
      }
    for (; i < end; i += kLane) {
      const __m512 value = _mm512_maskz_loadu_ps(lanes(end - i), from + i);
      sum[0] = _mm512_fmadd_ps(value, value, sum[0]);
    }
    total += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }
  return total;
}

// ---- squared norms of rows, (m, 1), or of columns, (1, n), and their sum

std::tuple<Tensor, double> channel_squares_cpu(const Tensor& g, bool of_rows) {
  TORCH_CHECK(g.dim() == 2, "channel_squares: a matrix");
  const int64_t m = g.size(0), n = g.size(1);
  const float* from = numbers(g, "channel_squares: the gradient");
  Tensor found = at::empty({of_rows ? m : 1, of_rows ? 1 : n}, g.options());
  float* to = found.mutable_data_ptr<float>();
  const auto and_sum = [&] { return std::tuple(found, std::accumulate(to, to + found.numel(), 0.0)); };
  if (of_rows) {
    at::parallel_for(0, m, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = static_cast<float>(squared_sum(from + i * n, n));
    });
    return and_sum();
  }
  at::parallel_for(0, (n + kLane - 1) / kLane, grain(m * kLane), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLane, last = std::min(end * kLane, n);
    std::fill(to + first, to + last, 0.0f);
    for (int64_t i = 0; i < m; i += kStripe) {
      const int64_t rows = std::min(kStripe, m - i);
      for (int64_t j = first; j < last; j += kLane) {
        const __mmask16 mask = lanes(last - j);
        __m512 sum = _mm512_setzero_ps();  // of few rows: the long sum has less to round
        for (int64_t t = 0; t < rows; ++t) {
          _mm_prefetch(from + (i + t + kStripe) * n + j, _MM_HINT_T1);
          const __m512 value = _mm512_maskz_loadu_ps(mask, from + (i + t) * n + j);
          sum = _mm512_fmadd_ps(value, value, sum);
        }
        _mm512_mask_storeu_ps(to + j, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to + j), sum));
      }
    }
  });
  return and_sum();
}

// q <- b2 q + share squares; 1 / (sqrt(q / correction) + eps), and the sum of squares times its square.
std::tuple<Tensor, double> channel_scales_cpu(
    const Tensor& squares, Tensor& held, double beta2, double share, double correction, double eps) {
  TORCH_CHECK(squares.sizes() == held.sizes(), "channel_scales_: one shape");
  const float* given = numbers(squares, "channel_scales_: squares");
  float* mean = own_numbers(held, "channel_scales_: the mean squares");
  Tensor scales = at::empty_like(squares);
  float* to = scales.mutable_data_ptr<float>();
  const __m512 kept = _mm512_set1_ps(static_cast<float>(beta2)), added = _mm512_set1_ps(static_cast<float>(share));
  const __m512 over = _mm512_set1_ps(static_cast<float>(correction)), e = _mm512_set1_ps(static_cast<float>(eps));
  double total = 0;
  for (int64_t i = 0; i < squares.numel(); i += kLane) {
    const __mmask16 mask = lanes(squares.numel() - i);
    const __m512 square = _mm512_maskz_loadu_ps(mask, given + i);
    const __m512 old = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, mean + i), kept);
    const __m512 now = _mm512_fmadd_ps(square, added, old);
    const __m512 root = _mm512_add_ps(_mm512_sqrt_ps(_mm512_div_ps(now, over)), e);
    const __m512 scale = _mm512_maskz_div_ps(mask, _mm512_set1_ps(1.0f), root);
    _mm512_mask_storeu_ps(mean + i, mask, now);
    _mm512_mask_storeu_ps(to + i, mask, scale);
    total += _mm512_reduce_add_ps(_mm512_mul_ps(_mm512_mul_ps(scale, square), scale));
  }
  held.unsafeGetTensorImpl()->bump_version();
  return {scales, total};
}

// ---- coordinates on the left: R (r, n) = Q^T G, Q (m, r) the basis, its rows scaled

// R += Q^T G for `kHeld` rows of G, held in registers: coefficients (r, kHeld), R (r, 16) for one register of columns.
template <int kRanks>
inline void add_rows(const __m512 (&held)[kHeld], const float* coefficients, float* found) {
  __m512 sum[kRanks];
  for (int p = 0; p < kRanks; ++p) sum[p] = _mm512_load_ps(found + p * kLane);
  for (int i = 0; i < kHeld; ++i)
    for (int p = 0; p < kRanks; ++p)
      sum[p] = _mm512_fmadd_ps(_mm512_set1_ps(coefficients[p * kHeld + i]), held[i], sum[p]);
  for (int p = 0; p < kRanks; ++p) _mm512_store_ps(found + p * kLane, sum[p]);
}

void left_coordinates(
    const float* g, int64_t m, int64_t n, const float* basis, int64_t r, const float* scales, float* to) {
  const int64_t pieces = (m + kHeld - 1) / kHeld, columns = (n + kLane - 1) / kLane;
  Scratch scratch;
  auto* coefficients = scratch.take<float>(pieces * r * kHeld);  // (pieces, r, kHeld)
  for (int64_t k = 0; k < pieces * kHeld; ++k) {
    float* piece = coefficients + k / kHeld * r * kHeld + k % kHeld;
    const float scale = k < m ? (scales == nullptr ? 1.0f : scales[k]) : 0.0f;
    for (int64_t rho = 0; rho < r; ++rho) piece[rho * kHeld] = k < m ? scale * basis[k * r + rho] : 0.0f;
  }
  const int64_t together = std::max<int64_t>(4, kCoordinates / (std::max<int64_t>(r, 1) * kLane));
  at::parallel_for(0, columns, grain(m * r * kLane), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += together) {
      const int64_t count = std::min(together, end - first);
      Scratch inner;
      auto* found = inner.take<float>(count * r * kLane);  // (columns / 16, r, 16)
      std::fill(found, found + count * r * kLane, 0.0f);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const float* rows[kHeld];  // past the end the last one again, times zero
        for (int64_t i = 0; i < kHeld; ++i) rows[i] = g + std::min(piece * kHeld + i, m - 1) * n;
        const float* mine = coefficients + piece * r * kHeld;
        for (int64_t c = 0; c < count; ++c) {
          const int64_t j = (first + c) * kLane;
          const __mmask16 mask = lanes(n - j);
          __m512 held[kHeld];
          for (int64_t i = 0; i < kHeld; ++i) {
            held[i] = _mm512_maskz_loadu_ps(mask, rows[i] + j);
            _mm_prefetch(rows[i] + kHeld * n + j, _MM_HINT_T1);
          }
          float* block = found + c * r * kLane;
          int64_t rho = 0;
          for (; rho + 4 <= r; rho += 4) add_rows<4>(held, mine + rho * kHeld, block + rho * kLane);
          for (; rho < r; ++rho) add_rows<1>(held, mine + rho * kHeld, block + rho * kLane);
        }
      }
      for (int64_t rho = 0; rho < r; ++rho)
        for (int64_t c = 0; c < count; ++c) {
          const int64_t j = (first + c) * kLane;
          _mm512_mask_storeu_ps(to + rho * n + j, lanes(n - j), _mm512_load_ps(found + (c * r + rho) * kLane));
        }
    }
  });
}

// ---- coordinates on the right: R (m, r) = G Q, Q (n, r) the basis, its rows scaled

// (n, r) to (r, step), zeros from n to step.
void transposed(const float* basis, int64_t n, int64_t r, const float* scales, int64_t step, float* to) {
  __m512i v[16];
  for (int64_t j = 0; j < step; j += kLane)
    for (int64_t rho = 0; rho < r; rho += kLane) {
      const __mmask16 mask = lanes(r - rho);
      for (int64_t i = 0; i < kLane; ++i) {
        if (j + i >= n) {
          v[i] = _mm512_setzero_si512();
          continue;
        }
        const __m512 row = _mm512_maskz_loadu_ps(mask, basis + (j + i) * r + rho);
        v[i] = _mm512_castps_si512(scales == nullptr ? row : _mm512_mul_ps(row, _mm512_set1_ps(scales[j + i])));
      }
      transpose16(v);
      for (int64_t i = 0; i < std::min(kLane, r - rho); ++i) _mm512_storeu_si512(to + (rho + i) * step + j, v[i]);
    }
}

// The sums of four registers.
inline __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

void right_coordinates(
    const float* g, int64_t m, int64_t n, const float* basis, int64_t r, const float* scales, float* to) {
  const int64_t step = up(n, kLane);
  Scratch scratch;
  auto* turned = scratch.take<float>(r * step);
  transposed(basis, n, r, scales, step, turned);
  const int64_t tiles = (m + kLiftRows - 1) / kLiftRows;
  at::parallel_for(0, tiles, grain(kLiftRows * n * r), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kLiftRows, count = std::min(kLiftRows, m - first);
      const float* rows[kLiftRows];
      for (int64_t i = 0; i < kLiftRows; ++i) rows[i] = g + std::min(first + i, m - 1) * n;
      for (int64_t rho = 0; rho < r; rho += 4) {
        const float* q[4];
        for (int64_t p = 0; p < 4; ++p) q[p] = turned + std::min(rho + p, r - 1) * step;
        __m512 sum[kLiftRows][4];
        for (auto& row : sum)
          for (auto& one : row) one = _mm512_setzero_ps();
        const auto add = [&](int64_t j, __mmask16 mask) {
          __m512 direction[4];
          if (rho == 0)
            for (int i = 0; i < kLiftRows; ++i) _mm_prefetch(rows[i] + kLiftRows * n + j, _MM_HINT_T1);
          for (int p = 0; p < 4; ++p) direction[p] = _mm512_loadu_ps(q[p] + j);
          for (int i = 0; i < kLiftRows; ++i) {
            const __m512 value = _mm512_maskz_loadu_ps(mask, rows[i] + j);
            for (int p = 0; p < 4; ++p) sum[i][p] = _mm512_fmadd_ps(value, direction[p], sum[i][p]);
          }
        };
        int64_t j = 0;
        for (; j + kLane <= n; j += kLane) add(j, 0xffff);
        if (j < n) add(j, lanes(n - j));
        const auto mask = static_cast<__mmask8>((1 << std::min<int64_t>(4, r - rho)) - 1);
        for (int i = 0; i < kLiftRows; ++i)  // to a constant: sums then stay in registers
          if (i < count)
            _mm_mask_storeu_ps(
                to + (first + i) * r + rho, mask, four_sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
      }
    }
  });
}

// Coordinates of G in a basis whose rows are scaled, (r, n) or (m, r), and the sum of their squares in float64.
std::tuple<Tensor, double> coordinates_cpu(
    const Tensor& g, const Tensor& basis, bool left, const std::optional<Tensor>& scales) {
  TORCH_CHECK(g.dim() == 2 && basis.dim() == 2, "coordinates: a matrix and a basis");
  const int64_t m = g.size(0), n = g.size(1), r = basis.size(1), side = left ? m : n;
  TORCH_CHECK(basis.size(0) == side, "coordinates: a basis of ", side, " rows, not ", basis.size(0));
  TORCH_CHECK(!scales || scales->numel() == side, "coordinates: ", side, " scales");
  const float *from = numbers(g, "coordinates: the gradient"), *given = numbers(basis, "coordinates: the basis");
  const float* sizes = scales ? numbers(*scales, "coordinates: scales") : nullptr;
  Tensor found = at::empty({left ? r : m, left ? n : r}, g.options());
  if (found.numel() == 0) return {found, 0.0};
  if (g.numel() == 0) return {found.zero_(), 0.0};
  (left ? left_coordinates : right_coordinates)(from, m, n, given, r, sizes, found.mutable_data_ptr<float>());
  return {found, squared_sum(found.const_data_ptr<float>(), found.numel())};
}

// ---- Adam's moments

// m <- b1 m + (1 - b1) R, v <- b2 v + (1 - b2) R^2; the direction m / (sqrt(v) + eps), its squared norm, and that of
// the direction without momentum, R / (sqrt(v) + eps).
std::tuple<Tensor, double, double> moments_cpu(
    const Tensor& coordinates, Tensor& first, Tensor& second, double beta1, double beta2, double eps) {
  TORCH_CHECK(coordinates.sizes() == first.sizes() && first.sizes() == second.sizes(), "moments_: one shape");
  const int64_t count = coordinates.numel(), pieces = (count + kSummed - 1) / kSummed;
  const float* given = numbers(coordinates, "moments_: coordinates");
  float *m = own_numbers(first, "moments_: the first moment"), *v = own_numbers(second, "moments_: the second");
  Tensor direction = at::empty_like(coordinates);
  float* to = direction.mutable_data_ptr<float>();
  std::vector<std::array<float, 2>> sums(pieces);
  const __m512 b1 = _mm512_set1_ps(static_cast<float>(1 - beta1)), b2 = _mm512_set1_ps(static_cast<float>(beta2));
  const __m512 rest = _mm512_set1_ps(static_cast<float>(1 - beta2)), e = _mm512_set1_ps(static_cast<float>(eps));
  at::parallel_for(0, pieces, 8, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      __m512 slow = _mm512_setzero_ps(), fast = _mm512_setzero_ps();
      for (int64_t i = piece * kSummed; i < std::min((piece + 1) * kSummed, count); i += kLane) {
        const __mmask16 mask = lanes(count - i);
        const __m512 r = _mm512_maskz_loadu_ps(mask, given + i), old = _mm512_maskz_loadu_ps(mask, m + i);
        const __m512 mean = _mm512_fmadd_ps(b1, _mm512_sub_ps(r, old), old);
        const __m512 kept = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, v + i), b2);
        const __m512 square = _mm512_fmadd_ps(_mm512_mul_ps(r, r), rest, kept);
        const __m512 root = _mm512_add_ps(_mm512_sqrt_ps(square), e);
        const __m512 step = _mm512_maskz_div_ps(mask, mean, root), bare = _mm512_maskz_div_ps(mask, r, root);
        _mm512_mask_storeu_ps(m + i, mask, mean);
        _mm512_mask_storeu_ps(v + i, mask, square);
        _mm512_mask_storeu_ps(to + i, mask, step);
        slow = _mm512_fmadd_ps(step, step, slow);
        fast = _mm512_fmadd_ps(bare, bare, fast);
      }
      sums[piece] = {_mm512_reduce_add_ps(slow), _mm512_reduce_add_ps(fast)};
    }
  });
  first.unsafeGetTensorImpl()->bump_version();
  second.unsafeGetTensorImpl()->bump_version();
  double slow = 0, fast = 0;
  for (const auto& one : sums) slow += one[0], fast += one[1];
  return {direction, slow, fast};
}

// ---- the step of the weight

// B (r, n) as panels of 64 columns, (panels, r, 64), times a factor; zeros past the end.
void panels_of_rows(const float* b, int64_t r, int64_t n, float factor, float* to) {
  const __m512 times = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < n; j += kLane) {
    float* place = to + j / kPanel * kPanel * r + j % kPanel;
    const __mmask16 mask = lanes(n - j);
    for (int64_t k = 0; k < r; ++k)
      _mm512_store_ps(place + k * kPanel, _mm512_mul_ps(times, _mm512_maskz_loadu_ps(mask, b + k * n + j)));
  }
}

// The same of the transpose of B (n, r).
void panels_of_columns(const float* b, int64_t r, int64_t n, float factor, float* to) {
  __m512i v[16];
  const __m512 times = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < n; j += kLane)
    for (int64_t k = 0; k < r; k += kLane) {
      const __mmask16 mask = lanes(r - k);
      for (int64_t i = 0; i < kLane; ++i)
        v[i] = j + i < n ? _mm512_castps_si512(_mm512_mul_ps(times, _mm512_maskz_loadu_ps(mask, b + (j + i) * r + k)))
                         : _mm512_setzero_si512();
      transpose16(v);
      float* place = to + j / kPanel * kPanel * r + j % kPanel;
      for (int64_t i = 0; i < std::min(kLane, r - k); ++i) _mm512_store_si512(place + (k + i) * kPanel, v[i]);
    }
}

// What a step adds to W beside the product: W <- shrink W + factor G + A B, a factor for each row or for each column.
struct Blend {
  float* w;
  const float* g;  // may be missing
  int64_t m, n;
  float shrink;
  const float *of_rows, *of_columns;  // one of them, where there is a gradient
};

template <bool kGradient, bool kColumns, bool kWhole>
inline void lift_tile(
    const Blend& blend, int64_t first, int64_t j, int64_t next, const float* a, int64_t r, const float* panel) {
  __m512 sum[kLiftRows][kPanelLanes];
  const float* rows[kLiftRows];  // past the end the last one again, never stored
  for (int i = 0; i < kLiftRows; ++i) {
    rows[i] = a + std::min(first + i, blend.m - 1) * r;
    for (int z = 0; z < kPanelLanes; ++z) sum[i][z] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < r; ++k) {
    __m512 b[kPanelLanes];
    for (int z = 0; z < kPanelLanes; ++z) b[z] = _mm512_load_ps(panel + k * kPanel + z * kLane);
    if (k < kLiftRows) {
      const int64_t ahead = next + k * blend.n;
      for (int z = 0; z < kPanelLanes; ++z) {
        _mm_prefetch(blend.w + ahead + z * kLane, _MM_HINT_T0);
        if constexpr (kGradient) _mm_prefetch(blend.g + ahead + z * kLane, _MM_HINT_T0);
      }
    }
    for (int i = 0; i < kLiftRows; ++i) {
      const __m512 value = _mm512_set1_ps(rows[i][k]);
      for (int z = 0; z < kPanelLanes; ++z) sum[i][z] = _mm512_fmadd_ps(value, b[z], sum[i][z]);
    }
  }
  // The weight and the gradient come last: their memory has had the product's time to arrive.
  __mmask16 masks[kPanelLanes];
  for (int z = 0; z < kPanelLanes; ++z) masks[z] = kWhole ? 0xffff : lanes(blend.n - j - z * kLane);
  const auto load = [&](const float* from, int z) {
    return kWhole ? _mm512_loadu_ps(from + z * kLane) : _mm512_maskz_loadu_ps(masks[z], from + z * kLane);
  };
  const __m512 shrink = _mm512_set1_ps(blend.shrink);
  __m512 factor[kPanelLanes];
  if constexpr (kColumns)
    for (int z = 0; z < kPanelLanes; ++z) factor[z] = load(blend.of_columns + j, z);
  ISOGRID_UNROLL
  for (int i = 0; i < kLiftRows; ++i) {
    if (first + i >= blend.m) continue;
    float* w = blend.w + (first + i) * blend.n + j;
    const float* g = kGradient ? blend.g + (first + i) * blend.n + j : nullptr;
    if constexpr (kGradient && !kColumns)
      for (auto& one : factor) one = _mm512_set1_ps(blend.of_rows[first + i]);
    for (int z = 0; z < kPanelLanes; ++z) {
      __m512 value = _mm512_fmadd_ps(shrink, load(w, z), sum[i][z]);
      if constexpr (kGradient) value = _mm512_fmadd_ps(factor[z], load(g, z), value);
      if constexpr (kWhole)
        _mm512_storeu_ps(w + z * kLane, value);
      else
        _mm512_mask_storeu_ps(w + z * kLane, masks[z], value);
    }
  }
}

template <bool kGradient, bool kColumns>
void lift_all(const Blend& blend, const float* a, int64_t r, const float* panels) {
  const int64_t tiles = (blend.m + kLiftRows - 1) / kLiftRows, count = (blend.n + kPanel - 1) / kPanel;
  const int64_t together = std::max<int64_t>(1, kCoordinates / (std::max<int64_t>(r, 1) * kPanel));
  at::parallel_for(0, tiles, grain(kLiftRows * blend.n * r), [&](int64_t begin, int64_t end) {
    for (int64_t start = 0; start < count; start += together)
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t p = start; p < std::min(start + together, count); ++p) {
          const float* panel = panels + p * kPanel * r;
          const int64_t first = tile * kLiftRows, last = std::min(start + together, count) - 1;
          const int64_t next = p < last ? first * blend.n + (p + 1) * kPanel  // what the next tile begins with
                                        : (first + kLiftRows) * blend.n + start * kPanel;
          if ((p + 1) * kPanel <= blend.n)
            lift_tile<kGradient, kColumns, true>(blend, first, p * kPanel, next, a, r, panel);
          else
            lift_tile<kGradient, kColumns, false>(blend, first, p * kPanel, next, a, r, panel);
        }
  });
}

// W <- after (before W - size (A B + factor G)): A (m, r) and B (r, n), or B transposed, (n, r); the factor is one for
// each row, for each column, or for all.
void lift_cpu(
    Tensor& w, const Tensor& a, const Tensor& b, bool turned, const std::optional<Tensor>& g,
    const std::optional<Tensor>& factor, double before, double size, double after) {
  TORCH_CHECK(w.dim() == 2 && a.dim() == 2 && b.dim() == 2, "lift_: matrices");
  const int64_t m = w.size(0), n = w.size(1), r = a.size(1);
  TORCH_CHECK(a.size(0) == m && b.size(turned ? 0 : 1) == n && b.size(turned ? 1 : 0) == r, "lift_: sizes of factors");
  TORCH_CHECK(g.has_value() == factor.has_value(), "lift_: a factor goes with a gradient");
  const float *left = numbers(a, "lift_: the left factor"), *right = numbers(b, "lift_: the right factor");
  float* to = own_numbers(w, "lift_: the weight");
  if (w.numel() == 0) return;
  const auto times = static_cast<float>(-size * after);
  Scratch scratch;
  Blend blend{to, nullptr, m, n, static_cast<float>(before * after), nullptr, nullptr};
  if (g) {
    TORCH_CHECK(g->sizes() == w.sizes(), "lift_: the gradient's shape");
    blend.g = numbers(*g, "lift_: the gradient");
    const float* given = numbers(*factor, "lift_: the factor");
    const bool by_row = factor->dim() == 2 && factor->size(0) == m && factor->size(1) == 1;
    const bool by_column = factor->dim() == 2 && factor->size(0) == 1 && factor->size(1) == n && !by_row;
    TORCH_CHECK(by_row || by_column || factor->numel() == 1, "lift_: a factor for each row, each column, or all");
    const int64_t channels = by_column ? n : m;
    auto* factors = scratch.take<float>(channels);
    for (int64_t i = 0; i < channels; ++i) factors[i] = times * given[by_row || by_column ? i : 0];
    (by_column ? blend.of_columns : blend.of_rows) = factors;
  }
  auto* panels = scratch.take<float>(up(n, kPanel) * r);
  if (n % kPanel) std::fill(panels + n / kPanel * kPanel * r, panels + up(n, kPanel) * r, 0.0f);
  (turned ? panels_of_columns : panels_of_rows)(right, r, n, times, panels);
  if (blend.g == nullptr)
    lift_all<false, false>(blend, left, r, panels);
  else if (blend.of_columns == nullptr)
    lift_all<true, false>(blend, left, r, panels);
  else
    lift_all<true, true>(blend, left, r, panels);
  w.unsafeGetTensorImpl()->bump_version();
}

TORCH_LIBRARY_FRAGMENT(isogrid, m) {
  m.def("channel_squares(Tensor g, bool of_rows) -> (Tensor, float)");
  m.def("channel_scales_(Tensor squares, Tensor(a!) held, float beta2, float share, float correction, float eps) -> "
        "(Tensor, float)");
  m.def("coordinates(Tensor g, Tensor basis, bool left, Tensor? scales) -> (Tensor, float)");
  m.def("moments_(Tensor coordinates, Tensor(a!) first, Tensor(b!) second, float beta1, float beta2, float eps) -> "
        "(Tensor, float, float)");
  m.def("lift_(Tensor(a!) w, Tensor a, Tensor b, bool turned, Tensor? g, Tensor? factor, float before, float size, "
        "float after) -> ()");
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("channel_squares", &channel_squares_cpu);
  m.impl("channel_scales_", &channel_scales_cpu);
  m.impl("coordinates", &coordinates_cpu);
  m.impl("moments_", &moments_cpu);
  m.impl("lift_", &lift_cpu);
}

}  // namespace isogrid
