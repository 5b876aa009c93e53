// The distances between embedding rows, named as SciPy names them. No torch header: CPU and CUDA kernels share this.
#pragma once

namespace deepsim {

enum class Distance {
  euclidean,    // |a - b|
  sqeuclidean,  // |a - b|^2
  cosine,       // 1 - a.b / (|a| |b|); a zero row has distance 1 to every row
};

}  // namespace deepsim
