// The runtime's part that only a CUDA build of torch can serve.
#include <torch/headeronly/util/Exception.h>

#include "runtime.h"

namespace hut {
namespace {

void* current_stream(int32_t device) {
  using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
  static const auto get = reinterpret_cast<CurrentStream>(
      find("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, "hut_kernels: this PyTorch is built without CUDA");
  void* stream = nullptr;
  check(get(device, &stream), "aoti_torch_get_current_cuda_stream");
  return stream;
}

}  // namespace

OnDevice::OnDevice(const torch::stable::Tensor& tensor)
    : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

void check_device(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), "hut_kernels: ", name, " must be on a CUDA device");
}

}  // namespace hut
