// The second stage of the reduction: partial sums added in order, and the gradients made of them.
#pragma once

#include "reduction.h"
#include "tile.h"

namespace hut {

struct FinishArguments {
  Multiplier multiplier;
  const float* partials[2];
  int splits[2], sums[2];
  void* gradient[2];         // of each side's factor, null where it is not needed
  int64_t index_strides[2], r_strides[2];
  Type types[2];
  float* gamma_gradient;     // `sum_i W[o, i] G[o, i]`, [out_features], or null
  int output_side;           // the side of the outputs, whose partials it needs
};

HUT_HD int64_t finish_elements(const FinishArguments& a) {
  int64_t count = a.gamma_gradient == nullptr ? 0 : a.multiplier.side[a.output_side].size;
  for (int s = 0; s < 2; ++s)
    if (a.gradient[s] != nullptr) count += a.multiplier.side[s].size * a.multiplier.r;
  return count;
}

// The sums of one index, k by k, over all splits in their order: two runs agree to the bit.
HUT_HD float total(const FinishArguments& a, int s, int64_t k, int64_t index) {
  float sum = 0.0f;
  for (int split = 0; split < a.splits[s]; ++split)
    sum += a.partials[s][partial_at(
        split, k, index, a.multiplier.r + a.sums[s], a.multiplier.side[s].size)];
  return sum;
}

// One thread for each element of a gradient: the factors', then gamma's.
HUT_HD void finish_element(const FinishArguments& a, int64_t e) {
  const Multiplier& m = a.multiplier;
  for (int s = 0; s < 2; ++s) {
    if (a.gradient[s] == nullptr) continue;
    const Side& side = m.side[s];
    const int64_t count = side.size * m.r;
    if (e < count) {
      const int64_t k = e / side.size, index = e % side.size;
      const float gradient =
          factor_gradient(m, element(side.gamma, index, 1.0f), total(a, s, k, index));
      store_from_float(
          a.gradient[s], a.types[s], index * a.index_strides[s] + k * a.r_strides[s], gradient);
      return;
    }
    e -= count;
  }
  const int s = a.output_side;
  if (a.gamma_gradient == nullptr || e >= m.side[s].size) return;
  float FS = 0.0f;
  for (int k = 0; k < m.r; ++k) FS += element(m.side[s].factor, e, k) * total(a, s, k, e);
  a.gamma_gradient[e] = gamma_gradient(m, a.sums[s] ? total(a, s, m.r, e) : 0.0f, FS);
}

template <class Block>
HUT_BLOCK void finish_kernel(const Block& block, const FinishArguments& a) {
  finish_element(a, block.index() * kThreads + block.thread());
}

}  // namespace hut
