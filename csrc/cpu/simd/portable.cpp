// CPU kernels for any processor: 16-byte vectors, which every 64-bit x86 and ARM has.
#define DEEPSIM_CAPABILITY portable
#define DEEPSIM_VECTOR_BYTES 16
#include "table.h"

namespace deepsim::cpu {
extern const KernelTable portable_kernels = portable::table();
}
