// The innermost products of int4_linear.cpp, for the instruction set that they are compiled for (build.TARGETS).
//
//     total[i][j] = sum over groups g of scale[j, g] * (sum over k in g of x[i, k] * (weight[j, k] - ZERO))
//
// x: int8. weight: 4 bits, unsigned. The sum inside a group is exact, as int32; groups are added in float32.
//
// A chunk of 64 weights is 32 bytes: byte b has weight b in its low half and weight 32 + b in its high half. Two
// operations therefore unpack it to bytes. Products of 4 bits and 8 bits are so small that vpmaddubsw cannot clip, as it
// does with 8 bits, and that the pairs of a group can be added in 16 bits.
//
// -ZERO times the sum of x is not computed for each weight: the integers of a group begin with it (`start`).

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr long AHEAD = 8192;  // bytes, as in int8_tile.h
constexpr long CHUNK_INPUTS = 64, CHUNK_BYTES = 32;
constexpr int ZERO = 8;  // the unsigned integer of a weight of 0

// The 64 weights of a chunk, as two vectors of bytes.
inline void unpack(const uint8_t* chunk, __m256i& low, __m256i& high) {
  const __m256i mask = _mm256_set1_epi8(15), both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk));
  low = _mm256_and_si256(both, mask);
  high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}

inline float add_up(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// What the two instruction sets have in common, for groups of GROUP inputs. Part: what is multiplied before float32 is
// needed, whole groups or half of a vector for each of two groups. Weights: those of a part, unpacked.
#ifdef __AVX512VNNI__

using Sums = __m512;
using Integers = __m512i;

template <int GROUP>
struct Part {
  static constexpr int INPUTS = GROUP == 128 ? 128 : 64, CHUNKS = INPUTS / 64, GROUPS = INPUTS / GROUP;
  __m512i weights[CHUNKS];
  __m512 step;  // of each lane

  void load(const uint8_t* packed, const float* scale) {
#pragma GCC unroll 2
    for (int c = 0; c < CHUNKS; c++) {
      __m256i low, high;
      unpack(packed + c * CHUNK_BYTES, low, high);
      weights[c] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    step = _mm512_set1_ps(scale[0]);
    if (GROUPS == 2) step = _mm512_mask_blend_ps(0xff00, step, _mm512_set1_ps(scale[1]));
  }
  Integers dot(Integers start, const int8_t* x) const {
#pragma GCC unroll 2
    for (int c = 0; c < CHUNKS; c++) start = _mm512_dpbusd_epi32(start, weights[c], _mm512_loadu_si512(x + 64 * c));
    return start;
  }
  void add(Sums& sum, const Integers* start, const int8_t* x) const {
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot(_mm512_loadu_si512(start), x)), step, sum);
  }
  // -ZERO times the sums of x.
  static void store_start(const int8_t* x, Integers* start) {
    Part eights;
    for (__m512i& each : eights.weights) each = _mm512_set1_epi8(ZERO);
    const __m512i zero = _mm512_setzero_si512();
    _mm512_storeu_si512(start, _mm512_sub_epi32(zero, eights.dot(zero, x)));
  }
};

inline Sums no_sums() { return _mm512_setzero_ps(); }
inline float add_up(__m512 x) {
  return add_up(_mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1))));
}

#else

using Sums = __m256;
struct Integers {
  __m256i groups[2];
};

template <int GROUP>
struct Part {
  static constexpr int INPUTS = GROUP == 128 ? 128 : 64, GROUPS = INPUTS / GROUP, VECTORS = GROUP / 32;
  __m256i weights[INPUTS / 32];
  __m256 step[GROUPS];

