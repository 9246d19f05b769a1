// The products that gradients need, on the same weights: rows times blocks as stored, and sums of outer products.
#pragma once

#include "tiles.h"

namespace isogrid {

// Rows of the tiles that outer products are summed over.
constexpr int64_t kGramRows = 64;

// Two rows of n numbers as pairs, (n, 2): what a 16-bit product takes on its right. `second` may be missing.
inline void pair_rows(const BFloat16* first, const BFloat16* second, int64_t n, BFloat16* to) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  for (int64_t j = 0; j < n; j += kLane) {
    const __mmask16 mask = n - j >= kLane ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m256i a = _mm256_maskz_loadu_epi16(mask, first + j);
    const __m256i b = second == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(mask, second + j);
    const __m512i both =
        _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), low, _mm512_castsi256_si512(b));
    _mm512_mask_storeu_epi32(to + 2 * j, mask, both);
  }
}

inline void to_bfloat16(const float* from, int64_t n, BFloat16* to) {
  for (int64_t j = 0; j < n; j += kLane) {
    const __mmask16 mask = n - j >= kLane ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512i wide = pairs(_mm512_maskz_loadu_ps(mask, from + j), _mm512_setzero_ps());
    _mm256_mask_storeu_epi16(to + j, mask, _mm512_cvtepi32_epi16(wide));
  }
}

// ---- y (rows, p) = x (rows, q) · w (q, p) for one block; floats go straight to their place.

inline void turned_block(
    const float* x, int64_t x_step, int64_t rows, int64_t q, int64_t p, const float* w, float* y, int64_t y_step) {
  at::native::cpublas::brgemm(rows, p, q, x_step, p, y_step, false, x, w, y, /*is_vnni=*/false);
}

// The weights as pairs of rows, once for all tiles; an odd last row is paired with zeros.
inline void pack_block(const BFloat16* w, int64_t q, int64_t p, BFloat16* to) {
  for (int64_t i = 0; i < q; i += 2) pair_rows(w + i * p, i + 1 < q ? w + (i + 1) * p : nullptr, p, to + i * p);
}

// ---- sums over rows of y^T x: feature-major tiles on the left, rows on the right.

// (features, rows) of a tile, row-major in the dtype of the product.
inline void turn_tile(const float* y, int64_t step, int64_t q, const Tile& tile, float* to) {
  __m512i v[16];
  for (int64_t f = 0; f < q; f += kLane) {
    const int64_t real = std::min(q - f, kLane);
    const __mmask16 mask = static_cast<__mmask16>((1u << real) - 1);
    for (int64_t t = 0; t < tile.padded; t += kLane) {
      for (int64_t i = 0; i < kLane; ++i)
        v[i] = t + i < tile.rows ? _mm512_maskz_loadu_epi32(mask, y + (t + i) * step + f) : _mm512_setzero_si512();
      transpose16(v);
      for (int64_t i = 0; i < real; ++i) _mm512_storeu_si512(to + (f + i) * tile.stride + t, v[i]);
    }
  }
}

inline void turn_tile(const BFloat16* y, int64_t step, int64_t q, const Tile& tile, BFloat16* to) {
  __m512i v[16];
  for (int64_t f = 0; f < q; f += kLane) {
    const int64_t real = std::min(q - f, kLane);
    const __mmask16 mask = static_cast<__mmask16>((1u << real) - 1);
    for (int64_t t = 0; t < tile.padded; t += kLane) {
      for (int64_t i = 0; i < kLane; ++i)
        v[i] = t + i < tile.rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, y + (t + i) * step + f))
                                 : _mm512_setzero_si512();
      transpose16(v);
      for (int64_t i = 0; i < real; ++i)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + (f + i) * tile.stride + t), _mm512_cvtepi32_epi16(v[i]));
    }
  }
}

}  // namespace isogrid
