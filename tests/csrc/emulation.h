// Kernels run on the CPU: every thread of a block is a fiber, and a barrier is a switch to the next.
//
// Threads run one after the other from barrier to barrier, warps likewise, upwards in one run and
// downwards in another, so that a missing barrier shows in one of them at least.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <stdexcept>
#include <utility>
#include <vector>

#include "tile.h"

namespace hut::emulation {

inline bool descending() {
  const char* order = std::getenv("HUT_EMULATION_ORDER");
  return order != nullptr && std::string(order) == "descending";
}

// cvt.rna.tf32.f32: ten bits of mantissa, ties away from zero.
inline float tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

class Fibers {
 public:
  // Runs body(thread) for every thread of one block; `sync` is legal inside.
  void run(int threads, const std::function<void(int)>& body) {
    body_ = &body;
    barriers_.assign(threads, 0);
    finished_.assign(threads, false);
    in_warp_.assign(threads, false);
    contexts_.resize(threads);
    if (stacks_.size() < static_cast<size_t>(threads)) stacks_.resize(threads);
    for (int t = 0; t < threads; ++t) {
      if (!stacks_[t]) stacks_[t] = std::make_unique<char[]>(kStack);
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_[t].get();
      contexts_[t].uc_stack.ss_size = kStack;
      contexts_[t].uc_link = &scheduler_;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(
          &contexts_[t], reinterpret_cast<void (*)()>(&Fibers::start), 3,
          static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), t);
    }
    while (!finished_[0]) {
      // One warp after the other as far as the next barrier of the block; within a warp, the lanes
      // from one exchange to the next.
      for (int first = 0; first < threads; first += kWarp) {
        const int warp = descending() ? threads - kWarp - first : first;
        do {
          for (int i = 0; i < kWarp; ++i) {
            current_ = warp + (descending() ? kWarp - 1 - i : i);
            swapcontext(&scheduler_, &contexts_[current_]);
            if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
          }
          for (int i = 1; i < kWarp; ++i) meet(warp, warp + i);
        } while (in_warp_[warp]);
      }
      for (int t = 1; t < threads; ++t) meet(0, t);
    }
  }

  // A barrier of the block, or an exchange within the warp.
  void sync(bool warp = false) {
    barriers_[current_] += !warp;
    in_warp_[current_] = warp;
    swapcontext(&contexts_[current_], &scheduler_);
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  static void start(unsigned high, unsigned low, int thread) {
    auto* self = reinterpret_cast<Fibers*>(static_cast<uintptr_t>(high) << 32 | low);
    try {
      (*self->body_)(thread);
    } catch (...) {  // it cannot leave a fiber's stack
      self->failure_ = std::current_exception();
    }
    self->finished_[thread] = true;
    self->in_warp_[thread] = false;
  }

  void meet(int a, int b) const {
    if (barriers_[a] != barriers_[b] || finished_[a] != finished_[b] || in_warp_[a] != in_warp_[b])
      throw std::runtime_error("emulation: not all threads met at the same barrier");
  }

  const std::function<void(int)>* body_ = nullptr;
  ucontext_t scheduler_;
  std::vector<ucontext_t> contexts_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<int> barriers_;
  std::vector<bool> finished_, in_warp_;
  std::exception_ptr failure_;
  int current_ = 0;
};

// What the lanes of one warp hand to the tensor core: see `mma` in the PTX manual, m16n8k8, tf32.
struct Operands {
  float a[16][8], b[8][8];
};

class Block {
 public:
  Block(Fibers& fibers, std::vector<Operands>& operands, int64_t index, int thread)
      : fibers_(fibers), operands_(operands), index_(index), thread_(thread) {}

  int64_t index() const { return index_; }
  int thread() const { return thread_; }
  void sync() const { fibers_.sync(); }

  void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) const {
    Operands& operands = operands_[thread_ / kWarp];
    const int group = thread_ % kWarp / 4, in_group = thread_ % 4;
    for (int i = 0; i < 4; ++i)
      operands.a[group + i % 2 * 8][in_group + i / 2 * 4] = tf32(a[i]);
    for (int i = 0; i < 2; ++i) operands.b[in_group + i * 4][group] = tf32(b[i]);
    fibers_.sync(true);
    for (int i = 0; i < 4; ++i) {
      const int row = group + i / 2 * 8, column = in_group * 2 + i % 2;
      for (int k = 0; k < 8; ++k) d[i] += operands.a[row][k] * operands.b[k][column];
    }
    fibers_.sync(true);
  }

 private:
  Fibers& fibers_;
  std::vector<Operands>& operands_;
  int64_t index_;
  int thread_;
};

// Runs kernel(block, shared) for every thread of every block. Shared memory begins as NaN.
template <class SharedMemory, class Kernel>
void launch(int64_t blocks, Kernel kernel) {
  static Fibers fibers;
  std::vector<Operands> operands(kThreads / kWarp);
  const auto shared = std::make_unique<SharedMemory>();
  for (int64_t i = 0; i < blocks; ++i) {
    std::memset(shared.get(), 0xff, sizeof(SharedMemory));
    fibers.run(kThreads, [&](int thread) {
      Block block(fibers, operands, i, thread);
      kernel(block, *shared);
    });
  }
}

}  // namespace hut::emulation