  void load(const uint8_t* packed, const float* scale) {
#pragma GCC unroll 2
    for (int c = 0; c < INPUTS / 64; c++) unpack(packed + c * CHUNK_BYTES, weights[2 * c], weights[2 * c + 1]);
#pragma GCC unroll 2
    for (int g = 0; g < GROUPS; g++) step[g] = _mm256_broadcast_ss(scale + g);
  }
  __m256i dot(__m256i start, int g, const int8_t* x) const {
    const auto product = [&](int v) {
      const __m256i inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + g * VECTORS + v);
      return _mm256_maddubs_epi16(weights[g * VECTORS + v], inputs);
    };
    __m256i pairs = product(0);
#pragma GCC unroll 4
    for (int v = 1; v < VECTORS; v++) pairs = _mm256_add_epi16(pairs, product(v));
    return _mm256_add_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  void add(Sums& sum, const Integers* start, const int8_t* x) const {
#pragma GCC unroll 2
    for (int g = 0; g < GROUPS; g++)
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot(_mm256_loadu_si256(start->groups + g), g, x)), step[g], sum);
  }
  // -ZERO times the sums of x.
  static void store_start(const int8_t* x, Integers* start) {
    Part eights;
    for (__m256i& each : eights.weights) each = _mm256_set1_epi8(ZERO);
    const __m256i zero = _mm256_setzero_si256();
    for (int g = 0; g < GROUPS; g++)
      _mm256_storeu_si256(start->groups + g, _mm256_sub_epi32(zero, eights.dot(zero, g, x)));
  }
};

inline Sums no_sums() { return _mm256_setzero_ps(); }

#endif

// M rows of x times N rows of weights. Distances from row to row: `in` integers of x, in / INPUTS starts, in / 2 bytes
// of weights, in / GROUP scales. FETCH: prefetch weights that are AHEAD.
template <int M, int N, int GROUP, bool FETCH>
void int4_tile(const int8_t* x, const Integers* start, const uint8_t* weight, const float* scale, float (&total)[M][N],
               long in) {
  constexpr long INPUTS = Part<GROUP>::INPUTS;
  Sums sums[M][N];
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[i][j] = no_sums();
  for (long k = 0, part = 0; k < in; k += INPUTS, part++) {
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      const uint8_t* packed = weight + (j * in + k) / 2;
      if (FETCH) _mm_prefetch(packed + AHEAD, _MM_HINT_T0);
      Part<GROUP> w;
      w.load(packed, scale + j * (in / GROUP) + part * Part<GROUP>::GROUPS);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) w.add(sums[i][j], start + i * (in / INPUTS) + part, x + i * in + k);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) total[i][j] = add_up(sums[i][j]);
}

// The same for x in float32. start: -ZERO times the sums of 32 inputs, 8 lanes for every 32 inputs.
template <int M>
void float_tile(const float* x, const float* start, const uint8_t* weight, const float* scale, float (&total)[M],
                long in, long group) {
  __m256 sums[M];
#pragma GCC unroll 4
  for (int i = 0; i < M; i++) sums[i] = _mm256_setzero_ps();
  for (long k = 0; k < in; k += CHUNK_INPUTS) {
    __m256i halves[2];
    unpack(weight + k / 2, halves[0], halves[1]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const long first = k + 32 * h;
      const __m128i low = _mm256_castsi256_si128(halves[h]), high = _mm256_extracti128_si256(halves[h], 1);
      const __m128i bytes[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
      __m256 w[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) w[q] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes[q]));
      const __m256 step = _mm256_broadcast_ss(scale + first / group);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) {
        const float* row = x + i * in + first;
        __m256 sum = _mm256_loadu_ps(start + (i * in + first) / 4);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) sum = _mm256_fmadd_ps(_mm256_loadu_ps(row + 8 * q), w[q], sum);
        sums[i] = _mm256_fmadd_ps(sum, step, sums[i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++) total[i] = add_up(sums[i]);
}

inline void store_float_start(const float* x, float* start, long in) {
  for (long k = 0; k < in; k += 32)
    for (int l = 0; l < 8; l++) start[k / 4 + l] = -ZERO * (x[k + l] + x[k + 8 + l] + x[k + 16 + l] + x[k + 24 + l]);
}
