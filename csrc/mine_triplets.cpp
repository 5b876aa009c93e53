// Mining by strategy, and the triplet loss of what it finds, as ops. Hard positives and negatives are batch_hard's.
#include "mine_triplets.h"

#include <torch/library.h>

namespace deepsim {
namespace {

Strategy strategy_from(const char* function, const char* argument, std::string_view name) {
  if (name == "hard") return Strategy::hard;
  if (name == "easy") return Strategy::easy;
  if (name == "semihard") return Strategy::semihard;
  TORCH_CHECK_VALUE(false, function, ": ", argument, " must be one of 'hard', 'easy', 'semihard', got '", name, "'");
}

}  // namespace

Strategies strategies_from(const char* function, std::string_view positive, std::string_view negative) {
  const Strategies strategies{strategy_from(function, "positive", positive), strategy_from(function, "negative", negative)};
  TORCH_CHECK_VALUE(strategies.positive != Strategy::semihard || strategies.negative != Strategy::semihard, function,
                    ": negative must be 'hard' or 'easy' with positive='semihard', got 'semihard'");
  return strategies;
}

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Per anchor the rows that the strategies choose, int32; both -1 where either finds none.
  m.def(
      "mine_triplets(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, str positive, str negative,"
      " str distance) -> (Tensor positives, Tensor negatives)");
  // Results as of batch_hard_triplet_loss, whose backward op is this one's too.
  m.def(
      "mined_triplet_loss(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, str positive,"
      " str negative, float margin, bool soft, str distance, str reduction)"
      " -> (Tensor loss, Tensor d_ap, Tensor d_an, Tensor positives, Tensor negatives)");
}

}  // namespace deepsim
