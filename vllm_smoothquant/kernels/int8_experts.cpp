// The routed experts of a block, exact in integers, on x86; experts.reference is the plain version of it.
//
//     h = act(x @ gate_e^T) * (x @ up_e^T)        y = sum over the chosen experts e of weight_e * (h @ down_e^T)
//
// x and h are quantised with a scale for each token. A pair is a token and one of its experts. Pairs are sorted by
// expert, so that the weights of an expert are read once for all of its tokens.

#include "int8_tile.h"
#include "rows.h"

#include <cmath>
#include <vector>

namespace {

constexpr long TOKENS = 512;  // at once, which bounds the memory for pairs

enum Activation : long { SILU = 0, GELU = 1, GELU_TANH = 2 };

float activated(float x, long kind) {
  switch (kind) {
    case SILU: return x / (1.0f + std::exp(-x));
    case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    default: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
}

// One matrix of every expert: weight (experts, out, in), scale and sum of each row (experts, out), bias or null.
struct Matrices {
  const int8_t* weight;
  const float* scale;
  const int32_t* sum;
  const float* bias;
  long out, in;
};

// Pairs `from` to `to` of one expert times `width` rows of its matrix from row n on:
// values[pair][j] = (integers[pair] . weight[n + j]) * scale[pair] * weight_scale[n + j] + bias[n + j].
template <class Receive>
void multiply(const Matrices& m, long expert, long n, long width, const Integer* integers, const float* scale, long from,
              long to, const Receive& receive) {
  const long first = expert * m.out + n;
  const Scaling scaling(m.scale + first, m.sum + first, m.bias ? m.bias + first : nullptr, width);
  for (long p = from; p < to; p += MOST) {
    const long rows = to - p < MOST ? to - p : MOST;
    products(integers + p * m.in, m.weight + first * m.in, rows, width, m.in, [&](long i, const int32_t* total) {
      float row[COLUMNS];
      _mm_storeu_ps(row, scaling.row(total, scale[p + i]));
      receive(p + i, row);
    });
  }
}

template <class Real>
bool experts(const Real* x, const Matrices& gate_up, const Matrices& down, const int32_t* chosen, const float* weights,
             long activation, Real* y, long tokens, long choices, long count) {
  const long in = gate_up.in, inner = down.in, out = down.out, pairs = tokens * choices;
  // Pairs by expert. chosen[pair] is negative for an expert of another rank.
  std::vector<long> first(count + 1, 0), pair_at(pairs), place(pairs, -1);
  for (long p = 0; p < pairs; p++)
    if (chosen[p] >= 0) first[chosen[p] + 1]++;
  for (long e = 0; e < count; e++) first[e + 1] += first[e];
  std::vector<long> next(first.begin(), first.end() - 1);
  for (long p = 0; p < pairs; p++)
    if (chosen[p] >= 0) pair_at[place[p] = next[chosen[p]]++] = p;
  const long used = first[count];
  std::vector<long> busy;
  for (long e = 0; e < count; e++)
    if (first[e + 1] > first[e]) busy.push_back(e);

  const auto rounded = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t x_bytes = rounded(used * in * sizeof(Integer)), h_bytes = rounded(used * inner * sizeof(Integer));
  const size_t hidden_bytes = rounded(used * inner * sizeof(float)), z_bytes = rounded(used * out * sizeof(float));
  char* bytes = static_cast<char*>(scratch(x_bytes + h_bytes + hidden_bytes + z_bytes + 2 * used * sizeof(float)));
  if (!bytes) return false;
  Integer* integers = reinterpret_cast<Integer*>(bytes);
  Integer* inner_integers = reinterpret_cast<Integer*>(bytes + x_bytes);
  float* hidden = reinterpret_cast<float*>(bytes + x_bytes + h_bytes);
  float* z = reinterpret_cast<float*>(bytes + x_bytes + h_bytes + hidden_bytes);
  float* scale = reinterpret_cast<float*>(bytes + x_bytes + h_bytes + hidden_bytes + z_bytes);
  float* inner_scale = scale + used;

  const long gate_blocks = (inner + COLUMNS - 1) / COLUMNS, out_blocks = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel
  {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      long done = -1;
      for (long c = 0; c < choices; c++) {
        const long p = place[t * choices + c];
        if (p < 0) continue;
        if (done < 0) {
          scale[p] = quantize<OFFSET>(x + t * in, scale_of(absmax_bits(x + t * in, in)), integers + p * in, in);
          done = p;
        } else {
          scale[p] = scale[done];
          std::memcpy(integers + p * in, integers + done * in, in * sizeof(Integer));
        }
      }
    }
#pragma omp for schedule(dynamic, 8)
    for (long item = 0; item < long(busy.size()) * gate_blocks; item++) {
      const long e = busy[item / gate_blocks], n = item % gate_blocks * COLUMNS;
      const long width = inner - n < COLUMNS ? inner - n : COLUMNS;
      multiply(gate_up, e, n, width, integers, scale, first[e], first[e + 1], [&](long p, const float* row) {
        for (long j = 0; j < width; j++) hidden[p * inner + n + j] = activated(row[j], activation);
      });
      multiply(gate_up, e, inner + n, width, integers, scale, first[e], first[e + 1], [&](long p, const float* row) {
        for (long j = 0; j < width; j++) hidden[p * inner + n + j] *= row[j];
      });
    }
#pragma omp for
    for (long p = 0; p < used; p++) {
      const float* row = hidden + p * inner;
      inner_scale[p] = quantize<OFFSET>(row, scale_of(absmax_bits(row, inner)), inner_integers + p * inner, inner);
    }
#pragma omp for schedule(dynamic, 8)
    for (long item = 0; item < long(busy.size()) * out_blocks; item++) {
      const long e = busy[item / out_blocks], n = item % out_blocks * COLUMNS;
      const long width = out - n < COLUMNS ? out - n : COLUMNS;
      multiply(down, e, n, width, inner_integers, inner_scale, first[e], first[e + 1], [&](long p, const float* row) {
        for (long j = 0; j < width; j++) z[p * out + n + j] = row[j];
      });
    }
#pragma omp for
    for (long t = 0; t < tokens; t++)
      for (long n = 0; n < out; n++) {
        float sum = 0.0f;
        for (long c = 0; c < choices; c++) {
          const long p = place[t * choices + c];
          if (p >= 0) sum += weights[t * choices + c] * z[p * out + n];
        }
        store(sum, y + t * out + n);
      }
  }
  return true;
}

template <class Real>
bool in_parts(const void* x, const Matrices& gate_up, const Matrices& down, const int32_t* chosen, const float* weights,
              long activation, void* y, long tokens, long choices, long count) {
  for (long t = 0; t < tokens; t += TOKENS) {
    const long some = tokens - t < TOKENS ? tokens - t : TOKENS;
    if (!experts(static_cast<const Real*>(x) + t * gate_up.in, gate_up, down, chosen + t * choices, weights + t * choices,
                 activation, static_cast<Real*>(y) + t * down.out, some, choices, count))
      return false;
  }
  return true;
}

}  // namespace

