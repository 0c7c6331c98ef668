// Factor entries on their way from global memory: all loads are asked for before the first is used.
#pragma once

#include "multiplier.h"
#include "tile.h"

namespace hut {

// F[first + i, first_k + k] to `to[i * i_pitch + k * k_pitch]` for 64 i and k < DEPTH, zero outside
// the factor. Threads run along the factor's contiguous direction.
template <int DEPTH, class Block>
HUT_BLOCK void stage(
    const Block& block, float* to, int i_pitch, int k_pitch, const Side& side, int64_t first, int r,
    int first_k) {
  constexpr int kCount = kTile * DEPTH / kThreads;
  const bool along_k = side.factor.r_stride < side.factor.index_stride;
  // A thread's j-th entry is (i + j i_step, k + j k_step): one step leads from each to the next.
  const int i = along_k ? block.thread() / DEPTH : block.thread() % kTile;
  const int k = along_k ? block.thread() % DEPTH : block.thread() / kTile;
  const int i_step = along_k ? kThreads / DEPTH : 0, k_step = along_k ? 0 : kThreads / kTile;
  const int64_t i_left = side.size - first - i, k_left = r - first_k - k;
  const int64_t from = side.factor.offset(first + i, first_k + k);
  const int64_t step = side.factor.offset(i_step, k_step);
  to += i * i_pitch + k * k_pitch;
  visit(side.factor.type, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(side.factor.data) + from;
    T values[kCount];
    HUT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      values[j] = j * i_step < i_left && j * k_step < k_left ? *data : zero;
      data += step;
    }
    HUT_UNROLL
    for (int j = 0; j < kCount; ++j)
      to[j * (i_step * i_pitch + k_step * k_pitch)] = to_float(values[j]);
  });
}

// values[j] is the entry at offset at(j), zero where that is negative.
template <int COUNT, class At>
HUT_HD void gather(const Factor& factor, float (&values)[COUNT], At at) {
  visit(factor.type, [&](auto zero) {
    using T = decltype(zero);
    T loaded[COUNT];
    HUT_UNROLL
    for (int j = 0; j < COUNT; ++j) {
      const int64_t offset = at(j);
      loaded[j] = offset < 0 ? zero : static_cast<const T*>(factor.data)[offset];
    }
    HUT_UNROLL
    for (int j = 0; j < COUNT; ++j) values[j] = to_float(loaded[j]);
  });
}

}  // namespace hut
