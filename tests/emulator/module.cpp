// deepsim_ext._C with the CUDA kernels in place of the CPU's, run by the emulator (tests/emulator/build.py).
#define DEEPSIM_CUDA_ARCHITECTURES "emulated"
#include "../../csrc/module.cpp"

#include "../../csrc/cuda/all_pairs.cu"
#include "../../csrc/cuda/batch_all.cu"
#include "../../csrc/cuda/batch_contrastive.cu"
#include "../../csrc/cuda/batch_hard.cu"
#include "../../csrc/cuda/batch_semi_hard.cu"
#include "../../csrc/cuda/given_rows.cu"
#include "../../csrc/cuda/gram.cu"
#include "../../csrc/cuda/mine_triplets.cu"
#include "../../csrc/cuda/nearest_neighbors.cu"
#include "../../csrc/cuda/pair_distances.cu"

namespace deepsim::cpu {
const char* capability() { return "CUDA kernels, emulated"; }
}  // namespace deepsim::cpu
