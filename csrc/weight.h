// The weight kernel: gamma (W0 * T), rounded once, for the staged products and for merging.
//
// One block makes a 64 x 64 tile. Its weights are asked for first and arrive while the block forms T:
// r multiply-adds for each weight (low_rank), or two multiplications (two_sided).
#pragma once

#include "stage.h"

namespace hut {

// gamma * bias + beta, `[out_features]`, which the same launch can write; `out` is null if not.
struct EffectiveBias {
  Vector bias, gamma, beta;
  void* out;
  Type type;
  int64_t size;
};

struct WeightArguments {
  Multiplier multiplier;
  EffectiveBias effective_bias;
  const void* weight;
  void* out;
  int64_t weight_strides[2], out_strides[2];
  bool weight_packed, out_packed;
};

constexpr int kDepth = 16;  // of r, at a time in shared memory

struct WeightShared {
  // Rows of 20 and 68 floats: they begin on 16 bytes, and neighboring ones on other banks.
  alignas(16) float left[kTile][kDepth + 4];
  alignas(16) float right[kDepth][kTile + 4];
};

HUT_HD int64_t weight_blocks(const WeightArguments& a) {
  return tiles(a.multiplier.side[0].size) * tiles(a.multiplier.side[1].size);
}

template <class Block>
HUT_BLOCK void write_effective_bias(Block& block, const EffectiveBias& a, int64_t blocks) {
  if (a.out == nullptr) return;
  int64_t o = block.index() * kThreads + block.thread();
  for (; o < a.size; o += blocks * kThreads) {
    const float value = effective_bias(
        element(a.bias, o, 0.0f), element(a.gamma, o, 1.0f), element(a.beta, o, 0.0f));
    store_from_float(a.out, a.type, o, value);
  }
}

// F0[m, group(n)] F1[n, group(m)] for the elements that this thread owns.
HUT_HD void two_sided_products(
    const Multiplier& m, const int64_t (&rows)[2], const int64_t (&columns)[2],
    float (&products)[2][2][kPack]) {
  const Side &down = m.side[0], &across = m.side[1];
  HUT_UNROLL
  for (int c = 0; c < 2; ++c) {
    GroupWalk walk(columns[c], m.r, across.size);
    int q[kPack];
    HUT_UNROLL
    for (int v = 0; v < kPack; ++v) {
      q[v] = static_cast<int>(walk.group());
      walk.next();
    }
    HUT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t p = group_of(rows[h], m.r, down.size);
      const int64_t left = rows[h] < down.size ? across.size - columns[c] : 0;
      float first[kPack], second[kPack];
      gather(down.factor, first, [&](int v) {
        return v < left ? down.factor.offset(rows[h], q[v]) : -1;
      });
      gather(across.factor, second, [&](int v) {
        return v < left ? across.factor.offset(columns[c] + v, p) : -1;
      });
      HUT_UNROLL
      for (int v = 0; v < kPack; ++v) products[h][c][v] = first[v] * second[v];
    }
  }
}

template <class W, class Out, bool TWO_SIDED, bool EXACT, class Block>
HUT_BLOCK void weight_kernel(Block& block, WeightShared& shared, const WeightArguments& a) {
  write_effective_bias(block, a.effective_bias, weight_blocks(a));
  const Multiplier& m = a.multiplier;
  const int64_t height = m.side[0].size, width = m.side[1].size;
  // Blocks are counted in 32 bits (device.cuh), in which a division is a tenth of the work.
  const auto index = static_cast<uint32_t>(block.index());
  const auto tiles_across = static_cast<uint32_t>(tiles(width));
  const int64_t row = int64_t{index / tiles_across} * kTile;
  const int64_t column = int64_t{index % tiles_across} * kTile;
  const int warp = block.thread() / kWarp;
  const Lane lane(block.thread());
  const int64_t first = row + kWarpRows * warp + lane.g;
  const int64_t rows[2] = {first, first + 8};
  const int64_t columns[2] = {column + kPack * lane.t, column + kTile / 2 + kPack * lane.t};

  const Matrix<const W> weight{
      static_cast<const W*>(a.weight), height, width,
      a.weight_strides[0],             a.weight_strides[1], a.weight_packed};
  Pack<W> packs[2][2];
  HUT_UNROLL
  for (int j = 0; j < 4; ++j) packs[j / 2][j % 2] = load_pack(weight, rows[j / 2], columns[j % 2]);

  float products[2][2][kPack] = {};
  if constexpr (TWO_SIDED) {
    two_sided_products(m, rows, columns, products);
  } else {
    for (int k = 0; k < m.r; k += kDepth) {
      const int left = m.r - k < kDepth ? m.r - k : kDepth;
      block.sync();
      stage<kDepth>(block, shared.left[0], kDepth + 4, 1, m.side[0], row, m.r, k);
      stage<kDepth>(block, shared.right[0], 1, kTile + 4, m.side[1], column, m.r, k);
      block.sync();
      multiply<EXACT, 2, kPack>(
          block, Shared{shared.left[kWarpRows * warp], kDepth + 4, 1},
          Shared{shared.right[0], kTile + 4, 1}, (left + kStep - 1) / kStep * kStep, products);
    }
  }

  const Matrix<Out> out{
      static_cast<Out*>(a.out), height, width, a.out_strides[0], a.out_strides[1], a.out_packed};
  HUT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float down = rows[h] < height ? element(m.side[0].gamma, rows[h], 1.0f) : 0.0f;
    HUT_UNROLL
    for (int c = 0; c < 2; ++c) {
      float values[kPack];
      packs[h][c].unpack(values);
      HUT_UNROLL
      for (int v = 0; v < kPack; ++v) {
        const int64_t n = columns[c] + v;
        const float across = n < width ? element(m.side[1].gamma, n, 1.0f) : 0.0f;
        values[v] = modulate(values[v], multiplier(m, products[h][c][v]), down * across);
      }
      Pack<Out> pack;
      pack.pack(values);
      store_pack(out, rows[h], columns[c], pack);
    }
  }
}

}  // namespace hut
