// The innermost product of int8_linear.cpp, for the instruction set that it is compiled for (build.TARGETS).
//
//     total[i][j] = sum over k of x[i, k] * weight[j, k]        exact, as int32; 0 for j >= N
//
// M: rows of x, activations as `Integer` with OFFSET added. N: rows of weight, int8 [out, in] as loaded. M * N sums and
// their operands must fit into the registers, because the compiler otherwise spills them to memory.
// `products` chooses: the first rows of x read the weights from memory, the others from the cache. `stream` reads one row
// of weights after the other, because memory is fastest in its own order, and `tile` reads N rows at once, because it then
// loads x once for all of them. With AVX2, many rows of x share weights that were widened once for all of them (`wide`).
// Indices must be compile-time constants, or the compiler keeps the arrays in memory instead of registers; hence
// `#pragma GCC unroll`. The additions are assembly, because GCC 12 puts the sums of intrinsics into other registers and
// moves them back, which costs a sixth of the speed.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "rows.h"

constexpr long COLUMNS = 4;  // rows of weights in a full tile
// Added to the integers of activations, because vpdpbusd needs them unsigned. It adds OFFSET times the sum of a row of
// weights to the product, and 255 * 128 * in must stay below 2**31 (build.MAX_IN_FEATURES). AVX2 does not need OFFSET
// but uses it too, so that both share int8_linear.cpp and a CPU without VNNI tests most of the code for VNNI.
constexpr int32_t OFFSET = 128;

// Bytes ahead of the one that is multiplied. Rows are too short for the hardware prefetcher, and a wait for memory is
// the time of several KiB. Of 1, 2, 4, 8, 12 and 16 KiB, the last three are equally fast.
constexpr long AHEAD = 8192;
constexpr long LINE = 64;  // bytes of a cache line
constexpr long MOST = 96;  // rows of x in one call of `products`, which stay in the second-level cache

#ifdef __AVX512VNNI__

// vpdpbusd multiplies unsigned bytes by signed bytes, and adds four products to 32 bits.
using Integer = uint8_t;
using Vector = __m512i;
constexpr long ROWS = 4;
constexpr long LANES = 64;  // elements of x or of weights in a vector

inline Vector zero() { return _mm512_setzero_si512(); }

// LANES elements of x or of weights.
inline Vector load(const void* from) { return _mm512_loadu_si512(from); }

// The first `count` elements, and zeros.
inline Vector load(const void* from, long count) { return _mm512_maskz_loadu_epi8((1ull << count) - 1, from); }

inline void add_products(Vector& sum, Vector row, Vector weight) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(weight));
}

inline Vector plus(Vector a, Vector b) { return _mm512_add_epi32(a, b); }

