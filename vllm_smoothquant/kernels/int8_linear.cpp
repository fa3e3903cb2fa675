// y = (q_x @ q_w^T) * s_x * s_w + bias, exact in integers, on x86; int8.linear_reference says the same slowly.
//
// Activations are quantised once, to the integers that the tile (int8_tile.h) multiplies; weights stay as loaded.

#include "int8_tile.h"

#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

constexpr long CHUNK = 64;  // rows of activations that stay in the second-level cache while the weights go by

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

// A bfloat16 is the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

float real(float x) { return x; }

float real(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void store(float value, float* y) { *y = value; }

// To the nearest, and of two to the even one; NaN stays NaN.
void store(float value, BFloat16* y) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  y->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Bits of |x| order as |x| does, and NaN's are above infinity's: the largest of integers loses no NaN.
template <class Real>
uint32_t absmax_bits(const Real* x, long n) {
  uint32_t most = 0;
  for (long k = 0; k < n; k++) {
    const float value = real(x[k]);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
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

// int8.quantize. Returns the scale, or NaN where x has one: a static scale would hide it.
template <class Real>
float quantize(const Real* x, float scale, Integer* integers, long n) {
  int nans = 0;
  for (long k = 0; k < n; k++) {
    float step = real(x[k]) / scale;
    nans += step != step;
    step = step < -128.0f ? -128.0f : step;
    step = step > 127.0f ? 127.0f : step;
    integers[k] = static_cast<Integer>(static_cast<int32_t>(__builtin_rintf(step)) + OFFSET);
  }
  return nans ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// At least `bytes`, of this thread, kept for the next call: a fresh page costs more than what is computed in it.
void* room(size_t bytes) {
  struct Kept {
    void* at = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(at); }
  };
  static thread_local Kept kept;
  if (kept.bytes < bytes) {
    std::free(kept.at);
    kept.at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    kept.bytes = kept.at ? bytes : 0;
  }
  return kept.at;
}

template <class Real>
bool linear(const Real* x, const int8_t* weight, const float* weight_scale, const int32_t* weight_sum, const Real* bias,
            const float* input_scale, bool per_token, Real* y, long tokens, long in, long out) {
  const long blocks = (out + COLUMNS - 1) / COLUMNS;
  const size_t integers_bytes = (tokens * in * sizeof(Integer) + 63) / 64 * 64;
  char* bytes = static_cast<char*>(room(integers_bytes + tokens * (sizeof(uint32_t) + sizeof(float))));
  if (!bytes) return false;
  Integer* integers = reinterpret_cast<Integer*>(bytes);
  uint32_t* absmax = reinterpret_cast<uint32_t*>(bytes + integers_bytes);
  float* scale = reinterpret_cast<float*>(absmax + tokens);
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
        int32_t offset[COLUMNS] = {};
        float step[COLUMNS] = {}, plus[COLUMNS] = {};
        for (long j = 0; j < width; j++) {
          offset[j] = OFFSET * weight_sum[n + j];
          step[j] = weight_scale[n + j];
          plus[j] = bias ? real(bias[n + j]) : 0.0f;
        }
        for (long m = top; m < bottom; m += ROWS) {
          const long height = bottom - m < ROWS ? bottom - m : ROWS;
          int32_t total[ROWS][COLUMNS];
          const Tile tile = m == top ? tile_of<true>(height, width) : tile_of<false>(height, width);
          tile(integers + m * in, weight + n * in, total, in);
          for (long i = 0; i < height; i++) {
            float found[COLUMNS];  // whole, also where a tile is not: four at once is what compilers make of it
            for (long j = 0; j < COLUMNS; j++) found[j] = (total[i][j] - offset[j]) * scale[m + i] * step[j] + plus[j];
            for (long j = 0; j < width; j++) store(found[j], y + (m + i) * out + n + j);
          }
        }
      }
    }
  }
  return true;
}

}  // namespace

// x [tokens, in], weight [out, in], weight_scale [out], weight_sum [out]: the sum of each row of weight, bias [out] or
// null, input_scale [1] or null to measure it: one for each token, or one for all. y [tokens, out]. x, bias and y are
// float, or bfloat16 where `narrow`. False where there is no memory.
extern "C" bool smoothquant_int8_linear(
    bool narrow, const void* x, const int8_t* weight, const float* weight_scale, const int32_t* weight_sum,
    const void* bias, const float* input_scale, bool per_token, void* y, long tokens, long in, long out) {
  if (narrow)
    return linear(static_cast<const BFloat16*>(x), weight, weight_scale, weight_sum,
                  static_cast<const BFloat16*>(bias), input_scale, per_token, static_cast<BFloat16*>(y), tokens, in, out);
  return linear(static_cast<const float*>(x), weight, weight_scale, weight_sum, static_cast<const float*>(bias),
                input_scale, per_token, static_cast<float*>(y), tokens, in, out);
}
