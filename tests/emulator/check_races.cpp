// What TSan has to report about threads of a block, and what not: the kernel that is named runs under schedules of both kinds.
#include <map>
#include <string>

#include "csrc/cuda/warp.cuh"
#include "device_memory.h"

using namespace deepsim::cuda;

namespace {

constexpr int kThreads = 64, kBlocks = 4;

struct Elements {
  int element[kThreads];
  bool last;
};

__device__ int other() { return (int(threadIdx.x) + kThreads / 2) % kThreads; }
__device__ int neighbour() { return int(threadIdx.x) ^ 1; }

// ---- right ----

__global__ void barrier_kernel(int* out) {
  int* element = shared_memory<Elements>().element;
  element[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  const int sum = element[other()];
  __syncthreads();
  element[threadIdx.x] = sum;
  out[blockIdx.x * kThreads + threadIdx.x] = element[threadIdx.x];
}

__global__ void syncwarp_kernel(int* out) {
  int* element = shared_memory<Elements>().element;
  element[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  const int sum = element[neighbour()];
  __syncwarp();
  element[threadIdx.x] = sum;
  out[blockIdx.x * kThreads + threadIdx.x] = element[threadIdx.x];
}

// The last block to come reads what all have written.
__global__ void ticket_kernel(int* out, int* tickets) {
  auto& shared = shared_memory<Elements>();
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(tickets, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[b * kThreads + threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = sum;
}

// ---- wrong ----

// One warp may have returned before the other begins.
__global__ void missing_first_barrier_kernel(int* out) {
  int* element = shared_memory<Elements>().element;
  element[threadIdx.x] = int(threadIdx.x);
  out[blockIdx.x * kThreads + threadIdx.x] = element[other()];
}

// One warp may be at the next barrier before the other has left this one.
__global__ void missing_second_barrier_kernel(int* out) {
  int* element = shared_memory<Elements>().element;
  element[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  const int sum = element[other()];
  element[threadIdx.x] = sum;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = element[threadIdx.x];
}

__global__ void missing_syncwarp_kernel(int* out) {
  int* element = shared_memory<Elements>().element;
  element[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  const int sum = element[neighbour()];
  element[threadIdx.x] = sum;
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = element[threadIdx.x];
}

__global__ void missing_fence_kernel(int* out, int* tickets) {
  int* element = shared_memory<Elements>().element;
  element[threadIdx.x] = int(threadIdx.x);
  const int ticket = atomicAdd(tickets, 1);
  if (ticket % kThreads != kThreads - 1) return;
  int sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += element[i];
  out[blockIdx.x * kThreads] = sum;
}

}  // namespace

int main(int, char** argv) {
  Buffer<int> out(kBlocks * kThreads), tickets(1, 0);
  const std::string name = argv[1];
  const std::map<std::string, void (*)(int*)> kernels = {
      {"barrier", barrier_kernel},
      {"syncwarp", syncwarp_kernel},
      {"missing_first_barrier", missing_first_barrier_kernel},
      {"missing_second_barrier", missing_second_barrier_kernel},
      {"missing_syncwarp", missing_syncwarp_kernel},
  };
  const std::map<std::string, void (*)(int*, int*)> with_tickets = {{"ticket", ticket_kernel}, {"missing_fence", missing_fence_kernel}};
  for (int seed = 0; seed < 4; ++seed) {
    emulator::Options::current() = {unsigned(seed), true};
    tickets[0] = 0;
    if (kernels.count(name)) {
      launch(kernels.at(name), kBlocks, kThreads, sizeof(Elements), nullptr, &out[0]);
    } else {
      launch(with_tickets.at(name), kBlocks, kThreads, sizeof(Elements), nullptr, &out[0], &tickets[0]);
    }
    synchronize();
  }
}
