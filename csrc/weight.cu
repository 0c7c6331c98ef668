// The weight kernel on the device.
#include "device.cuh"
#include "launch.h"

namespace hut {

template <class Instance>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hut_weight(const __grid_constant__ WeightArguments arguments) {
  __shared__ WeightShared shared;
  DeviceBlock block;
  weight_kernel<
      typename Instance::W, typename Instance::Out, Instance::TWO_SIDED, Instance::EXACT>(
      block, shared, arguments);
}

void launch_weight(
    const WeightArguments& arguments, Type weight, Type out, bool two_sided, bool exact,
    void* stream) {
  select_weight(weight, out, two_sided, exact, [&](auto instance) {
    launch(hut_weight<decltype(instance)>, arguments, weight_blocks(arguments), stream);
  });
}

}  // namespace hut