// narrow: x and y are bfloat16; otherwise they are float.
// x: activations of shape (tokens, in).
// gate_up: integers of shape (count, 2 * inner, in), the rows of `gate` first; its scales and sums (count, 2 * inner).
// down: integers of shape (count, in, inner); its scales and sums (count, in).
// gate_up_bias, down_bias: float, of the shapes of the scales, or null.
// chosen: experts of each token, of shape (tokens, choices); negative for those of another rank.
// weights: float, of the shape of `chosen`.
// y: the result, of shape (tokens, in).
// Returns false if there is no memory.
extern "C" bool smoothquant_int8_experts(
    bool narrow, const void* x, const int8_t* gate_up, const float* gate_up_scale, const int32_t* gate_up_sum,
    const float* gate_up_bias, const int8_t* down, const float* down_scale, const int32_t* down_sum,
    const float* down_bias, const int32_t* chosen, const float* weights, long activation, void* y, long tokens,
    long choices, long count, long in, long inner) {
  const Matrices first = {gate_up, gate_up_scale, gate_up_sum, gate_up_bias, 2 * inner, in};
  const Matrices second = {down, down_scale, down_sum, down_bias, in, inner};
  const auto run = narrow ? in_parts<BFloat16> : in_parts<float>;
  return run(x, first, second, chosen, weights, activation, y, tokens, choices, count);
}
