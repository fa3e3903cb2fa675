// y = (q_x @ q_w^T) * s_x * s_w + bias, exact in integers, on x86; int8.linear_reference is the plain version of it.
//
// Activations are quantised once, to the integers that the tile (int8_tile.h) multiplies. Weights stay as loaded.

#include "int8_tile.h"
#include "rows.h"

namespace {

constexpr long CHUNK = 64;  // rows of activations that stay in the second-level cache while all weights are read

template <class Real>
bool linear(const Real* x, const int8_t* weight, const float* weight_scale, const int32_t* weight_sum, const Real* bias,
            const float* input_scale, bool per_token, Real* y, long tokens, long in, long out) {
  const long blocks = (out + COLUMNS - 1) / COLUMNS;
  const size_t integers_bytes = (tokens * in * sizeof(Integer) + 63) / 64 * 64;
  char* bytes = static_cast<char*>(scratch(integers_bytes + tokens * (sizeof(uint32_t) + sizeof(float))));
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
      scale[m] = quantize<OFFSET>(x + m * in, step, integers + m * in, in);
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
          const Tile tile = tile_of(m == top, height, width);
          tile(integers + m * in, weight + n * in, total, in);
          for (long i = 0; i < height; i++) {
            // Always COLUMNS wide so that the compiler vectorises it; the tail is discarded below.
            float row[COLUMNS];
            for (long j = 0; j < COLUMNS; j++) row[j] = (total[i][j] - offset[j]) * scale[m + i] * step[j] + plus[j];
            for (long j = 0; j < width; j++) store(row[j], y + (m + i) * out + n + j);
          }
        }
      }
    }
  }
  return true;
}

}  // namespace

// narrow: x, bias and y are bfloat16; otherwise they are float.
// x: activations of shape (tokens, in).
// weight: integers of shape (out, in), row-major, as the checkpoint stores them.
// weight_scale: of shape (out); real = integer * scale.
// weight_sum: of shape (out), the sum of each row of weight, because x's integers have an OFFSET (int8_tile.h).
// bias: of shape (out), or null for none.
// input_scale: the static scale of x, one number, or null to measure it as absmax / 127.
// per_token: a measured scale is one per token; otherwise it is one for all tokens.
// y: the result, of shape (tokens, out).
// Returns false if there is no memory.
extern "C" bool smoothquant_int8_linear(
    bool narrow, const void* x, const int8_t* weight, const float* weight_scale, const int32_t* weight_sum,
    const void* bias, const float* input_scale, bool per_token, void* y, long tokens, long in, long out) {
  if (narrow)
    return linear(static_cast<const BFloat16*>(x), weight, weight_scale, weight_sum,
                  static_cast<const BFloat16*>(bias), input_scale, per_token, static_cast<BFloat16*>(y), tokens, in, out);
  return linear(static_cast<const float*>(x), weight, weight_scale, weight_sum, static_cast<const float*>(bias),
                input_scale, per_token, static_cast<float*>(y), tokens, in, out);
}
