// The reduction of G, in two stages, on the device.
#include "device.cuh"
#include "launch.h"

namespace hut {

template <class Instance>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hut_reduce(const __grid_constant__ ReduceArguments arguments) {
  __shared__ ReduceShared shared;
  DeviceBlock block;
  reduce_kernel<typename Instance::W, Instance::TWO_SIDED, Instance::EXACT, Instance::WIDTH>(
      block, shared, arguments);
}

__global__ void __launch_bounds__(kThreads)
    hut_finish(const __grid_constant__ FinishArguments arguments) {
  finish_kernel(DeviceBlock(), arguments);
}

void launch_reduce(
    const ReduceArguments& arguments, Type weight, bool two_sided, bool exact, void* stream) {
  select_reduce(weight, arguments.multiplier.r, two_sided, exact, [&](auto instance) {
    using Instance = decltype(instance);
    const int64_t blocks = reduce_blocks(arguments, Instance::TWO_SIDED, Instance::WIDTH);
    launch(hut_reduce<Instance>, arguments, blocks, stream);
  });
}

void launch_finish(const FinishArguments& arguments, void* stream) {
  launch(hut_finish, arguments, (finish_elements(arguments) + kThreads - 1) / kThreads, stream);
}

}  // namespace hut
