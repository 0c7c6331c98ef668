// A warp's 16-row tile of a product of two small matrices in shared memory.
//
// A lane owns rows g and g + 8 (g = lane / 4) and, in each chunk of 4 V columns, the V neighbors from
// t V (t = lane % 4): enough of them for a 16-byte access to the matrix that the product is for. The
// tensor core's accumulator has this shape if its column c of step j stands for column
// (c / 2) V + 2 j + c % 2 of the chunk, so both ways of multiplying share one layout.
#pragma once

#include "portable.h"

namespace hut {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kTile = 64;      // rows (16 a warp) and columns of a block's tile
constexpr int kWarpRows = 16;
constexpr int kStep = 8;       // the product's inner size is padded to a multiple of it

HUT_HD int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

struct Lane {
  int g, t;
  HUT_HD explicit Lane(int thread) : g(thread % kWarp / 4), t(thread % 4) {}
};

// A matrix in shared memory: element (i, j) is at data[i * row + j * column].
struct Shared {
  const float* data;
  int row, column;
  HUT_HD float at(int i, int j) const { return data[i * row + j * column]; }
};

// acc[h][c][v] += sum_k left(g + 8 h, k) right(k, 4 V c + V t + v) for k < depth.
//
// EXACT: float32 throughout. Otherwise the operands are rounded to tf32 for the tensor core, whose
// sums are float32. right has contiguous rows that begin on 16 bytes.
template <bool EXACT, int CHUNKS, int V, class Block>
HUT_BLOCK void multiply(
    Block& block, Shared left, Shared right, int depth, float (&acc)[2][CHUNKS][V]) {
  static_assert(V % 4 == 0);
  const Lane lane(block.thread());
  if constexpr (EXACT) {
    HUT_UNROLL_BY(4)
    for (int k = 0; k < depth; ++k) {
      const float up = left.at(lane.g, k), down = left.at(lane.g + 8, k);
      HUT_UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        HUT_UNROLL
        for (int v = 0; v < V; v += 4) {
          const float4 four = *reinterpret_cast<const float4*>(
              right.data + k * right.row + 4 * V * c + V * lane.t + v);
          const float values[4] = {four.x, four.y, four.z, four.w};
          HUT_UNROLL
          for (int j = 0; j < 4; ++j) {
            acc[0][c][v + j] = fmaf(up, values[j], acc[0][c][v + j]);
            acc[1][c][v + j] = fmaf(down, values[j], acc[1][c][v + j]);
          }
        }
      }
    }
  } else {
    HUT_UNROLL_BY(1)
    for (int k = 0; k < depth; k += kStep) {
      const float a[4] = {
          left.at(lane.g, k + lane.t), left.at(lane.g + 8, k + lane.t),
          left.at(lane.g, k + lane.t + 4), left.at(lane.g + 8, k + lane.t + 4)};
      HUT_UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        HUT_UNROLL
        for (int v = 0; v < V; v += 2) {
          const int column = 4 * V * c + V * (lane.g / 2) + v + lane.g % 2;
          const float b[2] = {right.at(k + lane.t, column), right.at(k + lane.t + 4, column)};
          float d[4] = {acc[0][c][v], acc[0][c][v + 1], acc[1][c][v], acc[1][c][v + 1]};
          block.mma(d, a, b);
          acc[0][c][v] = d[0];
          acc[0][c][v + 1] = d[1];
          acc[1][c][v] = d[2];
          acc[1][c][v + 1] = d[3];
        }
      }
    }
  }
}

}  // namespace hut
