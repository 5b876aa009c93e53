// Pairs and triplets of rows that are given: rows of one number, of two sets (x1 and x2) or of three (anchor, positive, negative).
// Plain constants: files of every backend see this.
#pragma once

namespace deepsim {

constexpr int kMostGivenSets = 3;

// The distances between a triplet's rows: 0 is d_ap, 1 is d_an and 2 is d_pn, so number k is that of the sets k / 2 and (k + 3) / 2.
// Pairs have the first of them only, triplets without the swap the first two.
constexpr int kMostGivenPairs = 3;

}  // namespace deepsim
