"""C++ that emitted files of programs in tiles include: vectors, exp, products and sums of one tile in the cache."""

HEADER = "polyattn_tiles.h"
"""The name by which emitted C++ includes this text."""
LANES = 16
"""Axes that vectors run along are padded to a multiple of this many numbers, whatever the width of a vector."""
TEXT = r"""
// A tile is a matrix in the cache: rows, and lanes that vectors run along, padded to a multiple of 16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int64_t W = 16;
#elif defined(__AVX__)
constexpr int64_t W = 8;
#else
constexpr int64_t W = 4;
#endif
#define INLINE inline __attribute__((always_inline))

using Vec = float __attribute__((vector_size(4 * W)));
using Bits = int32_t __attribute__((vector_size(4 * W)));
using Size = int64_t;

constexpr Size CHUNK = 64;  // rows of a tile that are looked at together
constexpr float LOG2E = 1.44269504f;

INLINE Size padded(Size lanes) { return (lanes + 15) / 16 * 16; }
INLINE Vec all(float x) { return Vec{} + x; }
INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
INLINE float total(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (Size at = 0; at < W; ++at) sum += x[at];
  return sum;
#endif
}
INLINE Vec reciprocal(Vec x) { return 1.0f / x; }

// 2^x, to 1e-7 by a polynomial of least relative error: infinities and numbers that are none are what they are in C.
INLINE Vec exp2(Vec x) {
  const Vec high = all(200.0f), low = all(-200.0f);
  x = x > high ? high : x;
  x = x < low ? low : x;
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = all(12582912.0f);  // 3 · 2^22: what is added to it is rounded to an integer
  const Vec n = (x + magic) - magic;
#endif
  const Vec f = x - n;
  Vec p = f * 1.32647270653e-3f + 9.67151264891e-3f;
  p = p * f + 5.55073374369e-2f;
  p = p * f + 2.40222420852e-1f;
  p = p * f + 6.93146977599e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Bits k = __builtin_convertvector(n, Bits), half = k >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((k - half + 127) << 23);
#endif
}

// acc[m][n] += Σ_k x[m, k] y[k, n], with x[m, k] at x[m * x_row + k * x_k] and y[k, ·] at y + k * y_row.
template <int M, int N>
INLINE void multiply(Vec (&acc)[M][N], Size K, const float* x, Size x_row, Size x_k, const float* y, Size y_row) {
#pragma GCC unroll 2
  for (Size k = 0; k < K; ++k) {
    Vec right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(y + k * y_row + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float left = x[m * x_row + k * x_k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] += left * right[n];
    }
  }
}

// Summands of a tile: Σ_k x[row, k] y[k, lane], where rows of y are as long as those of the tile; x[row] y[lane];
// x[row]; y[lane].
struct Columns {
  Size K;
  const float* x;
  Size x_row;
  const float* y;
  template <int M, int N>
  INLINE void add(Vec (&acc)[M][N], Size row, Size lane, Size lanes) const {
    multiply(acc, K, x + row * x_row, x_row, 1, y + lane, lanes);
  }
};
struct RowsLanes {
  const float* x;
  Size x_row;
  const float* y;
  template <int M, int N>
  INLINE void add(Vec (&acc)[M][N], Size row, Size lane, Size lanes) const {
    multiply(acc, 1, x + row * x_row, x_row, 1, y + lane, lanes);
  }
};
struct Rows {
  const float* x;
  Size x_row;
  template <int M, int N>
  INLINE void add(Vec (&acc)[M][N], Size row, Size, Size) const {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] += x[(row + m) * x_row];
    }
  }
};
struct Lanes {
  const float* y;
  template <int M, int N>
  INLINE void add(Vec (&acc)[M][N], Size, Size lane, Size) const {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] += load(y + lane + n * W);
    }
  }
};

template <int M, int N, class Then, class... Terms>
INLINE void tile_block(Size row, Size lane, Size lanes, const Then& then, const Terms&... terms) {
  Vec acc[M][N] = {};
  (terms.add(acc, row, lane, lanes), ...);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) then(acc[m][n], (row + m) * lanes + lane + n * W);
  }
}

template <int M, class Then, class... Terms>
INLINE void tile_rows(Size row, Size lanes, const Then& then, const Terms&... terms) {
  Size lane = 0;
  for (; lane + 4 * W <= lanes; lane += 4 * W) tile_block<M, 4>(row, lane, lanes, then, terms...);
  for (; lane < lanes; lane += W) tile_block<M, 1>(row, lane, lanes, then, terms...);
}

// then(sum of the terms, where) for every vector of a tile; lanes is a multiple of 16.
template <class Then, class... Terms>
INLINE void product(Size rows, Size lanes, const Then& then, const Terms&... terms) {
  Size row = 0;
  for (; row + 4 <= rows; row += 4) tile_rows<4>(row, lanes, then, terms...);
  for (; row < rows; ++row) tile_rows<1>(row, lanes, then, terms...);
}

template <int M, int N>
INLINE void add_block(Size K, const float* x, Size x_row, Size x_k, const float* y, Size y_row, float* out,
                      Size out_row) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = load(out + m * out_row + n * W);
  }
  multiply(acc, K, x, x_row, x_k, y, y_row);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + m * out_row + n * W, acc[m][n]);
  }
}

template <int M>
INLINE void add_rows(Size width, Size K, const float* x, Size x_row, Size x_k, const float* y, Size y_row, float* out,
                     Size out_row) {
  Size at = 0;
  for (; at + 2 * W <= width; at += 2 * W) add_block<M, 2>(K, x, x_row, x_k, y + at, y_row, out + at, out_row);
  for (; at < width; at += W) add_block<M, 1>(K, x, x_row, x_k, y + at, y_row, out + at, out_row);
}

INLINE void add(Size rows, Size width, Size K, const float* x, Size x_row, Size x_k, const float* y, Size y_row,
                float* out, Size out_row) {
  Size row = 0;
  for (; row + 8 <= rows; row += 8)
    add_rows<8>(width, K, x + row * x_row, x_row, x_k, y, y_row, out + row * out_row, out_row);
  for (; row < rows; ++row)
    add_rows<1>(width, K, x + row * x_row, x_row, x_k, y, y_row, out + row * out_row, out_row);
}

// out[row, ·] += Σ_lane tile[row, lane] y[lane, ·]; width is a multiple of 16.
INLINE void sum_lanes(Size rows, Size lanes, const float* tile, Size width, const float* y, Size y_row, float* out,
                      Size out_row) {
  add(rows, width, lanes, tile, padded(lanes), 1, y, y_row, out, out_row);
}

// out[lane, ·] += Σ_row tile[row, lane] y[row, ·]
INLINE void sum_rows(Size rows, Size lanes, const float* tile, Size width, const float* y, Size y_row, float* out,
                     Size out_row) {
  add(lanes, width, rows, tile, 1, padded(lanes), y, y_row, out, out_row);
}

// out[row] += Σ_lane tile[row, lane] y[lane]; without y, 1 in its place.
INLINE void sum_lanes(Size rows, Size lanes, const float* tile, const float* y, float* out, Size out_row) {
  const Size whole = lanes / W * W;
  for (Size row = 0; row < rows; ++row) {
    const float* x = tile + row * padded(lanes);
    Vec sum = {};
    float rest = 0;
    for (Size lane = 0; lane < whole; lane += W) sum += y ? load(x + lane) * load(y + lane) : load(x + lane);
    for (Size lane = whole; lane < lanes; ++lane) rest += y ? x[lane] * y[lane] : x[lane];
    out[row * out_row] += total(sum) + rest;
  }
}

// out[lane] += Σ_row tile[row, lane] y[row]; without y, 1 in its place.
INLINE void sum_rows(Size rows, Size lanes, const float* tile, const float* y, Size y_row, float* out) {
  const Size whole = lanes / W * W;
  for (Size lane = 0; lane < whole; lane += W) {
    Vec sum = load(out + lane);
    for (Size row = 0; row < rows; ++row) {
      const Vec x = load(tile + row * padded(lanes) + lane);
      sum += y ? y[row * y_row] * x : x;
    }
    store(out + lane, sum);
  }
  for (Size lane = whole; lane < lanes; ++lane)
    for (Size row = 0; row < rows; ++row) out[lane] += (y ? y[row * y_row] : 1) * tile[row * padded(lanes) + lane];
}

// Memory of one thread for a tile.
class Tile {
 public:
  explicit Tile(Size lanes) {
    data_ = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * CHUNK * padded(lanes)));
    if (!data_) std::abort();
  }
  ~Tile() { std::free(data_); }
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_;
};

// The first of `count` tiles that a slot takes, so that all slots have about as many pairs; first[tile] counts pairs.
INLINE Size share(Size slot, Size slots, Size count, const Size* first) {
  return std::lower_bound(first, first + count, first[count] * slot / slots) - first;
}
"""
