// Sixteen registers at a time: transposing 16 x 16 numbers, and floats to bfloat16.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace isogrid {

using c10::BFloat16;

constexpr int64_t kLane = 16;  // floats of a register

// What holds sixteen registers has to be inlined and unrolled, or they go through memory.
#define ISOGRID_INLINE inline __attribute__((always_inline))
#define ISOGRID_UNROLL _Pragma("GCC unroll 16")

// The lanes that are left of a register.
inline __mmask16 lanes(int64_t left) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, kLane)) - 1);
}

inline __mmask32 wide_lanes(int64_t left) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(left, 0, 2 * kLane)) - 1);
}

// 16 x 16 transposition of 32-bit units in registers.
ISOGRID_INLINE void transpose16(__m512i v[16]) {
  __m512i t[16];
  ISOGRID_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  ISOGRID_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  ISOGRID_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  ISOGRID_UNROLL
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// Floats to bfloat16, to the nearest, ties to even. The processor's own instruction takes numbers below 1e-38 as zeros.
#ifdef __AVX512BF16__
ISOGRID_INLINE __m256i halves(__m512 value) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
}

// Two float rows to pairs, the first in the lower half.
ISOGRID_INLINE __m512i pairs(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
#else
ISOGRID_INLINE __m512i rounded_bits(__m512 value) {
  const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff), quiet = _mm512_set1_epi32(0x7fc00000);
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(half, odd));
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), quiet);
}

ISOGRID_INLINE __m256i halves(__m512 value) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(value), 16));
}

ISOGRID_INLINE __m512i pairs(__m512 low, __m512 high) {
  return _mm512_or_si512(
      _mm512_srli_epi32(rounded_bits(low), 16), _mm512_and_si512(rounded_bits(high), _mm512_set1_epi32(0xffff0000)));
}
#endif

// Any number of floats, rounded to what takes them.
inline void round_to(const float* from, int64_t count, float* to) {
  std::copy(from, from + count, to);
}

inline void round_to(const float* from, int64_t count, BFloat16* to) {
  for (int64_t j = 0; j < count; j += kLane) {
    const __mmask16 mask = lanes(count - j);
    _mm256_mask_storeu_epi16(to + j, mask, halves(_mm512_maskz_loadu_ps(mask, from + j)));
  }
}

// Sixteen registers of rows from `t` on, `apart` rows apart, zeros beyond the rows.
ISOGRID_INLINE void registers(
    const float* from, int64_t step, int64_t t, int64_t, int64_t rows, __mmask16 mask, __m512i v[16]) {
  if (t + kLane <= rows) {
    ISOGRID_UNROLL
    for (int i = 0; i < kLane; ++i) v[i] = _mm512_maskz_loadu_epi32(mask, from + (t + i) * step);
    return;
  }
  ISOGRID_UNROLL
  for (int i = 0; i < kLane; ++i)
    v[i] = t + i < rows ? _mm512_maskz_loadu_epi32(mask, from + (t + i) * step) : _mm512_setzero_si512();
}

ISOGRID_INLINE void registers(
    const BFloat16* from, int64_t step, int64_t t, int64_t apart, int64_t rows, __mmask32 mask, __m512i v[16]) {
  if (t + apart * kLane <= rows) {
    ISOGRID_UNROLL
    for (int i = 0; i < kLane; ++i) v[i] = _mm512_maskz_loadu_epi16(mask, from + (t + apart * i) * step);
    return;
  }
  ISOGRID_UNROLL
  for (int i = 0; i < kLane; ++i)
    v[i] = t + apart * i < rows ? _mm512_maskz_loadu_epi16(mask, from + (t + apart * i) * step) : _mm512_setzero_si512();
}

// Column f of a matrix (rows, columns), its rows `step` numbers apart, becomes the row at place(f): `width` numbers,
// zeros beyond the rows. Columns from `real` on are zeros.
template <typename Place>
inline void turn(
    const float* from, int64_t step, int64_t rows, int64_t real, int64_t columns, int64_t width, const Place& place) {
  __m512i v[16];
  for (int64_t f = 0; f < columns; f += kLane) {
    const __mmask16 mask = lanes(real - f);
    const int64_t left = std::min(columns - f, kLane);
    float* to[16];
    for (int64_t i = 0; i < left; ++i) to[i] = place(f + i);
    for (int64_t t = 0; t < width; t += kLane) {
      registers(from + f, step, t, 1, rows, mask, v);
      transpose16(v);
      const __mmask16 within = lanes(width - t);
      if (left == kLane) {
        ISOGRID_UNROLL
        for (int i = 0; i < kLane; ++i) _mm512_mask_storeu_epi32(to[i] + t, within, v[i]);
        continue;
      }
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i)
        if (i < left) _mm512_mask_storeu_epi32(to[i] + t, within, v[i]);
    }
  }
}

template <typename Place>
inline void turn(
    const BFloat16* from, int64_t step, int64_t rows, int64_t real, int64_t columns, int64_t width,
    const Place& place) {
  // 32 rows at a time: two columns share a 32-bit unit on the way in, two rows on the way out.
  const __m512i even = _mm512_set1_epi32(0xffff);
  __m512i low[16], high[16];
  for (int64_t f = 0; f < columns; f += 2 * kLane) {
    const __mmask32 mask = wide_lanes(real - f);
    const int64_t left = std::min(columns - f, 2 * kLane);
    BFloat16* to[32];
    for (int64_t i = 0; i < left; ++i) to[i] = place(f + i);
    for (int64_t t = 0; t < width; t += 2 * kLane) {
      // Row t + 2 i in the lower vectors, row t + 2 i + 1 in the upper: their units become neighbours.
      registers(from + f, step, t, 2, rows, mask, low);
      registers(from + f + step, step, t, 2, rows - 1, mask, high);
      transpose16(low);
      transpose16(high);
      const __mmask32 within = wide_lanes(width - t);
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i) {
        if (2 * i >= left) continue;
        const __m512i first = _mm512_or_si512(_mm512_and_si512(low[i], even), _mm512_slli_epi32(high[i], 16));
        _mm512_mask_storeu_epi16(to[2 * i] + t, within, first);
        if (2 * i + 1 == left) continue;
        const __m512i second = _mm512_or_si512(_mm512_srli_epi32(low[i], 16), _mm512_andnot_si512(even, high[i]));
        _mm512_mask_storeu_epi16(to[2 * i + 1] + t, within, second);
      }
    }
  }
}

}  // namespace isogrid