// The sums of the elements of four vectors.
inline __m128i add_up(Vector a, Vector b, Vector c, Vector d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#else

// vpmaddubsw, which oneDNN uses without VNNI, adds pairs of 8-bit products to 16 bits and clips them. vpmaddwd
// multiplies 16-bit operands and adds pairs of products to 32 bits: half as many per instruction, and none can clip.
using Integer = int16_t;
using Vector = __m256i;
constexpr long ROWS = 2;
constexpr long LANES = 16;  // elements of x or of weights in a vector

inline Vector zero() { return _mm256_setzero_si256(); }

// LANES elements of x, or of weights, which are widened.
inline Vector load(const int16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Vector load(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// The first `count` elements, and zeros.
template <class T>
Vector load(const T* from, long count) {
  T first[LANES] = {};
  for (long k = 0; k < count; k++) first[k] = from[k];
  return load(first);
}

inline void add_products(Vector& sum, Vector row, Vector weight) {
  const __m256i products = _mm256_madd_epi16(row, weight);
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
}

inline Vector plus(Vector a, Vector b) { return _mm256_add_epi32(a, b); }

// The sums of the elements of four vectors.
inline __m128i add_up(Vector a, Vector b, Vector c, Vector d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#endif

template <int M>
void clear(Vector (&sums)[M][COLUMNS]) {
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) sums[i][j] = zero();
}

template <int M>
void store_sums(const Vector (&sums)[M][COLUMNS], int32_t (&total)[ROWS][COLUMNS]) {
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(total[i]), add_up(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
}

template <int M, int N>
void tile(const Integer* x, const int8_t* weight, int32_t (&total)[ROWS][COLUMNS], long in) {
  Vector sums[M][COLUMNS];
  clear(sums);
  // count: absent for full vectors, or the number of elements that are left.
  const auto step = [&](long k, auto... count) __attribute__((always_inline)) {
    Vector w[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) w[j] = load(weight + j * in + k, count...);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      const Vector row = load(x + i * in + k, count...);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) add_products(sums[i][j], row, w[j]);
    }
  };
  long k = 0;
  for (; k + LANES <= in; k += LANES) step(k);
  if (k < in) step(k, in - k);
  store_sums(sums, total);
}

template <int M, int N>
void stream(const Integer* x, const int8_t* weight, int32_t (&total)[ROWS][COLUMNS], long in) {
  constexpr long STEP = 2 * LANES < LINE ? LINE : 2 * LANES;
  Vector sums[M][COLUMNS];
  clear(sums);
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) {
    // Two sums of each product, because an addition takes longer than the time to the next one.
    Vector second[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) second[i] = zero();
    const int8_t* row = weight + j * in;
    const auto step = [&](long k, Vector(&to)[M], auto... count) __attribute__((always_inline)) {
      const Vector w = load(row + k, count...);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) add_products(to[i], load(x + i * in + k, count...), w);
    };
    Vector first[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) first[i] = zero();
    long k = 0;
    for (; k + STEP <= in; k += STEP) {
#pragma GCC unroll 2
      for (long c = 0; c < STEP; c += LINE) _mm_prefetch(row + k + c + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
      for (long c = 0; c < STEP; c += 2 * LANES) {
        step(k + c, first);
        step(k + c + LANES, second);
      }
    }
    for (; k + LANES <= in; k += LANES) step(k, first);
    if (k < in) step(k, second, in - k);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) sums[i][j] = plus(first[i], second[i]);
  }
  store_sums(sums, total);
}

// The product for a number of rows and columns; `first`: of the rows of x that read these weights first.
using Tile = void (*)(const Integer*, const int8_t*, int32_t (&)[ROWS][COLUMNS], long);
template <int M>
constexpr Tile TILES[COLUMNS] = {tile<M, 1>, tile<M, 2>, tile<M, 3>, tile<M, 4>};
template <int M>
constexpr Tile STREAMS[COLUMNS] = {stream<M, 1>, stream<M, 2>, stream<M, 3>, stream<M, 4>};

inline Tile tile_of(bool first, long rows, long columns) {
  switch (rows) {
    case 1: return (first ? STREAMS<1> : TILES<1>)[columns - 1];
    case 2: return (first ? STREAMS<2> : TILES<2>)[columns - 1];
    case 3: return (first ? STREAMS<ROWS < 3 ? 1 : 3> : TILES<ROWS < 3 ? 1 : 3>)[columns - 1];
    default: return (first ? STREAMS<ROWS> : TILES<ROWS>)[columns - 1];
  }
}

#ifndef __AVX512VNNI__

constexpr long MANY = 16;      // rows of x for which it pays to widen weights first
constexpr long WIDE_ROWS = 3;  // of x; more than ROWS, because no weights wait in registers to be widened
constexpr long PART = 2048;    // inputs at once, whose widened weights stay in the first-level cache

// COLUMNS rows of weights from input k on, as 16 bits, LANES of each row after the other; zeros fill up the last LANES.
inline void widen(const int8_t* weight, int16_t* to, long in, long k, long end) {
  for (; k < end; k += LANES, to += COLUMNS * LANES) {
#pragma GCC unroll 4
    for (long j = 0; j < COLUMNS; j++) {
      const int8_t* from = weight + j * in + k;
      if (k % LINE == 0) _mm_prefetch(from + AHEAD, _MM_HINT_T0);
      const Vector w = k + LANES <= in ? load(from) : load(from, in - k);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + j * LANES), w);
    }
  }
}

