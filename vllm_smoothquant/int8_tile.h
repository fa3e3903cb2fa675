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
constexpr long ROWS = 4;

// Four vectors to their four sums.
inline __m128i add_up(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int M, int N, bool FETCH>
void tile(const Integer* x, const int8_t* weight, int32_t (&total)[ROWS][COLUMNS], long in) {
  constexpr long LANES = 64;
  __m512i sums[M][COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) sums[i][j] = _mm512_setzero_si512();
  const auto step = [&](auto load, long k) __attribute__((always_inline)) {
    __m512i w[N];
    if (FETCH) fetch<N>(weight + k, in);
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) w[j] = load(weight + j * in + k);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      const __m512i row = load(x + i * in + k);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[i][j]) : "v"(row), "v"(w[j]));
    }
  };
  long k = 0;
  for (; k + LANES <= in; k += LANES) step([](const void* at) { return _mm512_loadu_si512(at); }, k);
  if (k < in) {  // what is past the end counts as zero
    const __mmask64 mask = (1ull << (in - k)) - 1;
    step([mask](const void* at) { return _mm512_maskz_loadu_epi8(mask, at); }, k);
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(total[i]), add_up(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
}

#else

// Eight-bit products added in pairs to 16 bits clip (what oneDNN does without VNNI). Here both operands are 16 bits wide,
// and vpmaddwd adds pairs of products to 32 bits: half as many to an instruction, and none can clip.
using Integer = int16_t;
constexpr long ROWS = 2;

inline __m128i add_up(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

template <int M, int N, bool FETCH>
void tile(const Integer* x, const int8_t* weight, int32_t (&total)[ROWS][COLUMNS], long in) {
  constexpr long LANES = 16;
  __m256i sums[M][COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) sums[i][j] = _mm256_setzero_si256();
  long k = 0;
  for (; k + LANES <= in; k += LANES) {
    __m256i w[N];
    if (FETCH && k % 64 == 0) fetch<N>(weight + k, in);
#pragma GCC unroll 4
    for (int j = 0; j < N; j++)
      w[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + j * in + k)));
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * in + k));
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        const __m256i products = _mm256_madd_epi16(row, w[j]);
        __asm__("vpaddd %1, %0, %0" : "+x"(sums[i][j]) : "x"(products));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(total[i]), add_up(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    for (int j = 0; j < N; j++)
      for (long rest = k; rest < in; rest++) total[i][j] += int32_t(x[i * in + rest]) * weight[j * in + rest];
  }
}

#endif
