// How an anchor's positive and negative are chosen. No torch header: it is for device code too.
#pragma once

namespace deepsim {

// A hard positive is the farthest, a hard negative the nearest; an easy one is the reverse. A semi-hard one, chosen after the other of
// the two, is the hardest that leaves the negative strictly farther than the positive.
enum class Strategy { hard, easy, semihard };

struct Strategies {
  Strategy positive, negative;
};

}  // namespace deepsim
