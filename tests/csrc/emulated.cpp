// The launchers and the runtime of csrc/, on the CPU: with ops.cpp this makes the operators
// hut_cuda::* for CPU tensors, every line of them that of the extension but for these.
#include "emulation.h"
#include "launch.h"
#include "runtime.h"

namespace hut {

void launch_weight(
    const WeightArguments& arguments, Type weight, Type out, bool two_sided, bool exact,
    void*) {
  select_weight(weight, out, two_sided, exact, [&](auto instance) {
    using I = decltype(instance);
    emulation::launch<WeightShared>(
        weight_blocks(arguments), [&](emulation::Block& block, WeightShared& shared) {
          weight_kernel<typename I::W, typename I::Out, I::TWO_SIDED, I::EXACT>(
              block, shared, arguments);
        });
  });
}

void launch_reduce(
    const ReduceArguments& arguments, Type weight, bool two_sided, bool exact, void*) {
  select_reduce(weight, arguments.multiplier.r, two_sided, exact, [&](auto instance) {
    using I = decltype(instance);
    emulation::launch<ReduceShared>(
        reduce_blocks(arguments, I::TWO_SIDED, I::WIDTH),
        [&](emulation::Block& block, ReduceShared& shared) {
          reduce_kernel<typename I::W, I::TWO_SIDED, I::EXACT, I::WIDTH>(
              block, shared, arguments);
        });
  });
}

void launch_finish(const FinishArguments& arguments, void*) {
  struct None {};
  emulation::launch<None>(
      (finish_elements(arguments) + kThreads - 1) / kThreads,
      [&](emulation::Block& block, None&) { finish_kernel(block, arguments); });
}

OnDevice::OnDevice(const torch::stable::Tensor&) {}

void check_device(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "hut_kernels: ", name, " must be on the CPU");
}

}  // namespace hut
