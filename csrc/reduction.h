// The reduction of H0 = G * W0 to the factor gradients (docs/definition.md, "Backward").
//
// Symmetric in the two sides, like the multiplier. For the side m, with n the other one,
//
//   low_rank:  S[m, k] = sum_n (H0(m, n) gamma_n) F_n[n, k]
//   two_sided: S[m, k] = sum over n in group k of (H0(m, n) gamma_n) F_n[n, group(m)]
//
// and the gradient of F_m is scaling * gamma_m * S: gamma is on one of the two sides, and 1 on the
// other. The part of d gamma that holds G is constant * sum_n H0 + scaling * sum_k F_m[m, k] S[m, k]
// for the side of the outputs, so it costs no other pass over G.
#pragma once

#include "multiplier.h"

namespace hut {

// The summand: H0(m, n) gamma_n.
HUT_HD float weighted(float G, float weight, float gamma) { return gamma * (G * weight); }

HUT_HD float factor_gradient(const Multiplier& m, float gamma, float S) {
  return m.scaling * gamma * S;
}

HUT_HD float gamma_gradient(const Multiplier& m, float row_sum, float FS) {
  return fmaf(m.scaling, FS, m.constant * row_sum);
}

// Partial sums are stored [split, k, index], each split of n summed by one block. Where the sum of
// H0 over n is needed, it is one more row, k = r.
HUT_HD int64_t partial_at(int64_t split, int64_t k, int64_t index, int rows, int64_t size) {
  return (split * rows + k) * size + index;
}

}  // namespace hut
