// The kernels' needs of the compiler, so that nvcc and a host compiler read the same source.
//
// A kernel's body is a template on its block: on the device that is `blockIdx`, `threadIdx` and the
// barrier (device.cuh); in the tests it is an emulation on the CPU (tests/csrc/emulation.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#ifdef __CUDACC__
#define HUT_HD __host__ __device__ __forceinline__  // arithmetic and indices
#define HUT_BLOCK __device__ __forceinline__        // what a whole block does together
#define HUT_PRAGMA(text) _Pragma(#text)
#define HUT_UNROLL HUT_PRAGMA(unroll)
#define HUT_UNROLL_BY(count) HUT_PRAGMA(unroll count)
#else
#define HUT_HD inline
#define HUT_BLOCK inline
#define HUT_UNROLL
#define HUT_UNROLL_BY(count)
#endif

namespace hut {

enum class Type : int32_t { kFloat32, kFloat16, kBFloat16 };

HUT_HD float to_float(float value) { return value; }
HUT_HD float to_float(__half value) { return __half2float(value); }
HUT_HD float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
HUT_HD T from_float(float value);
template <>
HUT_HD float from_float<float>(float value) {
  return value;
}
template <>
HUT_HD __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
HUT_HD __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Calls `visitor` with a zero of the type. It runs where its visitor runs, which nvcc cannot know.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Visitor>
HUT_HD void visit(Type type, Visitor visitor) {
  switch (type) {
    case Type::kFloat16:
      return visitor(__half{});
    case Type::kBFloat16:
      return visitor(__nv_bfloat16{});
    default:
      return visitor(float{});
  }
}

// One element of a type known at run time: factors and vectors, which are small beside the weight,
// cost a branch that all threads take alike, and no instantiation for every mix of types.
HUT_HD float load_as_float(const void* data, Type type, int64_t offset) {
  float value;
  visit(type, [&](auto zero) {
    value = to_float(static_cast<const decltype(zero)*>(data)[offset]);
  });
  return value;
}

HUT_HD void store_from_float(void* data, Type type, int64_t offset, float value) {
  visit(type, [&](auto zero) {
    using T = decltype(zero);
    static_cast<T*>(data)[offset] = from_float<T>(value);
  });
}

// A vector of parameters; `data` is null where there is none.
struct Vector {
  const void* data;
  int64_t stride;
  Type type;
};

HUT_HD float element(const Vector& vector, int64_t index, float absent) {
  if (vector.data == nullptr) return absent;
  return load_as_float(vector.data, vector.type, index * vector.stride);
}

// Eight neighbors in a row: one 16-byte access in a 16-bit type, two in float32.
constexpr int kPack = 8;

template <class T>
struct alignas(16) Pack {
  static constexpr int kWords = kPack * sizeof(T) / sizeof(uint4);
  uint4 words[kWords];

  HUT_HD void unpack(float (&values)[kPack]) const {
    T elements[kPack];
    memcpy(elements, words, sizeof(words));
    HUT_UNROLL
    for (int j = 0; j < kPack; ++j) values[j] = to_float(elements[j]);
  }

  HUT_HD void pack(const float (&values)[kPack]) {
    T elements[kPack];
    HUT_UNROLL
    for (int j = 0; j < kPack; ++j) elements[j] = from_float<T>(values[j]);
    memcpy(words, elements, sizeof(words));
  }
};

// A matrix of known type and any strides. `packed`: rows are contiguous and begin on 16 bytes, so
// that eight neighbors from a column divisible by eight can be moved at once.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  bool packed;
};

// A device faults where 16 bytes do not begin on 16 bytes. A CPU does not mind, so it is told to.
HUT_HD void check_packed([[maybe_unused]] const void* data) {
#ifndef __CUDA_ARCH__
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0)
    throw std::runtime_error("hut_kernels: a 16-byte access that does not begin on 16 bytes");
#endif
}

// Elements (row, column ... column + 7), zero outside the matrix.
template <class T>
HUT_HD Pack<T> load_pack(const Matrix<const T>& matrix, int64_t row, int64_t column) {
  Pack<T> pack;
  const T* from = matrix.data + row * matrix.row_stride + column * matrix.column_stride;
  if (matrix.packed && row < matrix.rows && column + kPack <= matrix.columns) {
    check_packed(from);
    HUT_UNROLL
    for (int j = 0; j < Pack<T>::kWords; ++j)
      pack.words[j] = reinterpret_cast<const uint4*>(from)[j];
    return pack;
  }
  T elements[kPack];
  HUT_UNROLL
  for (int j = 0; j < kPack; ++j) {
    const bool inside = row < matrix.rows && column + j < matrix.columns;
    elements[j] = inside ? from[j * matrix.column_stride] : from_float<T>(0.0f);
  }
  memcpy(pack.words, elements, sizeof(elements));
  return pack;
}

template <class T>
HUT_HD void store_pack(
    const Matrix<T>& matrix, int64_t row, int64_t column, const Pack<T>& pack) {
  if (row >= matrix.rows || column >= matrix.columns) return;
  T* to = matrix.data + row * matrix.row_stride + column * matrix.column_stride;
  if (matrix.packed && column + kPack <= matrix.columns) {
    check_packed(to);
    HUT_UNROLL
    for (int j = 0; j < Pack<T>::kWords; ++j) reinterpret_cast<uint4*>(to)[j] = pack.words[j];
    return;
  }
  T elements[kPack];
  memcpy(elements, pack.words, sizeof(elements));
  HUT_UNROLL
  for (int j = 0; j < kPack; ++j)
    if (column + j < matrix.columns) to[j * matrix.column_stride] = elements[j];
}

}  // namespace hut
