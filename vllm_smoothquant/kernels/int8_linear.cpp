// y = (q_x @ q_w^T) * s_x * s_w + bias, exact in integers, on x86; int8.linear_reference is the plain version of it.
//
// Activations are quantised once, to the integers that the tile (int8_tile.h) multiplies. Weights stay as loaded.

#include "int8_tile.h"
#include "rows.h"

namespace {

template <class Real>
bool linear(const Real* x, const int8_t* weight, const float* weight_scale, const int32_t* weight_sum, const Real* bias,
            const float* input_scale, bool per_token, Real* y, long tokens, long in, long out) {
  const long blocks = (out + COLUMNS - 1) / COLUMNS;
  const size_t integers_bytes = (tokens * in * sizeof(Integer) + 63) / 64 * 64;
  // What follows the integers may be read, too (int8_tile.h); for MANY tokens it is long enough.
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
    for (long top = 0; top < tokens; top += MOST) {
      const long rows = tokens - top < MOST ? tokens - top : MOST;
#pragma omp for nowait
      for (long block = 0; block < blocks; block++) {
        const long n = block * COLUMNS, width = out - n < COLUMNS ? out - n : COLUMNS;
        const Scaling scaling(weight_scale + n, weight_sum + n, bias ? bias + n : nullptr, width);
        products(integers + top * in, weight + n * in, rows, width, in, [&](long i, const int32_t* total) {
          scaling.store(total, scale[top + i], y + (top + i) * out + n);
        });
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
