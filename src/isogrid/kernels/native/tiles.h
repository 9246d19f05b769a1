// Tiles of rows, feature-major: loading, small products, storing.
#pragma once

#include "registers.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace isogrid {

// Rows of a tile: as many as keep its features in the second-level cache, a multiple of 16 (one register).
constexpr int64_t kMostRows = 64;
constexpr int64_t kTileBytes = 640 * 1024;
// Rows of weights that a product has in the cache while several tiles, or sums, go by.
constexpr int64_t kChunk = 64;

inline int64_t tile_width(int64_t rows, int64_t features) {
  int64_t width = kMostRows;
  while (width > kLane && width * features * static_cast<int64_t>(sizeof(float)) > kTileBytes) width /= 2;
  const int64_t threads = at::get_num_threads();
  while (width > kLane && rows <= width * (threads - 1)) width /= 2;  // a tile for each thread
  return width;
}

struct Tile {
  int64_t rows;    // real ones
  int64_t padded;  // a multiple of 16
  int64_t stride;  // numbers between two features: off the powers of two that would share a cache set
  explicit Tile(int64_t count) : rows(count), padded((count + kLane - 1) / kLane * kLane), stride(padded + kLane) {}
  Tile(int64_t count, int64_t step) : rows(count), padded((count + kLane - 1) / kLane * kLane), stride(step) {}
};

// Memory of one tile, grown once a thread and used again. One within another takes other pieces.
class Scratch {
 public:
  Scratch() : begun_(mine().used) {}
  ~Scratch() { mine().used = begun_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    Pool& pool = mine();
    if (pool.used == pool.pieces.size()) pool.pieces.emplace_back();
    Piece& piece = pool.pieces[pool.used++];
    if (piece.bytes < bytes) {
      piece.memory = {};  // first: never both at once
      piece.memory = c10::GetCPUAllocator()->allocate(bytes);  // at a multiple of 64; counted where memory is
      piece.bytes = bytes;
    }
    return static_cast<T*>(piece.memory.get());
  }

 private:
  struct Piece {
    c10::DataPtr memory;
    size_t bytes = 0;
  };
  struct Pool {
    std::vector<Piece> pieces;
    size_t used = 0;
  };
  static Pool& mine() {
    thread_local Pool pool;
    return pool;
  }
  size_t begun_;
};

template <typename F>
void over_tiles(int64_t rows, int64_t width, const F& work) {
  const int64_t tiles = (rows + width - 1) / width;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work(t * width, std::min(width, rows - t * width));
    at::native::cpublas::brgemm_release();
  });
}

// Numbers of a stage's weights from which on several threads share a single tile.
constexpr int64_t kShared = 64 * 1024;

inline bool shares_tile(int64_t rows, int64_t width, int64_t weights) {
  return rows <= width && weights >= kShared && at::get_num_threads() > 1;
}

// work(block, first, count) for all rows of all blocks' weights: one block after the other, or shared out.
template <typename F>
void over_blocks(int64_t blocks, int64_t size, bool shared, const F& work) {
  if (!shared) {
    for (int64_t c = 0; c < blocks; ++c) work(c, 0, size);
    return;
  }
  const int64_t threads = at::get_num_threads(), parts = blocks >= threads ? 1 : (threads + blocks - 1) / blocks;
  const int64_t each = ((size + parts - 1) / parts + kLane - 1) / kLane * kLane;
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first = n % parts * each, count = std::min(each, size - first);
      if (count > 0) work(n / parts, first, count);
    }
    at::native::cpublas::brgemm_release();
  });
}

// ---- loading: rows (rows, features) to feature-major.

// What a product takes on its right. Floats: [feature][row]. bfloat16: [feature / 2][row][2].
template <typename Order>
void load(
    const float* x, int64_t step, int64_t features, const Order& order, int64_t whole, const Tile& tile, float* to) {
  turn(x, step, tile.rows, features, whole, tile.padded, [&](int64_t f) { return to + order.row(f) * tile.stride; });
}

template <typename Order>
void load(
    const BFloat16* x, int64_t step, int64_t features, const Order& order, int64_t whole, const Tile& tile,
    BFloat16* to) {
  __m512i v[16];  // units of two neighbours; in turn, these belong to different blocks
  for (int64_t f = 0; f < whole; f += 2 * kLane) {
    const int64_t left = std::min(whole - f, 2 * kLane);
    const __mmask32 mask = wide_lanes(features - f);
    for (int64_t t = 0; t < tile.padded; t += kLane) {
      registers(x + f, step, t, 1, tile.rows, mask, v);
      transpose16(v);
      if (order.straight()) {
        ISOGRID_UNROLL
        for (int i = 0; i < kLane; ++i)
          if (2 * i < left) _mm512_storeu_si512(to + (f + 2 * i) * tile.stride + 2 * t, v[i]);
        continue;
      }
      alignas(64) uint16_t unit[16 * 32];
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i) _mm512_store_si512(unit + 32 * i, v[i]);
      for (int64_t i = 0; i < left; ++i) {
        const int64_t row = order.row(f + i);
        auto* place = reinterpret_cast<uint16_t*>(to) + row / 2 * 2 * tile.stride + 2 * t + row % 2;
        for (int64_t n = 0; n < kLane; ++n) place[2 * n] = unit[i / 2 * 32 + 2 * n + i % 2];
      }
    }
  }
}

