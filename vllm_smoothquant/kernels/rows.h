// Rows of activations: their scales and integers, and memory for them.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

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

// Rounds to nearest even; NaN stays NaN.
void store(float value, BFloat16* y) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  y->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The bits of |x| have the order of |x|, and those of NaN are above infinity's, so the largest integer loses no NaN.
template <class Real>
uint32_t absmax_bits(const Real* x, long n) {
  uint32_t largest = 0;
  for (long k = 0; k < n; k++) {
    const float value = real(x[k]);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// As int8.absmax_scale.
float scale_of(uint32_t bits) {
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);
  const float scale = absmax / 127.0f;
  return scale < std::numeric_limits<float>::min() ? 1.0f : scale;
}

// As int8.quantize, plus `offset`. Returns the scale, or NaN if x has a NaN, because integers with a static scale would
// hide it.
template <int32_t offset, class Integer, class Real>
float quantize(const Real* x, float scale, Integer* integers, long n) {
  int nans = 0;
  for (long k = 0; k < n; k++) {
    float step = real(x[k]) / scale;
    nans += step != step;
    step = step < -128.0f ? -128.0f : step;
    step = step > 127.0f ? 127.0f : step;
    integers[k] = static_cast<Integer>(static_cast<int32_t>(__builtin_rintf(step)) + offset);
  }
  return nans ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// At least `bytes` of memory of this thread; null if there is none. The next call uses it again, because page faults of
// new memory take longer than the computation in it.
void* scratch(size_t bytes) {
  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    memory.bytes = memory.data ? bytes : 0;
  }
  return memory.data;
}

}  // namespace
