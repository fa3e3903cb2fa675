// y = (q_x @ q_w^T) * s_x * s_w + bias, exact in integers, for x86 with AVX2; int8.linear_reference says the same slowly.
//
// Eight-bit products added in pairs to 16 bits clip (what oneDNN does without VNNI). Here both operands are widened to
// 16 bits, and vpmaddwd adds pairs of products to 32 bits: half as many to an instruction, and none can clip. int32
// holds 2**31 / 128**2 = 131,072 of them.
//
// Activations are widened once, as they are quantised; weights stay int8 [out, in] and are widened in registers, once
// for each ROWS rows of activations. A tile's accumulators, weights and products must all fit 16 registers: with 4 x 3
// compilers spill, and lose a third of the speed of 2 x 4.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr long LANES = 16;   // products of one vpmaddwd
constexpr long ROWS = 2;     // of activations in a tile
constexpr long COLUMNS = 4;  // of outputs in a tile
constexpr long CHUNK = 64;   // rows of activations that stay in the second-level cache while the weights go by

int32_t sum(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// total[i][j] = sum over k of x[i, k] * weight[j, k]
//
// Unrolled by order, not left to the optimiser: arrays that a loop indexes live in memory. The addition is spelled out
// because GCC puts the sum into the product's register and moves it back, which costs a sixth of the speed.
template <int M, int N>
void tile(const int16_t* x, const int8_t* weight, int32_t (&total)[ROWS][COLUMNS], long in) {
  __m256i pairs[M][N];
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) pairs[i][j] = _mm256_setzero_si256();
  long k = 0;
  for (; k + LANES <= in; k += LANES) {
    __m256i w[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++)
      w[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + j * in + k)));
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * in + k));
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        const __m256i products = _mm256_madd_epi16(row, w[j]);
        __asm__("vpaddd %1, %0, %0" : "+x"(pairs[i][j]) : "x"(products));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      total[i][j] = sum(pairs[i][j]);
      for (long rest = k; rest < in; rest++) total[i][j] += int32_t(x[i * in + rest]) * weight[j * in + rest];
    }
}

using Tile = void (*)(const int16_t*, const int8_t*, int32_t (&)[ROWS][COLUMNS], long);
constexpr Tile TILES[ROWS][COLUMNS] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>},
    {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
};

// Bits of |x| order as |x| does, and NaN's are above infinity's: the largest of integers loses no NaN.
uint32_t absmax_bits(const float* x, long n) {
  uint32_t most = 0;
  for (long k = 0; k < n; k++) {
    uint32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

// int8.absmax_scale
float scale_of(uint32_t bits) {
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);
  const float scale = absmax / 127.0f;
  return scale < std::numeric_limits<float>::min() ? 1.0f : scale;
}

// int8.quantize, to 16 bits. Returns the scale, or NaN where x has one: a static scale would hide it.
float quantize(const float* x, float scale, int16_t* integers, long n) {
  int nans = 0;
  for (long k = 0; k < n; k++) {
    float real = x[k] / scale;
    nans += real != real;
    real = real < -128.0f ? -128.0f : real;
    real = real > 127.0f ? 127.0f : real;
    integers[k] = static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(real)));
  }
  return nans ? std::numeric_limits<float>::quiet_NaN() : scale;
}

}  // namespace

// x [tokens, in], weight [out, in], weight_scale [out], bias [out] or null, input_scale [1] or null to measure it:
// one for each token, or one for all. integers [tokens, in], absmax and scale [tokens]: room. y [tokens, out].
extern "C" void smoothquant_int8_linear(
    const float* x, const int8_t* weight, const float* weight_scale, const float* bias, const float* input_scale,
    int32_t per_token, int16_t* integers, uint32_t* absmax, float* scale, float* y, long tokens, long in, long out) {
  const long blocks = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel
  {
    if (!input_scale) {
#pragma omp for
      for (long m = 0; m < tokens; m++) absmax[m] = absmax_bits(x + m * in, in);
      if (!per_token) {
#pragma omp single
        for (long m = 1; m < tokens; m++) absmax[0] = absmax[m] > absmax[0] ? absmax[m] : absmax[0];
      }
    }
#pragma omp for
    for (long m = 0; m < tokens; m++) {
      const float step = input_scale ? *input_scale : scale_of(absmax[per_token ? m : 0]);
      scale[m] = quantize(x + m * in, step, integers + m * in, in);
    }
    for (long top = 0; top < tokens; top += CHUNK) {
      const long bottom = top + CHUNK < tokens ? top + CHUNK : tokens;
#pragma omp for nowait
      for (long block = 0; block < blocks; block++) {
        const long n = block * COLUMNS, width = out - n < COLUMNS ? out - n : COLUMNS;
        for (long m = top; m < bottom; m += ROWS) {
          const long height = bottom - m < ROWS ? bottom - m : ROWS;
          int32_t total[ROWS][COLUMNS];
          TILES[height - 1][width - 1](integers + m * in, weight + n * in, total, in);
          for (long i = 0; i < height; i++)
            for (long j = 0; j < width; j++)
              y[(m + i) * out + n + j] =
                  total[i][j] * scale[m + i] * weight_scale[n + j] + (bias ? bias[n + j] : 0.0f);
        }
      }
    }
  }
}