// Adds the product of M rows of x and `widened`, both from the same input on, to total. in: from one row of x to the
// next; count: inputs, of which x has LANES more to read.
template <int M>
void wide(const Integer* x, const int16_t* widened, int32_t (*total)[COLUMNS], long in, long count) {
  Vector sums[M][COLUMNS];
  clear(sums);
  for (long k = 0; k < count; k += LANES, widened += COLUMNS * LANES) {
    Vector w[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) w[j] = load(widened + j * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      const Vector row = load(x + i * in + k);
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; j++) add_products(sums[i][j], row, w[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++) {
    __m128i* to = reinterpret_cast<__m128i*>(total[i]);
    const __m128i found = add_up(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), found));
  }
}

// As `products`, with weights that are widened once for all rows of x, and COLUMNS rows of weights. A function of its
// own, because its memory would slow down the calls for few rows.
template <class Each>
__attribute__((noinline)) void wide_products(const Integer* x, const int8_t* weight, long rows, long in,
                                             const Each& each) {
  alignas(64) int16_t widened[COLUMNS * PART];
  int32_t total[MOST][COLUMNS] = {};
  for (long k = 0; k < in; k += PART) {
    const long count = in - k < PART ? in - k : PART;
    widen(weight, widened, in, k, k + count);
    const auto some = [&](auto height, long i) __attribute__((always_inline)) {
      wide<height>(x + i * in + k, widened, total + i, in, count);
      // At once, because a store waits for memory while the next rows are multiplied.
      if (k + count == in)
        for (long r = i; r < i + height; r++) each(r, total[r]);
    };
    long i = 0;
    for (; i + WIDE_ROWS <= rows; i += WIDE_ROWS) some(std::integral_constant<long, WIDE_ROWS>{}, i);
    for (; i < rows; i++) some(std::integral_constant<long, 1>{}, i);
  }
}

#endif

// each(i, total): the sums of row i of x and `width` rows of weights. x is followed by at least LANES integers of any
// value. `rows` is at most MOST.
template <class Each>
__attribute__((always_inline)) inline void products(const Integer* x, const int8_t* weight, long rows, long width,
                                                    long in, const Each& each) {
#ifndef __AVX512VNNI__
  if (rows >= MANY && width == COLUMNS) return wide_products(x, weight, rows, in, each);
#endif
  for (long first = 0; first < rows; first += ROWS) {
    const long height = rows - first < ROWS ? rows - first : ROWS;
    int32_t total[ROWS][COLUMNS];
    tile_of(first == 0, height, width)(x + first * in, weight, total, in);
    for (long i = 0; i < height; i++) each(first + i, total[i]);
  }
}

// What makes reals of the sums of `width` rows of weights: (total - OFFSET * sum) * scale * weight_scale + bias.
struct Scaling {
  __m128i offset;
  __m128 step, plus;
  long width;

  // bias: null for none.
  template <class Real>
  Scaling(const float* weight_scale, const int32_t* weight_sum, const Real* bias, long width) : width(width) {
    int32_t offsets[COLUMNS] = {};
    float steps[COLUMNS] = {}, biases[COLUMNS] = {};
    for (long j = 0; j < width; j++) {
      offsets[j] = OFFSET * weight_sum[j];
      steps[j] = weight_scale[j];
      biases[j] = bias ? real(bias[j]) : 0.0f;
    }
    offset = _mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets));
    step = _mm_loadu_ps(steps);
    plus = _mm_loadu_ps(biases);
  }

  // scale: of the row of x.
  __m128 row(const int32_t* total, float scale) const {
    const __m128i sums = _mm_sub_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(total)), offset);
    return _mm_add_ps(_mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(scale)), step), plus);
  }

  void store(const int32_t* total, float scale, float* y) const {
    if (width == COLUMNS) return _mm_storeu_ps(y, row(total, scale));
    each(total, scale, y);
  }

  void store(const int32_t* total, float scale, BFloat16* y) const { each(total, scale, y); }

 private:
  template <class Real>
  void each(const int32_t* total, float scale, Real* y) const {
    float values[COLUMNS];
    _mm_storeu_ps(values, row(total, scale));
    for (long j = 0; j < width; j++) ::store(values[j], y + j);
  }
};
