// The innermost product of int8_linear.cpp, for the instruction set that it is compiled for (build.TARGETS).
//
//     total[i][j] = sum over k of x[i, k] * weight[j, k]        exact, as int32; 0 for j >= N
//
// M: rows of x, activations as `Integer` with OFFSET added. N: rows of weight, int8 [out, in] as loaded. M * N sums and
// their operands must fit into the registers, because the compiler otherwise spills them to memory.
// FETCH: prefetch the weights of the next tile. Rows are too short for the hardware prefetcher, and at small batch
// sizes memory latency dominates.
// Indices must be compile-time constants, or the compiler keeps the arrays in memory instead of registers; hence
// `#pragma GCC unroll`. The additions are assembly, because GCC 12 puts the sums of intrinsics into other registers and
// moves them back, which costs a sixth of the speed.

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr long COLUMNS = 4;  // rows of weights in a full tile
// Added to the integers of activations, because vpdpbusd needs them unsigned. It adds OFFSET times the sum of a row of
// weights to the product, and 255 * 128 * in must stay below 2**31 (build.MAX_IN_FEATURES). AVX2 does not need OFFSET
// but uses it too, so that both share int8_linear.cpp and a CPU without VNNI tests most of the code for VNNI.
constexpr int32_t OFFSET = 128;

template <int N>
void fetch(const int8_t* weight, long in) {
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) _mm_prefetch(weight + (COLUMNS + j) * in, _MM_HINT_T0);
}

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

// The sums of the elements of four vectors.
inline __m128i add_up(Vector a, Vector b, Vector c, Vector d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#endif

template <int M, int N, bool FETCH>
void tile(const Integer* x, const int8_t* weight, int32_t (&total)[ROWS][COLUMNS], long in) {
  Vector sums[M][COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) sums[i][j] = zero();
  // count: absent for full vectors, or the number of elements that are left.
  const auto step = [&](long k, auto... count) __attribute__((always_inline)) {
    Vector w[N];
    if (FETCH && k % 64 == 0) fetch<N>(weight + k, in);  // a cache line
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
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(total[i]), add_up(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
}

// The tile for a number of rows and columns.
using Tile = void (*)(const Integer*, const int8_t*, int32_t (&)[ROWS][COLUMNS], long);
template <int M, bool FETCH>
constexpr Tile OF_COLUMNS[COLUMNS] = {tile<M, 1, FETCH>, tile<M, 2, FETCH>, tile<M, 3, FETCH>, tile<M, 4, FETCH>};

template <bool FETCH>
Tile tile_of(long rows, long columns) {
  switch (rows) {
    case 1: return OF_COLUMNS<1, FETCH>[columns - 1];
    case 2: return OF_COLUMNS<2, FETCH>[columns - 1];
    case 3: return OF_COLUMNS<ROWS < 3 ? 1 : 3, FETCH>[columns - 1];
    default: return OF_COLUMNS<ROWS, FETCH>[columns - 1];
  }
}
