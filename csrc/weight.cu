// The weight kernel on the device.
#include "device.cuh"
#include "launch.h"

namespace hut {

template <class Instance>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hut_weight(const __grid_constant__ WeightGroup group) {
  __shared__ WeightShared shared;
  DeviceBlock block;
  weight_kernel<
      typename Instance::W, typename Instance::Out, Instance::TWO_SIDED, Instance::EXACT>(
      block, shared, group);
}

void launch_weight(
    const std::vector<WeightArguments>& layers, Type weight, Type out, bool two_sided, bool exact,
    void* stream) {
  select_weight(weight, out, two_sided, exact, [&](auto instance) {
    for_each_group(layers, [&](const WeightGroup& group, int64_t blocks) {
      launch(hut_weight<decltype(instance)>, group, blocks, stream);
    });
  });
}

}  // namespace hut
