#include "given_lists.h"

#include <algorithm>

#include "batch_hard.h"
#include "common/checks.h"

namespace deepsim {

void check_given_lists(const char* function, const at::Tensor& embeddings, const at::Tensor& labels, const at::Tensor& ref_embeddings,
                       const at::Tensor& ref_labels, const at::Tensor& begin, const at::Tensor& positives,
                       const std::optional<at::Tensor>& center) {
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const at::Device device = embeddings.device();
  check_floating(function, "positives", positives, 1);
  check_like(function, "positives", positives, compute_type(embeddings.scalar_type()), device, positives.sizes());
  check_like(function, "begin", begin, at::kLong, device, {embeddings.size(0) + 1});
  if (center) check_like(function, "center", *center, at::kDouble, device, {embeddings.size(1)});
  const at::Tensor values = begin.contiguous();
  const int64_t *first = values.const_data_ptr<int64_t>(), *last = first + embeddings.size(0);
  TORCH_CHECK_VALUE(*first == 0 && *last == positives.size(0) && std::is_sorted(first, last + 1), function,
                    ": begin must ascend from 0 to the number of positives, ", positives.size(0));
}

}  // namespace deepsim
