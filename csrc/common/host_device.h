// Marks a function for both sides where the compiler knows two.
#pragma once

#if defined(__CUDACC__)
#define DEEPSIM_HOST_DEVICE __host__ __device__
#else
#define DEEPSIM_HOST_DEVICE
#endif
