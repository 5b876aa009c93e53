// Names for the parts of an op, as torch.profiler shows them: `Stage stage("pack");` lasts until the end of its scope.
#pragma once

#include <ATen/record_function.h>

#include <string>

namespace deepsim {

class Stage {
 public:
  // Next to nothing where nobody profiles.
  explicit Stage(const char* name) : record_(at::RecordScope::USER_SCOPE) {
    if (record_.isActive()) record_.before("deepsim_ext::" + std::string(name));
  }

 private:
  at::RecordFunction record_;
};

}  // namespace deepsim
