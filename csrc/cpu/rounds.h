// Which squares of blocks are worked on at once. Each block of rows and each of columns takes part in one square of a round, so a
// square may add to what belongs to its rows and columns without a lock; and it is the shape alone that says in which order squares
// follow each other, so that sums come out in the same bits for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace deepsim::cpu {

class Rounds {
 public:
  // In the self form (symmetric) only squares with row block <= column block.
  Rounds(int64_t row_blocks, int64_t column_blocks, bool symmetric)
      : rows_(row_blocks), columns_(column_blocks), symmetric_(symmetric), even_(row_blocks + row_blocks % 2) {}

  // Calls run(row block, column block), squares of a round by several threads at once.
  template <class Run>
  void for_each(Run run) const {
    const auto round = [&](int64_t count, auto blocks_of) {
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const auto [i, j] = blocks_of(k);
          run(i, j);
        }
      });
    };
    if (!symmetric_) {
      const int64_t fewer = std::min(rows_, columns_), more = std::max(rows_, columns_);
      for (int64_t shift = 0; shift < more && fewer > 0; ++shift) {
        round(fewer, [&](int64_t k) {
          const int64_t partner = (k + shift) % more;
          return rows_ <= columns_ ? Blocks{k, partner} : Blocks{partner, k};
        });
      }
      return;
    }
    round(rows_, [](int64_t k) { return Blocks{k, k}; });
    // Everybody meets everybody, as in a tournament: one sits still, the others move on by a place. An odd one out has nobody to meet.
    for (int64_t turn = 0; turn < even_ - 1; ++turn) {
      const bool odd = even_ != rows_;
      round(even_ / 2 - odd, [&](int64_t k) {
        const int64_t places = even_ - 1, seat = k + odd;
        const int64_t a = seat == 0 ? places : (turn + seat) % places, b = (turn + places - seat) % places;
        return Blocks{std::min(a, b), std::max(a, b)};
      });
    }
  }

 private:
  struct Blocks {
    int64_t row, column;
  };

  int64_t rows_, columns_;
  bool symmetric_;
  int64_t even_;  // blocks, with one that does not exist where they are odd
};

}  // namespace deepsim::cpu
