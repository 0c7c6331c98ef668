#include "runtime.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace hut {

void* find(const char* library, const char* name) {
  void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return loaded ? dlsym(loaded, name) : nullptr;
}

void check(AOTITorchError code, const char* call) {
  if (code == TORCH_SUCCESS) return;
  static const auto what = reinterpret_cast<const char* (*)()>(
      find("libtorch_cpu.so", "torch_exception_get_what_without_backtrace"));
  STD_TORCH_CHECK(false, "hut_kernels: ", call, " failed", what ? ": " : "", what ? what() : "");
}

}  // namespace hut
