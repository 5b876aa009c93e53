// The compiled module: loading it registers the ops with torch; Python sees only how it was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/capability.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch_version"] = TORCH_VERSION;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#endif
  info["cpu_capability"] = deepsim::cpu::capability();
  info["cuda_architectures"] = DEEPSIM_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this module was built, and which CPU kernels it runs with.");
}