// ---- products: c (m, n) = a (m, k) · b (k, n), in float; added to c where `more`.

inline void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_step, const float* b, int64_t b_step, float* c,
    int64_t c_step, bool more = false) {
  at::native::cpublas::brgemm(m, n, k, a_step, b_step, c_step, more, a, b, c, /*is_vnni=*/false);
}

// `b` in pairs of its rows: (k / 2, n, 2).
inline void multiply(
    int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t a_step, const BFloat16* b, int64_t b_step, float* c,
    int64_t c_step, bool more = false) {
  // Pairs only: an odd number of terms ends the process where the processor has matrix tiles.
  const int64_t even = k / 2 * 2;
  if (even > 0) at::native::cpublas::brgemm(m, n, even, a_step, b_step, c_step, more, a, b, c, /*is_vnni=*/true);
  if (even == k) return;
  const BFloat16* last = b + even * b_step;
  for (int64_t i = 0; i < m; ++i) {
    const float weight = static_cast<float>(a[i * a_step + even]);
    float* row = c + i * c_step;
    for (int64_t t = 0; t < n; ++t)
      row[t] = (more || even > 0 ? row[t] : 0.0f) + weight * static_cast<float>(last[2 * t]);
  }
}

// ---- what a product takes from the one before: rows of floats, `count` of them, that place(i) finds.

template <typename Place>
inline void narrow(int64_t count, int64_t width, const Place& place, float* to, int64_t step) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = place(i);
    for (int64_t t = 0; t < width; t += kLane) _mm512_storeu_ps(to + i * step + t, _mm512_loadu_ps(from + t));
  }
}

template <typename Place>
inline void narrow(int64_t count, int64_t width, const Place& place, BFloat16* to, int64_t step) {
  for (int64_t i = 0; i < count; i += 2) {
    const float *one = place(i), *other = i + 1 < count ? place(i + 1) : nullptr;
    for (int64_t t = 0; t < width; t += kLane) {
      const __m512 high = other != nullptr ? _mm512_loadu_ps(other + t) : _mm512_setzero_ps();
      _mm512_storeu_si512(to + i * step + 2 * t, pairs(_mm512_loadu_ps(one + t), high));
    }
  }
}

// ---- storing: feature-major floats to rows (rows, features), a bias added where there is one.

ISOGRID_INLINE __m512 plus(const float* row, const float* bias, int64_t feature) {
  const __m512 value = _mm512_loadu_ps(row);
  return bias == nullptr ? value : _mm512_add_ps(value, _mm512_set1_ps(bias[feature]));
}

template <typename Order>
void store(
    const float* found, const Order& order, const float* bias, float* y, int64_t step, int64_t features,
    const Tile& tile) {
  __m512i v[16];
  for (int64_t f = 0; f < features; f += kLane) {
    const __mmask16 mask = lanes(features - f);
    const float* rows[16];
    int64_t number[16];
    for (int64_t i = 0; i < kLane; ++i) {
      number[i] = std::min(f + i, features - 1);
      rows[i] = found + order.row(number[i]) * tile.stride;
    }
    for (int64_t t = 0; t < tile.padded; t += kLane) {
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i) v[i] = _mm512_castps_si512(plus(rows[i] + t, bias, number[i]));
      transpose16(v);
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i)
        if (t + i < tile.rows) _mm512_mask_storeu_epi32(y + (t + i) * step + f, mask, v[i]);
    }
  }
}

template <typename Order>
void store(
    const float* found, const Order& order, const float* bias, BFloat16* y, int64_t step, int64_t features,
    const Tile& tile) {
  __m512i v[16];
  for (int64_t f = 0; f < features; f += 2 * kLane) {
    const __mmask32 mask = wide_lanes(features - f);
    const float* rows[32];
    int64_t number[32];
    for (int64_t i = 0; i < 2 * kLane; ++i) {
      number[i] = std::min(f + i, features - 1);
      rows[i] = found + order.row(number[i]) * tile.stride;
    }
    for (int64_t t = 0; t < tile.padded; t += kLane) {
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i)
        v[i] = pairs(plus(rows[2 * i] + t, bias, number[2 * i]), plus(rows[2 * i + 1] + t, bias, number[2 * i + 1]));
      transpose16(v);
      ISOGRID_UNROLL
      for (int i = 0; i < kLane; ++i)
        if (t + i < tile.rows) _mm512_mask_storeu_epi16(y + (t + i) * step + f, mask, v[i]);
    }
  }
}

}  // namespace isogrid
