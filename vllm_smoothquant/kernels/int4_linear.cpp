// y = x @ (scale * (q_w - 8))^T + bias with 4-bit weights that have a scale for each group of inputs, on x86.
//
// Activations are either quantised to int8, with a scale for each token (W4A8: int4.linear_reference is the plain
// version), or stay as they are and are multiplied in float32 (W4A16).
//
// `in` counts the inputs with padding: a whole number of chunks (int4_tile.h). Weights and scales of the padding are
// whatever they are, because x is zero there.

#include "int4_tile.h"
#include "rows.h"

#include <type_traits>

namespace {

constexpr long CHUNK = 64;  // rows of activations that stay in the second-level cache while all weights are read
#ifdef __AVX512VNNI__
constexpr int ROWS = 4, COLUMNS = 4;  // 32 registers
#else
constexpr int ROWS = 4, COLUMNS = 2;  // 16 registers
#endif
constexpr int BLOCK = 4;  // rows of weights for one thread at a time

struct Matrix {
  const uint8_t* weight;  // (out, in / 2) bytes
  const float* scale;     // (out, groups)
  long out, in, groups;
};

template <int M, int N, int GROUP, class Real>
void store_tile(const Matrix& m, const int8_t* integers, const Integers* start, const float* scale, const Real* bias,
                Real* y, long n, bool fetch) {
  float total[M][N];
  const auto tile = fetch ? int4_tile<M, N, GROUP, true> : int4_tile<M, N, GROUP, false>;
  tile(integers, start, m.weight + n * m.in / 2, m.scale + n * m.groups, total, m.in);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) store(total[i][j] * scale[i] + (bias ? real(bias[n + j]) : 0.0f), y + i * m.out + n + j);
}

// M rows of x times rows n to n + width of the weights.
template <int M, int GROUP, class Real>
void store_rows(const Matrix& m, const int8_t* integers, const Integers* start, const float* scale, const Real* bias,
                Real* y, long n, long width, bool fetch) {
  constexpr int N = M == 1 ? 1 : COLUMNS;
  for (; width >= N; n += N, width -= N) store_tile<M, N, GROUP>(m, integers, start, scale, bias, y, n, fetch);
  for (; width > 0; n++, width--) store_tile<M, 1, GROUP>(m, integers, start, scale, bias, y, n, false);
}

template <int GROUP, class Real>
bool integer_product(const Real* x, const Matrix& m, const Real* bias, Real* y, long tokens, long real_in) {
  const auto rounded = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const long parts = m.in / Part<GROUP>::INPUTS;
  const size_t integers_bytes = rounded(tokens * m.in), start_bytes = tokens * parts * sizeof(Integers);
  char* bytes = static_cast<char*>(scratch(integers_bytes + start_bytes + tokens * sizeof(float)));
  if (!bytes) return false;
  int8_t* integers = reinterpret_cast<int8_t*>(bytes);
  Integers* start = reinterpret_cast<Integers*>(bytes + integers_bytes);
  float* scale = reinterpret_cast<float*>(bytes + integers_bytes + start_bytes);
  const long block = BLOCK, blocks = (m.out + block - 1) / block;
#pragma omp parallel
  {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      int8_t* row = integers + t * m.in;
      const Real* values = x + t * real_in;
      scale[t] = quantize<0>(values, scale_of(absmax_bits(values, real_in)), row, real_in);
      std::memset(row + real_in, 0, m.in - real_in);
      for (long p = 0; p < parts; p++)
        Part<GROUP>::store_start(row + p * Part<GROUP>::INPUTS, start + t * parts + p);
    }
    for (long top = 0; top < tokens; top += CHUNK) {
      const long bottom = top + CHUNK < tokens ? top + CHUNK : tokens;
#pragma omp for nowait
      for (long b = 0; b < blocks; b++) {
        const long n = b * block, width = m.out - n < block ? m.out - n : block;
        long t = top;
        const auto rows = [&](auto count) {
          constexpr int M = decltype(count)::value;
          store_rows<M, GROUP>(m, integers + t * m.in, start + t * parts, scale + t, bias, y + t * m.out, n, width,
                                 t == top && b + 1 < blocks);
          t += M;
        };
        while (bottom - t >= ROWS) rows(std::integral_constant<int, ROWS>{});
        if (bottom - t >= 2) rows(std::integral_constant<int, 2>{});
        if (bottom - t >= 1) rows(std::integral_constant<int, 1>{});
      }
    }
  }
  return true;
}

template <class Real>
bool float_product(const Real* x, const Matrix& m, const Real* bias, Real* y, long tokens, long real_in) {
  float* reals = static_cast<float*>(scratch(tokens * (m.in + m.in / 4) * sizeof(float)));
  if (!reals) return false;
  float* start = reals + tokens * m.in;
  const long group = m.in / m.groups;
#pragma omp parallel
  {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      for (long k = 0; k < m.in; k++) reals[t * m.in + k] = k < real_in ? real(x[t * real_in + k]) : 0.0f;
      store_float_start(reals + t * m.in, start + t * m.in / 4, m.in);
    }
    for (long top = 0; top < tokens; top += CHUNK) {
      const long bottom = top + CHUNK < tokens ? top + CHUNK : tokens;
#pragma omp for nowait
      for (long n = 0; n < m.out; n++) {
        const uint8_t* weight = m.weight + n * m.in / 2;
        const float plus = bias ? real(bias[n]) : 0.0f;
        long t = top;
        const auto rows = [&](auto count) {
          constexpr int M = decltype(count)::value;
          float total[M];
          float_tile<M>(reals + t * m.in, start + t * m.in / 4, weight, m.scale + n * m.groups, total, m.in, group);
          for (int i = 0; i < M; i++) store(total[i] + plus, y + (t + i) * m.out + n);
          t += M;
        };
        while (bottom - t >= 4) rows(std::integral_constant<int, 4>{});
        while (bottom - t >= 1) rows(std::integral_constant<int, 1>{});
      }
    }
  }
  return true;
}

template <class Real>
bool linear(bool integers, const void* x, const Matrix& m, const void* bias, void* y, long tokens, long real_in) {
  const Real *from = static_cast<const Real*>(x), *plus = static_cast<const Real*>(bias);
  Real* to = static_cast<Real*>(y);
  if (!integers) return float_product(from, m, plus, to, tokens, real_in);
  switch (m.in / m.groups) {
    case 32: return integer_product<32>(from, m, plus, to, tokens, real_in);
    case 64: return integer_product<64>(from, m, plus, to, tokens, real_in);
    case 128: return integer_product<128>(from, m, plus, to, tokens, real_in);
    default: return false;
  }
}

}  // namespace

// narrow: x, bias and y are bfloat16; otherwise they are float.
// integers: x is quantised to int8; otherwise it is multiplied as it is.
// x: activations of shape (tokens, real_in).
// weight: of shape (out, in / 2), packed in chunks (int4_tile.h).
// weight_scale: of shape (out, groups), with in / groups = 32, 64 or 128 inputs in a group.
// bias: of shape (out), or null for none.
// y: the result, of shape (tokens, out).
// Returns false if there is no memory.
extern "C" bool smoothquant_int4_linear(bool narrow, bool integers, const void* x, const uint8_t* weight,
                                        const float* weight_scale, const void* bias, void* y, long tokens,
                                        long real_in, long in, long groups, long out) {
  const Matrix m = {weight, weight_scale, out, in, groups};
  return (narrow ? linear<BFloat16> : linear<float>)(integers, x, m, bias, y, tokens, real_in);
}
