// What the style loss makes of the difference of two Gram matrices.
#pragma once

namespace deepsim {

// Sum of squares, sum of absolute values, root of the sum of squares.
enum class StyleDistance { l2, l1, frobenius };

}  // namespace deepsim
