// Compares int8_linear.cpp with plain loops on a bare machine with AVX512-VNNI; see ../check_vnni.sh.

#include <cstddef>
#include <cstdint>

// The parts of a C library and of threads that int8_linear.cpp needs.
static unsigned char heap[16 << 20] __attribute__((aligned(64)));
static size_t used;

extern "C" {
void* aligned_alloc(size_t, size_t bytes) {
  void* at = heap + used;
  used += (bytes + 63) / 64 * 64;
  return used <= sizeof heap ? at : nullptr;
}
void free(void*) {}
void* memcpy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
  return to;
}
void* memset(void* to, int value, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) static_cast<volatile char*>(to)[i] = static_cast<char>(value);
  return to;
}
int __cxa_atexit(void (*)(void*), void*, void*) { return 0; }
void* __dso_handle;
}

#define thread_local
#include "../../vllm_smoothquant/kernels/int8_linear.cpp"

namespace {

constexpr long TOKENS[] = {1, 2, 3, 4, 5, 7, 67}, IN[] = {1, 7, 63, 64, 65, 100, 192, 576}, OUT[] = {1, 2, 3, 4, 13};
constexpr long MOST_TOKENS = 67, MOST_IN = 576, MOST_OUT = 13;
constexpr float STATIC_SCALE = 0.011f;
constexpr double FLOAT_ROUNDING = 1.0 / (1 << 24), BFLOAT16_ROUNDING = 1.0 / (1 << 8);

// Bochs prints the bytes that are written to this port.
void put(char c) { asm volatile("outb %0, %1" ::"a"(c), "Nd"(uint16_t{0xE9})); }

void say(const char* text) {
  while (*text) put(*text++);
}

void say(long n) {
  if (n > 9) say(n / 10);
  put(static_cast<char>('0' + n % 10));
}

uint32_t state = 1;

// Marsaglia's xorshift; returns -limit to limit.
int random(int limit) {
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return int(state % (2 * limit + 1)) - limit;
}

double size_of(double x) { return x < 0 ? -x : x; }

template <class Real>
struct Data {
  Real x[MOST_TOKENS * MOST_IN], bias[MOST_OUT], y[MOST_TOKENS * MOST_OUT];
};
Data<float> wide;
Data<BFloat16> narrow;
int8_t weight[MOST_OUT * MOST_IN];
float weight_scale[MOST_OUT];
int32_t weight_sum[MOST_OUT];

template <class Real>
float absmax(const Real* x, long n) {
  float most = 0;
  for (long k = 0; k < n; k++) most = size_of(real(x[k])) > most ? float(size_of(real(x[k]))) : most;
  return most;
}

// The number of outputs whose error exceeds rounding. strategy: 0 for a scale per token, 1 for one scale, 2 for static.
template <class Real>
long wrong(Data<Real>& d, long tokens, long in, long out, int strategy, bool with_bias) {
  for (long k = 0; k < tokens * in; k++) store(random(10000) * 3e-4f, d.x + k);
  for (long k = 0; k < in; k++) store(-4.0f, d.x + k);
  for (long j = 0; j < out; j++) {
    store(random(1000) * 1e-3f, d.bias + j);
    weight_scale[j] = 6e-3f + random(500) * 1e-5f;
    weight_sum[j] = 0;
    for (long k = 0; k < in; k++) weight_sum[j] += weight[j * in + k] = j ? int8_t(random(128)) : -128;
  }
  for (long k = 0; k < tokens * out; k++) store(1e30f, d.y + k);
  used = 0;
  const bool done = smoothquant_int8_linear(
      sizeof(Real) == 2, d.x, weight, weight_scale, weight_sum, with_bias ? d.bias : nullptr,
      strategy == 2 ? &STATIC_SCALE : nullptr, strategy == 0, d.y, tokens, in, out);
  long count = done ? 0 : tokens * out;
  for (long m = 0; done && m < tokens; m++) {
    const float most = strategy == 0 ? absmax(d.x + m * in, in) : absmax(d.x, tokens * in);
    const float scale = strategy == 2 ? STATIC_SCALE : most / 127.0f;
    for (long j = 0; j < out; j++) {
      long sum = 0;
      for (long k = 0; k < in; k++) {
        const float step = __builtin_rintf(real(d.x[m * in + k]) / scale);
        sum += long(step < -128 ? -128 : step > 127 ? 127 : step) * weight[j * in + k];
      }
      const double product = double(sum) * scale * weight_scale[j], bias = with_bias ? real(d.bias[j]) : 0;
      const double rounding = 4 * FLOAT_ROUNDING * (size_of(product) + size_of(bias)) +
                              (sizeof(Real) == 2 ? BFLOAT16_ROUNDING * size_of(product + bias) : 0);
      count += !(size_of(real(d.y[m * out + j]) - (product + bias)) <= rounding);
    }
  }
  return count;
}

}  // namespace

extern "C" void main64() {
  uint32_t eax = 7, ebx, ecx = 0, edx;
  asm("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  say("VNNI: ");
  say(ecx >> 11 & 1);
  long products = 0, bad = 0;
  for (long tokens : TOKENS)
    for (long in : IN)
      for (long out : OUT)
        for (int strategy = 0; strategy < 3; strategy++) {
          bad += wrong(wide, tokens, in, out, strategy, products % 4);
          bad += wrong(narrow, tokens, in, out, strategy, !(products % 4));
          products += 2;
        }
  say("; products: ");
  say(products);
  say("; wrong outputs: ");
  say(bad);
  say(";\n");
}
