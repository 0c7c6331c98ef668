// Index and reduction logic of csrc/, checked exhaustively on small sizes. Prints what is wrong, and
// exits with 1 then.
#include <cstdio>
#include <map>
#include <set>
#include <tuple>

#include "emulation.h"
#include "launch.h"

namespace {

int failures = 0;

void expect(bool right, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (right) return;
  if (++failures <= 20)
    std::printf("%s: %lld %lld %lld\n", what, (long long)a, (long long)b, (long long)c);
}

// q(i) = floor(i r / size), by division and by walking, also where 32 bits are too few.
void groups() {
  for (int64_t size = 1; size <= 130; ++size)
    for (int r = 1; r <= size; ++r) {
      hut::GroupWalk walk(size / 3, r, size);
      for (int64_t i = 0; i < size; ++i) {
        expect(hut::group_of(i, r, size) == i * r / size, "group_of", i, r, size);
        if (i < size / 3) continue;
        expect(walk.group() == i * r / size, "GroupWalk", i, r, size);
        walk.next();
      }
    }
  for (int64_t size : {int64_t{1} << 31, int64_t{1} << 33, (int64_t{1} << 33) + 7})
    for (int64_t i : {int64_t{0}, size / 5, size / 2, size - 1}) {
      const auto exact = static_cast<int64_t>(static_cast<__int128>(i) * 128 / size);
      expect(hut::group_of(i, 128, size) == exact, "group_of, large", i, 128, size);
    }
}

// The lanes of a block own every element of a 64 x 64 tile once, and `multiply` is the product.
template <bool EXACT, int CHUNKS, int V>
void products(int depth, double limit) {
  constexpr int kWidth = 4 * V * CHUNKS;
  static float left[hut::kTile][32], right[32][kWidth], out[hut::kTile][kWidth];
  uint32_t seed = 1;
  const auto random = [&] { return (seed = seed * 1664525 + 1013904223) / 4294967296.0f - 0.5f; };
  for (auto& row : left)
    for (float& value : row) value = random();
  for (auto& row : right)
    for (float& value : row) value = random();
  std::memset(out, 0xff, sizeof(out));
  struct None {};
  hut::emulation::launch<None>(1, [&](hut::emulation::Block& block, None&) {
    const int warp = block.thread() / hut::kWarp;
    const hut::Lane lane(block.thread());
    float acc[2][CHUNKS][V] = {};
    hut::multiply<EXACT, CHUNKS, V>(
        block, {left[hut::kWarpRows * warp], 32, 1}, {right[0], kWidth, 1}, depth, acc);
    for (int h = 0; h < 2; ++h)
      for (int c = 0; c < CHUNKS; ++c)
        for (int v = 0; v < V; ++v)
          out[hut::kWarpRows * warp + lane.g + 8 * h][4 * V * c + V * lane.t + v] = acc[h][c][v];
  });
  for (int i = 0; i < hut::kTile; ++i)
    for (int j = 0; j < kWidth; ++j) {
      double exact = 0;
      for (int k = 0; k < depth; ++k) exact += double(left[i][k]) * right[k][j];
      expect(std::abs(out[i][j] - exact) <= limit, "multiply", i, j, EXACT);
    }
}

// The blocks of a reduction take every (side, tile, split, block of k) once.
void places() {
  float partial = 0;
  for (int64_t rows : {1, 64, 65, 200})
    for (int64_t columns : {1, 64, 129})
      for (int r : {1, 16, 17, 40})
        for (int splits : {1, 3})
          for (int needed = 1; needed < 4; ++needed) {
            hut::ReduceArguments a{};
            a.multiplier.side[1].size = columns;
            a.multiplier.r = r;
            a.rows = rows;
            a.splits[0] = splits;
            a.splits[1] = splits + 1;
            for (int s = 0; s < 2; ++s) a.partials[s] = needed >> s & 1 ? &partial : nullptr;
            std::set<std::tuple<int, int64_t, int, int>> seen;
            const int64_t blocks = hut::reduce_blocks(a, false, 16);
            for (int64_t block = 0; block < blocks; ++block) {
              const auto p = hut::reduce_place(a, block, hut::rank_blocks(a, false, 16), 16);
              expect(needed >> p.side & 1, "side", p.side, needed);
              expect(p.first < (p.side ? columns : rows) && p.first % 64 == 0, "first index", p.first);
              expect(p.split < a.splits[p.side] && p.first_k < r, "split, k", p.split, p.first_k);
              seen.emplace(p.side, p.first, p.split, p.first_k);
            }
            expect(static_cast<int64_t>(seen.size()) == blocks, "places", seen.size(), blocks);
          }
}

// Partial sums never share an address.
void partial_addresses() {
  std::set<int64_t> seen;
  for (int split = 0; split < 3; ++split)
    for (int k = 0; k < 5; ++k)
      for (int index = 0; index < 7; ++index)
        expect(seen.insert(hut::partial_at(split, k, index, 5, 7)).second, "partial_at", k, index);
  expect(*seen.rbegin() == 3 * 5 * 7 - 1, "partial_at, last");
}

// Eight neighbors: packed and element by element give the same, zero outside when loaded, and
// nothing outside is written.
void packs() {
  alignas(16) float data[3][24];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 24; ++j) data[i][j] = static_cast<float>(100 * i + j + 1);
  for (bool packed : {false, true}) {
    const hut::Matrix<const float> matrix{data[0], 3, 21, 24, 1, packed};
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 24; j += 8) {
        float values[8];
        hut::load_pack(matrix, i, j).unpack(values);
        for (int v = 0; v < 8; ++v) {
          const bool inside = i < 3 && j + v < 21;
          expect(values[v] == (inside ? data[i][j + v] : 0.0f), "load_pack", i, j + v, packed);
        }
      }
    alignas(16) float target[4][24] = {};
    const hut::Matrix<float> out{target[0], 3, 21, 24, 1, packed};
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 24; j += 8) {
        hut::Pack<float> pack;
        pack.pack({1, 2, 3, 4, 5, 6, 7, 8});
        hut::store_pack(out, i, j, pack);
      }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 24; ++j)
        expect(
            target[i][j] == (i < 3 && j < 21 ? j % 8 + 1 : 0), "store_pack", i, j, packed);
  }
}

}  // namespace

int main() {
  groups();
  for (int depth : {8, 16, 32}) {
    products<true, 2, 8>(depth, 1e-5);
    products<false, 2, 8>(depth, 5e-3);
    products<true, 1, 4>(depth, 1e-5);
    products<false, 1, 4>(depth, 5e-3);
    products<false, 1, 8>(depth, 5e-3);
  }
  places();
  partial_addresses();
  packs();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}
