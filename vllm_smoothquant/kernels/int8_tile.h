// The innermost product of int8_linear.cpp, for the instructions it is compiled for (compiled.TARGETS).
//
//     total[i][j] = sum over k of x[i, k] * weight[j, k]        exact, as int32; 0 from j = N on
//
// FETCH: ask for the weights of the next tile meanwhile. Rows are too short for the processor to see where they lead, and
// where few rows of x share them, waiting for them is most of the time.
//
// x holds the integers of activations, plus OFFSET, as `Integer`; weights are int8 [out, in] as they were loaded. M rows
// of x by N of weights: their sums, what is loaded and the products must fit the registers, or compilers spill.
// Unrolled by order, not left to the optimiser: arrays that a loop indexes live in memory. Additions are spelled out:
// GCC 12 puts sums into other registers and moves them back, which costs a sixth of the speed.

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr long COLUMNS = 4;  // rows of weights in a whole tile
// What activations are kept plus, since vpdpbusd wants them without a sign. It adds OFFSET times the sum of each row of
// weights, and 255 * 128 * in must stay below 2**31 (compiled.MOST). The same without VNNI, which would not need it: so
// one code serves both, and a CPU without VNNI tests most of what one with it runs.
constexpr int32_t OFFSET = 128;

template <int N>
void fetch(const int8_t* weight, long in) {
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) _mm_prefetch(weight + (COLUMNS + j) * in, _MM_HINT_T0);
}

#ifdef __AVX512VNNI__

// vpdpbusd multiplies bytes without a sign by bytes with one, and adds four products to 32 bits.
using Integer = uint8_t;
using Vector = __m512i;
constexpr long ROWS = 4;
constexpr long LANES = 64;  // of x and of weights in a vector

inline Vector zero() { return _mm512_setzero_si512(); }

// LANES of x, or of weights.
inline Vector load(const void* at) { return _mm512_loadu_si512(at); }

// The first `count` of them; 0 from there on.
inline Vector load(const void* at, long count) { return _mm512_maskz_loadu_epi8((1ull << count) - 1, at); }

inline void add_products(Vector& sum, Vector row, Vector weight) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(weight));
}

// Four vectors to their four sums.
inline __m128i add_up(Vector a, Vector b, Vector c, Vector d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#else

// Eight-bit products added in pairs to 16 bits clip (what oneDNN does without VNNI). Here both operands are 16 bits wide,
// and vpmaddwd adds pairs of products to 32 bits: half as many to an instruction, and none can clip.
using Integer = int16_t;
using Vector = __m256i;
constexpr long ROWS = 2;
constexpr long LANES = 16;  // of x and of weights in a vector

inline Vector zero() { return _mm256_setzero_si256(); }

// LANES of x, or of weights, which are widened.
inline Vector load(const int16_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline Vector load(const int8_t* at) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// The first `count` of them; 0 from there on.
template <class T>
Vector load(const T* at, long count) {
  T first[LANES] = {};
  for (long k = 0; k < count; k++) first[k] = at[k];
  return load(first);
}

inline void add_products(Vector& sum, Vector row, Vector weight) {
  const __m256i products = _mm256_madd_epi16(row, weight);
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
}

// Four vectors to their four sums.
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
  // count: nothing for whole vectors, or how much of one is left.
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
