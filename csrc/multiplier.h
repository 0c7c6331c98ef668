// The multiplier T and W = W0 * T (docs/definition.md, "The two transforms" and "Forward").
//
// Everything here is symmetric in its two sides, a matrix's rows and its columns, each with a factor
// of its own: T[m, n] = constant + scaling * sum_k F0[m, k] F1[n, k] (low_rank), or
// F0[m, group(n)] * F1[n, group(m)] (two_sided). With rows o and columns i, F0 is hut_B and F1 is
// hut_A transposed; a weight that is stored [in, out] has them the other way round.
#pragma once

#include "portable.h"

namespace hut {

struct Factor {
  const void* data;
  int64_t index_stride, r_stride;  // of F[index, k]
  Type type;

  HUT_HD int64_t offset(int64_t index, int64_t k) const {
    return index * index_stride + k * r_stride;
  }
};

HUT_HD float element(const Factor& factor, int64_t index, int64_t k) {
  return load_as_float(factor.data, factor.type, factor.offset(index, k));
}

// One of a matrix's two sides. gamma belongs to the side of the outputs, and is absent on the other.
struct Side {
  int64_t size;
  Factor factor;
  Vector gamma;
};

struct Multiplier {
  Side side[2];  // rows, columns
  int r;
  float constant, scaling;
};

// The group functions q(i) and p(o): floor(index * r / size). The division is in 32 bits wherever
// that is exact, which is an eighth of the instructions.
HUT_HD int64_t group_of(int64_t index, int r, int64_t size) {
  const int64_t product = index * r;
  if (product <= 0xffffffff && size <= 0xffffffff)
    return static_cast<uint32_t>(product) / static_cast<uint32_t>(size);
  return product / size;
}

// group_of along consecutive indices, one division for all of them; needs r <= size.
class GroupWalk {
 public:
  HUT_HD GroupWalk(int64_t index, int r, int64_t size)
      : r_(r), size_(size), group_(group_of(index, r, size)), rest_(index * r - group_ * size) {}

  HUT_HD int64_t group() const { return group_; }

  HUT_HD void next() {
    rest_ += r_;
    if (rest_ >= size_) {
      rest_ -= size_;
      ++group_;
    }
  }

 private:
  int64_t r_, size_, group_, rest_;
};

// T in float32, from the sum over k (low_rank, tile.h) or the one product (two_sided, weight.h) of
// factor entries that a kernel has at hand.
HUT_HD float multiplier(const Multiplier& m, float product) {
  return fmaf(m.scaling, product, m.constant);
}

// gamma * (W0 * T), not rounded.
HUT_HD float modulate(float weight, float T, float gamma) { return gamma * (weight * T); }

// gamma * bias + beta.
HUT_HD float effective_bias(float bias, float gamma, float beta) {
  return fmaf(gamma, bias, beta);
}

}  // namespace hut
