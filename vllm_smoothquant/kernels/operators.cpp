// The operators of ops.py for torch's dispatcher, so that a call runs no Python. It uses torch's stable ABI, whose
// headers are small: including torch/extension.h would take a minute to compile.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

extern "C" {
bool smoothquant_int8_linear(bool narrow, const void* x, const int8_t* weight, const float* weight_scale,
                             const int32_t* weight_sum, const void* bias, const float* input_scale, bool per_token,
                             void* y, long tokens, long in, long out);
bool smoothquant_int4_linear(bool narrow, bool integers, const void* x, const uint8_t* weight,
                             const float* weight_scale, const void* bias, void* y, long tokens, long real_in, long in,
                             long groups, long out);
bool smoothquant_int8_experts(bool narrow, const void* x, const int8_t* gate_up, const float* gate_up_scale,
                              const int32_t* gate_up_sum, const float* gate_up_bias, const int8_t* down,
                              const float* down_scale, const int32_t* down_sum, const float* down_bias,
                              const int32_t* chosen, const float* weights, long activation, void* y, long tokens,
                              long choices, long count, long in, long inner);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Our products read and write float32 and bfloat16; float16 goes through float32.
bool is_native(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
}

Tensor converted(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

Tensor in_order(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Call product(narrow, x, bias, y) with tensors that it can read and write; the result has the dtype of `x`.
template <class Product>
Tensor multiplied(const Tensor& x, const Optional& bias, int64_t out, const Product& product) {
  const bool same = is_native(x) && (!bias || bias->scalar_type() == x.scalar_type());
  const ScalarType dtype = same ? x.scalar_type() : ScalarType::Float;
  const Tensor from = in_order(converted(x, dtype));
  const Optional plus = bias ? Optional(in_order(converted(*bias, dtype))) : std::nullopt;
  Tensor y = torch::stable::new_empty(from, {from.size(0), out});
  if (from.size(0))
    STD_TORCH_CHECK(product(dtype == ScalarType::BFloat16, from.data_ptr(), plus ? plus->data_ptr() : nullptr,
                            y.mutable_data_ptr()),
                    "no memory for the integers of ", from.size(0), " tokens of ", from.size(1));
  return converted(y, x.scalar_type());
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
const T* data(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

Tensor int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Optional input_scale, Optional bias,
                   bool per_token) {
  const int64_t out = weight.size(0);
  return multiplied(x, bias, out, [&](bool narrow, const void* from, const void* plus, void* y) {
    return smoothquant_int8_linear(narrow, from, data<int8_t>(weight), data<float>(weight_scale),
                                   data<int32_t>(weight_sum), plus, data<float>(input_scale), per_token, y, x.size(0),
                                   x.size(1), out);
  });
}

Tensor int4_linear(Tensor x, Tensor weight, Tensor weight_scale, Optional bias, bool integers) {
  const int64_t out = weight.size(0);
  return multiplied(x, bias, out, [&](bool narrow, const void* from, const void* plus, void* y) {
    return smoothquant_int4_linear(narrow, integers, from, data<uint8_t>(weight), data<float>(weight_scale), plus, y,
                                   x.size(0), x.size(1), 2 * weight.size(1), weight_scale.size(1), out);
  });
}

Tensor int8_experts(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor gate_up_sum, Optional gate_up_bias,
                    Tensor down, Tensor down_scale, Tensor down_sum, Optional down_bias, Tensor chosen, Tensor weights,
                    int64_t activation) {
  const Tensor experts = in_order(chosen), shares = in_order(weights);
  return multiplied(x, std::nullopt, x.size(1), [&](bool narrow, const void* from, const void*, void* y) {
    return smoothquant_int8_experts(
        narrow, from, data<int8_t>(gate_up), data<float>(gate_up_scale), data<int32_t>(gate_up_sum),
        data<float>(gate_up_bias), data<int8_t>(down), data<float>(down_scale), data<int32_t>(down_sum),
        data<float>(down_bias), data<int32_t>(experts), data<float>(shares), activation, y, x.size(0), experts.size(1),
        gate_up.size(0), x.size(1), down.size(2));
  });
}

torch::stable::detail::StableLibrary* registered = nullptr;

}  // namespace

// Make this library the implementation of the operators on CPUs, and no longer. ops.py has defined them.
extern "C" void smoothquant_register() {
  using torch::stable::detail::StableLibrary;
  registered = new StableLibrary(StableLibrary::Kind::IMPL, "smoothquant", "CPU", __FILE__, __LINE__);
  registered->impl("int8_linear", TORCH_BOX(&int8_linear));
  registered->impl("int4_linear", TORCH_BOX(&int4_linear));
  registered->impl("int8_experts", TORCH_BOX(&int8_experts));
}

extern "C" void smoothquant_unregister() {
  delete registered;
  registered = nullptr;
}
