// New tensors and dtypes through torch's C interface, the same for every device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace seppo {

using torch::stable::Tensor;

struct Place {
  int32_t type, index;  // of a device, in aoti_torch's numbers
};

enum Dtype { kFloat, kHalf, kBFloat };

inline int dtype_code(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "seppo_fast: expected float32, float16 or bfloat16");
  return type == ScalarType::Float ? kFloat : type == ScalarType::Half ? kHalf : kBFloat;
}

// Whether `x` holds a sign for each of so many pairs, one after another.
inline bool fits_signs(const Tensor& x, int64_t pairs) {
  return x.dim() == 1 && x.size(0) == pairs && (pairs == 1 || x.stride(0) == 1) && dtype_code(x) == kFloat;
}

inline Tensor new_tensor(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, Place place) {
  AtenTensorHandle handle = nullptr;  // a C call: stable::empty would look up the operator by name
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, place.type, place.index, &handle));
  return Tensor(handle);
}

inline Tensor new_float(Place place) { return new_tensor(0, nullptr, nullptr, aoti_torch_dtype_float32(), place); }

inline Tensor new_floats(int64_t count, Place place) {
  const int64_t stride = 1;
  return new_tensor(1, &count, &stride, aoti_torch_dtype_float32(), place);
}

inline int32_t torch_dtype_of(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor new_like(const Tensor& x, Place place) {
  return new_tensor(x.dim(), x.sizes().data(), x.strides().data(), torch_dtype_of(x), place);
}

inline Tensor new_empty(const Tensor& x, Place place) {
  const int64_t none = 0, stride = 1;
  return new_tensor(1, &none, &stride, torch_dtype_of(x), place);
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace seppo
