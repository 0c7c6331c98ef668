// The device, its stream and its errors: all that the operators need beside torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace hut {

// While it lives, the tensor's device is current; `stream` is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor);

  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Refuses a tensor on which the kernels cannot run.
void check_device(const torch::stable::Tensor& tensor, const char* name);

// Throws if a call into libtorch failed, with libtorch's own message where it gives one (2.13).
void check(AOTITorchError code, const char* call);

// A function of a library of torch's that is loaded already; null where this build of torch is
// without it. Linked against, it would keep the extension from being imported there.
void* find(const char* library, const char* name);

}  // namespace hut
