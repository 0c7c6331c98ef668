// The block that kernel bodies run on, on the device.
#pragma once

#include <stdexcept>
#include <string>

#include "tile.h"

namespace hut {

// Blocks on a multiprocessor at once, at least: 168 registers a thread. Twelve warps with 64 bytes or
// more a thread on their way keep the memory busy; a higher occupancy would spill.
constexpr int kBlocks = 3;

struct DeviceBlock {
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // d += a b on the tensor core, m16n8k8, the operands rounded to tf32.
  __device__ __forceinline__ void mma(
      float (&d)[4], const float (&a)[4], const float (&b)[2]) const {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(tf32(a[0])), "r"(tf32(a[1])), "r"(tf32(a[2])), "r"(tf32(a[3])), "r"(tf32(b[0])),
          "r"(tf32(b[1])));
  }

 private:
  static __device__ __forceinline__ uint32_t tf32(float value) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
  }
};

// Launches a kernel of one argument on `stream`; what it refuses becomes an exception.
template <class Arguments>
void launch(
    void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, void* stream) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("hut_kernels: the matrix is too large");
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("hut_kernels: a launch failed: ") +
                             cudaGetErrorString(error));
}

}  // namespace hut
