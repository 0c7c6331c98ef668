// The reduction kernel: a block of rows of G, fresh from the BLAS and still in L2, to partial sums.
//
// G is read twice, once for each side of the reduction, by different blocks of one launch: so every
// sum stays in registers until its block is done, no two blocks share an address, and nothing is
// atomic. A block sums a 64-wide tile of its side over one split of the other.
#pragma once

#include "reduction.h"
#include "stage.h"

namespace hut {

struct ReduceArguments {
  Multiplier multiplier;
  const float* G;       // [rows, columns], contiguous
  const void* weight;   // W0 from the block's first row
  int64_t weight_strides[2];
  bool G_packed, weight_packed;
  int64_t first_row, rows;  // the block of rows within the whole matrix
  float* partials[2];       // of each side, null where its gradient is not needed
  int splits[2];            // of each side: how many blocks share its sum
  int sums[2];              // 1 where the side also needs the sum of H0 itself, else 0
};

constexpr int kH0Pitch = kTile + 4, kTermsPitch = 32 + 4;

struct ReduceShared {
  alignas(16) float H0[kTile][kH0Pitch];
  alignas(16) float terms[kTile][kTermsPitch];
};

// H0(m, n): a row of the tile for the rows' side, a column for the columns'.
HUT_HD Shared H0_of(const ReduceShared& shared, int side) {
  return side == 0 ? Shared{shared.H0[0], kH0Pitch, 1} : Shared{shared.H0[0], 1, kH0Pitch};
}

// The launch's blocks: side, then tile, then split, then block of k.
struct ReducePlace {
  int side;
  int64_t first;  // first index m, within the rows or columns at hand
  int split;
  int first_k;
};

HUT_HD int64_t extent(const ReduceArguments& a, int side) {
  return side == 0 ? a.rows : a.multiplier.side[1].size;
}

HUT_HD int rank_blocks(const ReduceArguments& a, bool two_sided, int width) {
  return two_sided ? 1 : (a.multiplier.r + width - 1) / width;
}

HUT_HD int64_t side_blocks(const ReduceArguments& a, int side, int rank_blocks) {
  return a.partials[side] == nullptr ? 0 : tiles(extent(a, side)) * a.splits[side] * rank_blocks;
}

HUT_HD int64_t reduce_blocks(const ReduceArguments& a, bool two_sided, int width) {
  const int count = rank_blocks(a, two_sided, width);
  return side_blocks(a, 0, count) + side_blocks(a, 1, count);
}

HUT_HD ReducePlace reduce_place(
    const ReduceArguments& a, int64_t block, int rank_blocks, int width) {
  const int64_t of_rows = side_blocks(a, 0, rank_blocks);
  const int side = block >= of_rows;
  const auto index = static_cast<uint32_t>(side ? block - of_rows : block);
  const uint32_t tile_and_split = index / rank_blocks, splits = a.splits[side];
  return {
      side, int64_t{tile_and_split / splits} * kTile, static_cast<int>(tile_and_split % splits),
      static_cast<int>(index % rank_blocks) * width};
}

// H0 gamma_n for a tile, zero outside; n are its columns for the rows' side, and its rows for the
// columns'. `row` is within the rows at hand.
template <class W, class Block>
HUT_BLOCK void load_H0(
    const Block& block, ReduceShared& shared, const ReduceArguments& a, int side, int64_t row,
    int64_t column) {
  const int64_t width = a.multiplier.side[1].size;
  const Matrix<const float> G{a.G, a.rows, width, width, 1, a.G_packed};
  const Matrix<const W> weight{
      static_cast<const W*>(a.weight), a.rows, width,
      a.weight_strides[0],             a.weight_strides[1], a.weight_packed};
  const Vector gamma = a.multiplier.side[1 - side].gamma;
  constexpr int kPacks = kTile / kPack, kRows = kThreads / kPacks;
  const int i = block.thread() / kPacks, j = block.thread() % kPacks * kPack;
  HUT_UNROLL
  for (int e = 0; e < kTile; e += 2 * kRows) {  // two rows' loads in flight
    Pack<float> g_packs[2];
    Pack<W> w_packs[2];
    HUT_UNROLL
    for (int f = 0; f < 2; ++f) {
      g_packs[f] = load_pack(G, row + i + e + f * kRows, column + j);
      w_packs[f] = load_pack(weight, row + i + e + f * kRows, column + j);
    }
    HUT_UNROLL
    for (int f = 0; f < 2; ++f) {
      const int at = i + e + f * kRows;
      float g[kPack], w[kPack];
      g_packs[f].unpack(g);
      w_packs[f].unpack(w);
      HUT_UNROLL
      for (int v = 0; v < kPack; ++v) {
        const int64_t n = side == 0 ? column + j + v : a.first_row + row + at;
        const bool inside = n < a.multiplier.side[1 - side].size;
        shared.H0[at][j + v] = weighted(g[v], w[v], inside ? element(gamma, n, 1.0f) : 0.0f);
      }
    }
  }
}

template <class W, bool TWO_SIDED, bool EXACT, int WIDTH, class Block>
HUT_BLOCK void reduce_kernel(Block& block, ReduceShared& shared, const ReduceArguments& a) {
  const Multiplier& m = a.multiplier;
  const ReducePlace place =
      reduce_place(a, block.index(), rank_blocks(a, TWO_SIDED, WIDTH), WIDTH);
  const int s = place.side, other = 1 - s;
  const Side& n_side = m.side[other];
  const int thread = block.thread(), warp = thread / kWarp;
  // Indices m and n are within the rows and columns at hand; the whole matrix's are further on.
  const int64_t m_offset = s == 0 ? a.first_row : 0, n_offset = s == 0 ? 0 : a.first_row;
  const int64_t extent_m = extent(a, s), extent_n = extent(a, other);
  const int64_t length = (tiles(extent_n) + a.splits[s] - 1) / a.splits[s] * kTile;
  const int64_t begin = place.split * length;
  const int64_t end = begin + length < extent_n ? begin + length : extent_n;
  // A block of rows is never seen again; the columns return with the next one.
  const bool first = s == 0 || a.first_row == 0;

  const int64_t own = place.first + thread;  // this thread's m in plain sums
  const bool owns = thread < kTile && own < extent_m;
  const int partial_rows = m.r + a.sums[s];
  float* const partials =
      a.partials[s] + partial_at(place.split, 0, m_offset, partial_rows, m.side[s].size);
  const auto partial = [&](int64_t k, int64_t index) -> float& {
    return partials[k * m.side[s].size + index];
  };

  if constexpr (TWO_SIDED) {
    if (owns && first)
      for (int k = 0; k < m.r; ++k) partial(k, own) = 0.0f;
    const int64_t p = group_of(m_offset + own, m.r, m.side[s].size);
    GroupWalk q(n_offset + begin, m.r, n_side.size);
    float group_sum = 0.0f;
    for (int64_t n = begin; n < end; n += kTile) {
      block.sync();
      load_H0<W>(block, shared, a, s, s == 0 ? place.first : n, s == 0 ? n : place.first);
      block.sync();
      if (!owns) continue;
      const Shared H0 = H0_of(shared, s);
      for (int first_j = 0; first_j < kTile; first_j += kPack) {
        float terms[kPack];
        gather(n_side.factor, terms, [&](int j) {
          const int64_t index = n + first_j + j;
          return index < end ? n_side.factor.offset(n_offset + index, p) : -1;
        });
        HUT_UNROLL
        for (int j = 0; j < kPack; ++j) {
          const int64_t index = n + first_j + j;
          if (index >= end) break;
          group_sum = fmaf(H0.at(thread, first_j + j), terms[j], group_sum);
          const int64_t group = q.group();
          q.next();
          if (q.group() != group || index + 1 == end) {
            partial(group, own) += group_sum;
            group_sum = 0.0f;
          }
        }
      }
    }
  } else {
    const bool sums = owns && a.sums[s] && place.first_k == 0;
    float sum = 0.0f;  // of H0
    float S[2][1][WIDTH / 4] = {};
    for (int64_t n = begin; n < end; n += kTile) {
      block.sync();
      load_H0<W>(block, shared, a, s, s == 0 ? place.first : n, s == 0 ? n : place.first);
      HUT_UNROLL
      for (int k = 0; k < WIDTH; k += 16)
        stage<16>(
            block, &shared.terms[0][k], kTermsPitch, 1, n_side, n_offset + n, m.r,
            place.first_k + k);
      block.sync();
      const Shared H0 = H0_of(shared, s);
      const Shared left{H0.data + kWarpRows * warp * H0.row, H0.row, H0.column};
      multiply<EXACT, 1, WIDTH / 4>(
          block, left, Shared{shared.terms[0], kTermsPitch, 1}, kTile, S);
      if (sums)
        for (int j = 0; j < kTile; ++j) sum += H0.at(thread, j);
    }

    const Lane lane(thread);
    const int64_t index = place.first + kWarpRows * warp + lane.g;
    const int k = place.first_k + WIDTH / 4 * lane.t;
    const auto inside = [&](int h, int v) { return index + 8 * h < extent_m && k + v < m.r; };
    HUT_UNROLL
    for (int j = 0; j < WIDTH / 2; ++j)
      if (const int h = j % 2, v = j / 2; !first && inside(h, v))
        S[h][0][v] += partial(k + v, index + 8 * h);
    HUT_UNROLL
    for (int j = 0; j < WIDTH / 2; ++j)
      if (const int h = j % 2, v = j / 2; inside(h, v)) partial(k + v, index + 8 * h) = S[h][0][v];
    if (sums) partial(m.r, own) = first ? sum : partial(m.r, own) + sum;
  }
}

}  // namespace hut
