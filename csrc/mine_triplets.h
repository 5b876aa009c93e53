// Mining by strategy: what every backend's kernel checks and agrees on.
#pragma once

#include <string_view>

#include "common/strategy.h"

namespace deepsim {

// Throws where `function` got something else than names, or twice "semihard", each of which waits for the other.
Strategies strategies_from(const char* function, std::string_view positive, std::string_view negative);

}  // namespace deepsim
