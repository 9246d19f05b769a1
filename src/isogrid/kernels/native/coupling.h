// What stands between the stages of BLAST: every unit of rank rho mixed over the blocks.
#pragma once

#include "panels.h"

namespace isogrid {

// mixed[i, rho] = sum_j coupling[i, j, rho] hidden[j, rho]
inline void mix(
    int64_t b, int64_t r, const float* coupling, const float* hidden, float* mixed, const Tile& tile) {
  for (int64_t rho = 0; rho < r; ++rho)
    for (int64_t t = 0; t < tile.padded; t += 2 * kLane) {
      const bool two = t + kLane < tile.padded;
      for (int64_t i = 0; i < b; ++i) {
        __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
        for (int64_t j = 0; j < b; ++j) {
          const __m512 scale = _mm512_set1_ps(coupling[(i * b + j) * r + rho]);
          const float* from = hidden + (j * r + rho) * tile.stride + t;
          low = _mm512_fmadd_ps(scale, _mm512_loadu_ps(from), low);
          if (two) high = _mm512_fmadd_ps(scale, _mm512_loadu_ps(from + kLane), high);
        }
        float* to = mixed + (i * r + rho) * tile.stride + t;
        _mm512_storeu_ps(to, low);
        if (two) _mm512_storeu_ps(to + kLane, high);
      }
    }
}

// mixed[i] = sum_j coupling[i, j] * hidden[j], each block at a multiple of 16 numbers.
inline void few_mix(
    const float* hidden, int64_t rows, int64_t b, int64_t r, const float* coupling, int64_t pitch, float* mixed) {
  std::fill(mixed, mixed + rows * b * pitch, 0.0f);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < b; ++i)
      for (int64_t j = 0; j < b; ++j) {
        const float *scale = coupling + (i * b + j) * r, *from = hidden + (n * b + j) * r;
        float* to = mixed + (n * b + i) * pitch;
        for (int64_t rho = 0; rho < r; ++rho) to[rho] += scale[rho] * from[rho];
      }
}

// ---- the same in a panel, and backwards

inline __m512 sixteen_of(const float* from) {
  return _mm512_loadu_ps(from);
}

inline __m512 sixteen_of(const BFloat16* from) {
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

}  // namespace isogrid
