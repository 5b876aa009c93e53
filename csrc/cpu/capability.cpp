#include "capability.h"

#include <cstdlib>
#include <string>
#include <vector>

namespace deepsim::cpu {
namespace {

struct Capability {
  const char* name;
  const KernelTable* table;
};

// Best first. __builtin_cpu_supports also asks whether the operating system saves the wide registers.
std::vector<Capability> available() {
  std::vector<Capability> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx512", &avx512_kernels});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &avx2_kernels});
#endif
  found.push_back({"portable", &portable_kernels});
  return found;
}

Capability pick() {
  const std::vector<Capability> found = available();
  const char* wanted = std::getenv("DEEPSIM_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return found.front();
  std::string names;
  for (const Capability& c : found) {
    if (std::string(wanted) == c.name) return c;
    names += std::string(names.empty() ? "" : ", ") + c.name;
  }
  TORCH_CHECK_VALUE(false, "DEEPSIM_CPU_CAPABILITY must be one of ", names, " on this processor, got ", wanted);
}

const Capability& picked() {
  static const Capability capability = pick();
  return capability;
}

}  // namespace

const char* capability() { return picked().name; }
const KernelTable& kernel_table() { return *picked().table; }

}  // namespace deepsim::cpu
