// The kernels' launchers, and which instance of a kernel a call runs.
#pragma once

#include "finish.h"
#include "reduce.h"
#include "weight.h"

namespace hut {

// Both run on the current device; `stream` is a cudaStream_t. Nothing is launched for no elements.
void launch_weight(
    const WeightArguments& arguments, Type weight, Type out, bool two_sided, bool exact,
    void* stream);
void launch_reduce(
    const ReduceArguments& arguments, Type weight, bool two_sided, bool exact, void* stream);
void launch_finish(const FinishArguments& arguments, void* stream);

template <class W_, class Out_, bool TWO_SIDED_, bool EXACT_>
struct WeightInstance {
  using W = W_;
  using Out = Out_;
  static constexpr bool TWO_SIDED = TWO_SIDED_, EXACT = EXACT_;
};

template <class W, class Out, class Launch>
void select_weight(bool two_sided, bool exact, Launch launch) {
  if (two_sided) return launch(WeightInstance<W, Out, true, true>{});
  if constexpr (!std::is_same_v<Out, float>)
    if (!exact) return launch(WeightInstance<W, Out, false, false>{});
  launch(WeightInstance<W, Out, false, true>{});
}

template <class W, class Launch>
void select_weight(Type out, bool two_sided, bool exact, Launch launch) {
  visit(out, [&](auto o) { select_weight<W, decltype(o)>(two_sided, exact, launch); });
}

// Calls `launch` with the instance. float32 is exact whatever is asked for: its limit is 2e-6.
template <class Launch>
void select_weight(Type weight, Type out, bool two_sided, bool exact, Launch launch) {
  visit(weight, [&](auto w) { select_weight<decltype(w)>(out, two_sided, exact, launch); });
}

template <class W_, bool TWO_SIDED_, bool EXACT_, int WIDTH_>
struct ReduceInstance {
  using W = W_;
  static constexpr bool TWO_SIDED = TWO_SIDED_, EXACT = EXACT_;
  static constexpr int WIDTH = WIDTH_;  // values of k at a time
};

template <class W, class Launch>
void select_reduce(int r, bool two_sided, bool exact, Launch launch) {
  if (two_sided) return launch(ReduceInstance<W, true, true, 16>{});
  if (r <= 16) {
    if (exact) return launch(ReduceInstance<W, false, true, 16>{});
    return launch(ReduceInstance<W, false, false, 16>{});
  }
  if (exact) return launch(ReduceInstance<W, false, true, 32>{});
  launch(ReduceInstance<W, false, false, 32>{});
}

template <class Launch>
void select_reduce(Type weight, int r, bool two_sided, bool exact, Launch launch) {
  visit(weight, [&](auto w) { select_reduce<decltype(w)>(r, two_sided, exact, launch); });
}

}  // namespace hut
