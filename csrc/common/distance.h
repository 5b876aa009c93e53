// The distances between embedding rows, named as SciPy names them. No torch header: it is for device code too.
#pragma once

namespace deepsim {

enum class Distance {
  euclidean,    // |a - b|
  sqeuclidean,  // |a - b|^2
  cosine,       // 1 - a.b / (|a| |b|); a zero row has distance 1 to every row
};

}  // namespace deepsim
