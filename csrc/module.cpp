// The Python module: importing it registers the operators of ops.cpp.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <cuda_runtime_api.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "CUDA kernels of hut_kernels, as torch.ops.hut_cuda.", -1,
      nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  // The architectures that the kernels are compiled for, such as "80 90 120+PTX".
  if (module && PyModule_AddStringConstant(module, "architectures", HUT_ARCHITECTURES) == 0 &&
      // The CUDA runtime that is linked in, such as 13000, which takes a driver as new.
      PyModule_AddIntConstant(module, "toolkit", CUDART_VERSION) == 0)
    return module;
  Py_XDECREF(module);
  return nullptr;
}
