// seppo_fast::pair_loss on CUDA GPUs. Stable ABI: one binary for every Python and every torch >= 2.10.
//
// A pair's sums decide the coefficient of its gradient, so every element is needed twice. Here its error p - t stays in
// shared memory until the sums are made, so that each input is read once and the gradient written once. (The errors would fit
// into registers, half of 64, but ptxas spilled some of them in every version that was tried.) A thread holds 16 elements of
// the winner and 16 of the loser, and 8 warps make a group: 4096 elements of each half, 32 KB. SD-1.5's 16384 elements are
// 4 groups, SDXL's and a video's 65536 are 16, 16 channels of 128 x 128 are 64.
//
// The order of the sums decides the bits of the result: a thread's elements, its warp, the 8 warps of its group, the groups.
// Blocks only decide where groups run, so launch plan, batch size and chip change no bit:
//   clustered    the groups of a pair in one block or in the 2 to 16 blocks of a cluster (sm_90), sums through shared memory
//   cooperative  all blocks of a resident grid share the pairs, sums through global memory and a counter for each pair
//   in_passes    three ordinary launches that read p and t twice, for a pair too large for the shared memory of the whole chip
// The block that finishes the last pair adds the losses of all pairs, in an order that only the number of pairs decides.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "pair_loss.h"
#include "tensors.h"

namespace {

using seppo::dtype_code, seppo::floats, seppo::kBFloat, seppo::kFloat, seppo::kHalf, seppo::Tensor;

constexpr int kLanes = 32;
constexpr int kPerThread = 16;                                 // elements of each half of a pair
constexpr int kGroupWarps = 8, kGroupThreads = kGroupWarps * kLanes;
constexpr int kGroup = kGroupThreads * kPerThread;             // elements of each half
constexpr int kMaxThreads = 1024, kMaxBlockGroups = kMaxThreads / kGroupThreads;
constexpr int kMaxCluster = 16, kMaxClusterGroups = kMaxCluster * kMaxBlockGroups;  // beyond 8 a chip may refuse
constexpr int kThreadBytes = 2 * kPerThread * sizeof(float);   // of shared memory, where the errors wait
constexpr int kGroupBytes = kGroupThreads * kThreadBytes;
constexpr int kMaxDevices = 64;
constexpr int kTickets = 1024;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSums = 6;  // difference, policy, reference; winner and loser of each

enum Plan { kAuto, kClustered, kCooperative, kInPasses };

struct Any {};     // an input whose dtype is known at run time only
struct Scored {};  // no input: the reference is known by its errors

struct Input {
  const char* data;
  int64_t loser;  // elements from a pair's winner to its loser; 0 for a target that both share
  int dtype;
};

struct Problem {
  Input policy, reference, target;
  const float* given;  // the reference's errors (2 * pairs,) where it is Scored, else null
  const float* signs;  // (pairs,), or null where the flipper decides
  char* grad;  // null: not wanted. The errors are kept anyway, because a branch would separate the loads
  int64_t pairs, elements, groups;
  double weight;
  float beta, sft_weight, scale;
  int flipper;
  float *loss, *stats;   // (), (7 * pairs + 2,)
  unsigned* ticket;      // how many have finished; zero between launches. Not used for one pair
  float* partial;        // (pairs, groups, kSums)
  float2* coefficients;  // (pairs,)
  unsigned* arrived;     // (pairs,)

  __device__ __forceinline__ void put_totals(double losses, double accurate, double flipped) const {
    *loss = (float)(weight * losses);
    stats[7 * pairs] = (float)accurate / (float)pairs;
    stats[7 * pairs + 1] = (float)flipped / (float)pairs;
  }
};

// Zero when the library is loaded and after every launch; ticket_of() says which launch uses which.
__device__ unsigned tickets[kTickets];

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ unsigned short bits_of(__half x) { return __half_as_ushort(x); }
__device__ __forceinline__ unsigned short bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
template <class X>
__device__ __forceinline__ X narrow(float x) {
  if constexpr (std::is_same_v<X, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<X, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

// kKeep: another thread asks for the same line soon (the target of both halves), so it may stay in L1.
template <bool kKeep, class Word>
__device__ __forceinline__ Word read(const char* from) {
  return kKeep ? __ldg(reinterpret_cast<const Word*>(from)) : __ldcs(reinterpret_cast<const Word*>(from));
}

template <int kBytes, bool kKeep>
__device__ __forceinline__ void read_words(uint32_t* to, const char* from) {
  if constexpr (kBytes == 8) {
    const uint2 word = read<kKeep, uint2>(from);
    to[0] = word.x, to[1] = word.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; i++) {
      const uint4 word = read<kKeep, uint4>(from + 16 * i);
      to[4 * i] = word.x, to[4 * i + 1] = word.y, to[4 * i + 2] = word.z, to[4 * i + 3] = word.w;
    }
  }
}

// 16 bytes in one store. In PTX, because the compiler splits the store where registers are scarce.
template <class X>
__device__ __forceinline__ void write_words(X* to, const X (&from)[16 / sizeof(X)]) {
  uint32_t words[4];
  if constexpr (sizeof(X) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = __float_as_uint(from[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = bits_of(from[2 * i]) | (uint32_t)bits_of(from[2 * i + 1]) << 16;
  }
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

template <class X>
__device__ __forceinline__ float element_of(const uint32_t* words, int i) {
  if constexpr (sizeof(X) == 4) return __uint_as_float(words[i]);
  else {
    const uint32_t bits = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff;
    if constexpr (std::is_same_v<X, __nv_bfloat16>) return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : bits << 16);
    else return __half2float(__ushort_as_half((unsigned short)bits));
  }
}

// One half of a pair as a thread reads it: from its own first element on, so that the later ones are a fixed step away.
template <class X>
struct Source {
  const char* from;
  int dtype;

  __device__ __forceinline__ Source(const Input& input, int64_t pair_start, int half, int offset) : dtype(input.dtype) {
    from = input.data + size() * (pair_start + half * input.loser + offset);
  }
  __device__ __forceinline__ int64_t size() const {
    if constexpr (std::is_same_v<X, Any>) return dtype == kFloat ? 4 : 2;
    else return sizeof(X);
  }

  // kWidth elements, zeros beyond the `left` that there are. kVector: 16 bytes at a time, all or nothing.
  template <int kWidth, bool kVector, bool kKeep>
  __device__ __forceinline__ void load(float (&to)[kWidth], int step, int left) const {
    if constexpr (kVector) {
      uint32_t words[kWidth] = {};
      if constexpr (std::is_same_v<X, Any>) {
        if (left > 0) {
          if (dtype == kFloat) read_words<4 * kWidth, kKeep>(words, from + 4 * step);
          else read_words<2 * kWidth, kKeep>(words, from + 2 * step);
        }
#pragma unroll
        for (int i = 0; i < kWidth; i++) to[i] = dtype == kFloat ? element_of<float>(words, i) : half_of(words, i);
      } else {
        if (left > 0) read_words<sizeof(X) * kWidth, kKeep>(words, from + sizeof(X) * step);
#pragma unroll
        for (int i = 0; i < kWidth; i++) to[i] = element_of<X>(words, i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        uint32_t word = 0;
        if (i < left) {
          if (dtype == kFloat) word = read<true, unsigned>(from + 4 * (step + i));
          else word = read<true, unsigned short>(from + 2 * (step + i));
        }
        to[i] = dtype == kFloat ? __uint_as_float(word) : half_of(&word, 0);
      }
    }
  }
  __device__ __forceinline__ float half_of(const uint32_t* words, int i) const {
    const float bfloat = element_of<__nv_bfloat16>(words, i), half = element_of<__half>(words, i);
    return dtype == kHalf ? half : bfloat;
  }
};

// Indices are read again where they are needed. Otherwise the compiler keeps values derived from them in registers, from the
// loads to the stores, and no registers are free.
__device__ __forceinline__ int thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int block() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

// A thread's part of a pair. No other thread reads the errors that it keeps, so they need no barrier.
template <class P, class R, class T, bool kVector>
struct Piece {
  static constexpr int kWidth = 16 / sizeof(P), kSteps = kPerThread / kWidth, kStride = kLanes * kWidth;

  // Four errors of this thread, next to its neighbours' so that no two lanes want the same bank.
  static __device__ __forceinline__ float4& kept(int half, int step, int i) {
    extern __shared__ float4 errors[];
    return errors[((half * kSteps + step) * kWidth + i) / 4 * blockDim.x + threadIdx.x];
  }

  // Where a thread's first element is within its group: a warp's elements are consecutive.
  static __device__ __forceinline__ int first() {
    const int warp = thread() / kLanes % kGroupWarps, lane = thread() % kLanes;
    return warp * (kPerThread * kLanes) + lane * kWidth;
  }
  static __device__ __forceinline__ int left(const Problem& problem, int64_t group) {  // elements of this group
    const int64_t left = problem.elements - group * kGroup;
    return left < kGroup ? left < 0 ? 0 : (int)left : kGroup;
  }

  template <bool kWithSums, bool kKeep>
  static __device__ __forceinline__ void read(const Problem& problem, int64_t pair, int64_t group, float (&sums)[kSums]) {
    constexpr bool kPredicted = kWithSums && !std::is_same_v<R, Scored>;
    const int64_t start = pair * problem.elements + group * kGroup;
    const int offset = first(), end = left(problem, group) - offset;
#pragma unroll 1  // the loads of one half are in flight together; those of both would not fit into the registers
    for (int half = 0; half < 2; half++) {
      const Source<P> policy(problem.policy, start, half, offset);
      const Source<R> reference(problem.reference, start, half, offset);
      const Source<T> target(problem.target, start, half, offset);
      float difference = 0, policy_error = 0, reference_error = 0;
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int skip = step * kStride;
        float p[kWidth], r[kWidth], t[kWidth];
        policy.template load<kWidth, kVector, false>(p, skip, end - skip);
        target.template load<kWidth, kVector, true>(t, skip, end - skip);
        if constexpr (kPredicted) reference.template load<kWidth, kVector, false>(r, skip, end - skip);
        float e[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; i++) {
          e[i] = p[i] - t[i];
          if constexpr (kWithSums) policy_error += e[i] * e[i];
          if constexpr (kPredicted) {
            const float f = r[i] - t[i];
            // The policy's squared error minus the reference's without cancellation, exactly 0 for equal predictions.
            difference += (p[i] - r[i]) * (e[i] + f);
            reference_error += f * f;
          }
        }
        if constexpr (kKeep) {
#pragma unroll
          for (int i = 0; i < kWidth; i += 4) kept(half, step, i) = make_float4(e[i], e[i + 1], e[i + 2], e[i + 3]);
        }
      }
      // Not sums[half]: an array that is indexed at run time is not in registers.
      if (half == 0) sums[0] = difference, sums[2] = policy_error, sums[4] = reference_error;
      else sums[1] = difference, sums[3] = policy_error, sums[5] = reference_error;
    }
  }

  static __device__ __forceinline__ void write_gradient(const Problem& problem, int64_t pair, int64_t group, float winner,
                                                        float loser) {
    const int64_t start = pair * problem.elements + group * kGroup;
    const int offset = first(), end = left(problem, group) - offset;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const float coefficient = half ? loser : winner;
      P* to = reinterpret_cast<P*>(problem.grad) + (start + half * problem.policy.loser + offset);
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int skip = step * kStride;
        float e[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) *reinterpret_cast<float4*>(e + i) = kept(half, step, i);
        P out[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; i++) out[i] = narrow<P>(coefficient * e[i]);
        if constexpr (kVector) {
          if (skip < end) write_words(to + skip, out);
        } else {
#pragma unroll
          for (int i = 0; i < kWidth; i++) {
            if (skip + i < end) to[skip + i] = out[i];
          }
        }
      }
    }
  }
};

// Six sums over a warp in 9 shuffles; each exchange halves what a lane holds. Lane 4 * i ends with sum i.
__device__ __forceinline__ float warp_sum(const float (&v)[kSums]) {
  const int lane = threadIdx.x % kLanes;
  const bool upper = lane & 16, middle = lane & 8, lower = lane & 4;
  const float a0 = (upper ? v[4] : v[0]) + __shfl_xor_sync(kAllLanes, upper ? v[0] : v[4], 16);
  const float a1 = (upper ? v[5] : v[1]) + __shfl_xor_sync(kAllLanes, upper ? v[1] : v[5], 16);
  const float a2 = (upper ? 0.0f : v[2]) + __shfl_xor_sync(kAllLanes, upper ? v[2] : 0.0f, 16);
  const float a3 = (upper ? 0.0f : v[3]) + __shfl_xor_sync(kAllLanes, upper ? v[3] : 0.0f, 16);
  const float b0 = (middle ? a2 : a0) + __shfl_xor_sync(kAllLanes, middle ? a0 : a2, 8);
  const float b1 = (middle ? a3 : a1) + __shfl_xor_sync(kAllLanes, middle ? a1 : a3, 8);
  float c = (lower ? b1 : b0) + __shfl_xor_sync(kAllLanes, lower ? b0 : b1, 4);
  c += __shfl_xor_sync(kAllLanes, c, 2);
  return c + __shfl_xor_sync(kAllLanes, c, 1);
}

struct alignas(16) Shared {
  float warp[kSums][kMaxThreads / kLanes];
  float group[kSums][kMaxClusterGroups];
  float total[kSums];

  __device__ __forceinline__ void put_warp_sums(const float (&sums)[kSums]) {
    const float sum = warp_sum(sums);
    const int lane = threadIdx.x % kLanes;
    if (lane % 4 == 0 && lane / 4 < kSums) warp[lane / 4][threadIdx.x / kLanes] = sum;
    __syncthreads();
  }

  __device__ __forceinline__ float group_sum(int which, int group) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kGroupWarps; i++) sum += warp[which][group * kGroupWarps + i];
    return sum;
  }

  // Warp i adds up sum i over the groups of a pair; of(which, group) reads one.
  template <int kUnroll, class Of>
  __device__ __forceinline__ void put_totals(int64_t groups, Of of) {
    const int which = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    if (which < kSums) {
      double lanes = 0;  // a lane has one group, more only for the largest samples, where fp32 would lose digits
#pragma unroll kUnroll
      for (int64_t group = lane; group < groups; group += kLanes) lanes += of(which, group);
      float sum = (float)lanes;
#pragma unroll
      for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane == 0) total[which] = sum;
    }
    __syncthreads();
  }

  template <bool kScored>
  __device__ __forceinline__ seppo::PairLoss finish(const Problem& problem, int64_t pair, bool writes) const {
    const float elements = (float)problem.elements;
    float mean[kSums];
#pragma unroll
    for (int i = 0; i < kSums; i++) mean[i] = total[i] / elements;
    if constexpr (kScored) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        mean[4 + half] = __ldg(problem.given + pair + half * problem.pairs);
        mean[half] = seppo::excess(mean[2 + half], mean[4 + half]);
      }
    }
    const float sign = problem.signs ? __ldg(problem.signs + pair) : seppo::sign_of(mean[0], problem.flipper);
    const seppo::PairLoss out = seppo::pair_loss(mean[0], mean[1], sign, mean[2], elements, problem.beta, problem.sft_weight,
                                                 problem.scale);
    if (writes && threadIdx.x == 0) {
      float* to = problem.stats + pair;
#pragma unroll
      for (int i = 0; i < 4; i++) to[i * problem.pairs] = mean[2 + i];
      to[4 * problem.pairs] = out.sign;
      to[5 * problem.pairs] = out.logit;
      to[6 * problem.pairs] = out.loss;
      if (problem.pairs == 1) problem.put_totals(out.loss, out.logit > 0.0f, out.sign == -1.0f);
    }
    return out;
  }
};

// Whole blocks call it `of` times in a launch, each time when thread 0 has written all its results to stats. The block that
// takes the last ticket sees what was written before the other tickets were taken, and sets the count back to zero.
__device__ __forceinline__ void finish_batch(const Problem& problem, unsigned of) {
  if (problem.pairs == 1 || threadIdx.x >= kLanes) return;
  unsigned ticket = 0;
  if (threadIdx.x == 0) {
    asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(ticket) : "l"(problem.ticket), "r"(of - 1) : "memory");
    if (ticket == of - 1) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  if (__shfl_sync(kAllLanes, ticket, 0) != of - 1) return;
  __syncwarp();  // its warp sees what thread 0 sees
  const float *signs = problem.stats + 4 * problem.pairs, *logits = signs + problem.pairs, *losses = logits + problem.pairs;
  double sums[3] = {};
#pragma unroll 4
  for (int64_t pair = threadIdx.x; pair < problem.pairs; pair += kLanes) {
    sums[0] += __ldcg(losses + pair);
    sums[1] += __ldcg(logits + pair) > 0.0f;
    sums[2] += __ldcg(signs + pair) == -1.0f;
  }
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
#pragma unroll
    for (int i = 0; i < 3; i++) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], distance);
  }
  if (threadIdx.x == 0) problem.put_totals(sums[0], sums[1], sums[2]);
}

// No thread needs them before the sums are made.
__device__ __forceinline__ void prefetch_given(const Problem& problem, int64_t pair) {
  if (threadIdx.x < 2) asm volatile("prefetch.global.L1 [%0];" ::"l"(problem.given + pair + threadIdx.x * problem.pairs));
}

template <class P, class R, class T, bool kVector>
__global__ void __launch_bounds__(kMaxThreads, 1) clustered(const __grid_constant__ Problem problem, int log_blocks) {
  __shared__ Shared shared;
  const int groups_here = blockDim.x / kGroupThreads;
  const auto rank = [=] { return block() & ((1 << log_blocks) - 1); };
  const auto pair = [=] { return (int64_t)(block() >> log_blocks); };
  const auto group = [=] { return rank() * groups_here + thread() / kGroupThreads; };
#if __CUDA_ARCH__ >= 900
  // No block may write into a block that has not started: the second half of this barrier is after the loads.
  if (log_blocks) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  constexpr bool kScored = std::is_same_v<R, Scored>;
  if constexpr (kScored) prefetch_given(problem, pair());
  float sums[kSums];
  Piece<P, R, T, kVector>::template read<true, true>(problem, pair(), group(), sums);
  shared.put_warp_sums(sums);
#if __CUDA_ARCH__ >= 900
  if (log_blocks) {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    const int mine = kSums * groups_here;
    for (int i = threadIdx.x; i < mine << log_blocks; i += blockDim.x) {
      const int which = i % mine / groups_here, own = i % groups_here;
      float* to = &shared.group[which][rank() * groups_here + own];
      *cooperative_groups::this_cluster().map_shared_rank(to, i / mine) = shared.group_sum(which, own);
    }
    // Once all have arrived, no block accesses another block's memory again, so a block may end at any time.
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else
#endif
  {
    for (int i = threadIdx.x; i < kSums * groups_here; i += blockDim.x) {
      shared.group[i / groups_here][i % groups_here] = shared.group_sum(i / groups_here, i % groups_here);
    }
    __syncthreads();
  }
  shared.put_totals<1>(problem.groups, [&](int which, int64_t i) { return shared.group[which][i]; });
  const seppo::PairLoss out = shared.finish<kScored>(problem, pair(), rank() == 0);
  if (problem.grad) {
    Piece<P, R, T, kVector>::write_gradient(problem, pair(), group(), out.winner_coefficient, out.loser_coefficient);
  }
  if (rank() == 0) finish_batch(problem, (unsigned)problem.pairs);
}

__device__ __forceinline__ void put_partial(const Problem& problem, const Shared& shared, int64_t work) {
  if (threadIdx.x < kSums) problem.partial[work * kSums + threadIdx.x] = shared.group_sum(threadIdx.x, 0);
}

template <int kUnroll>
__device__ __forceinline__ void put_pair_totals(const Problem& problem, Shared& shared, int64_t pair) {
  const float* partial = problem.partial + pair * problem.groups * kSums;
  shared.put_totals<kUnroll>(problem.groups, [&](int which, int64_t i) { return __ldcg(partial + i * kSums + which); });
}

// One group in a block. All blocks are resident, and block b works on b, b + grid, ...: a block that waits for its pair waits
// for work with a smaller or nearly equal index, so the first unfinished pair always goes on.
template <class P, class R, class T, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, 4) cooperative(const __grid_constant__ Problem problem) {
  __shared__ Shared shared;
  constexpr bool kScored = std::is_same_v<R, Scored>;
  const auto grid = cooperative_groups::this_grid();
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < problem.pairs; i += blockDim.x) problem.arrived[i] = 0;
    if (threadIdx.x == 0) *problem.ticket = 0;
  }
  auto token = grid.barrier_arrive();  // all blocks see the zeros before the first of them is counted up
  const unsigned all = (unsigned)(problem.pairs * problem.groups);  // choose() makes sure that this fits
  for (unsigned work = blockIdx.x; work < all; work += gridDim.x) {
    const unsigned pair = (unsigned)(work / problem.groups), group = work - pair * (unsigned)problem.groups;
    if constexpr (kScored) prefetch_given(problem, pair);
    float sums[kSums];
    Piece<P, R, T, kVector>::template read<true, true>(problem, pair, group, sums);
    shared.put_warp_sums(sums);
    if (work == blockIdx.x) grid.barrier_wait(std::move(token));  // there is work for every block
    put_partial(problem, shared, work);
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* arrived = problem.arrived + pair;
      unsigned count;
      asm volatile("fence.acq_rel.gpu;\n\tred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
      } while (count < problem.groups);
    }
    __syncthreads();
    put_pair_totals<1>(problem, shared, pair);
    const seppo::PairLoss out = shared.finish<kScored>(problem, pair, group == 0);
    if (problem.grad) {
      Piece<P, R, T, kVector>::write_gradient(problem, pair, group, out.winner_coefficient, out.loser_coefficient);
    }
  }
  finish_batch(problem, gridDim.x);
}

template <class P, class R, class T, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, 4) sum_pass(const __grid_constant__ Problem problem) {
  __shared__ Shared shared;
  if (blockIdx.x == 0 && threadIdx.x == 0) *problem.ticket = 0;
  for (int64_t work = blockIdx.x; work < problem.pairs * problem.groups; work += gridDim.x) {
    float sums[kSums];
    Piece<P, R, T, kVector>::template read<true, false>(problem, work / problem.groups, work % problem.groups, sums);
    shared.put_warp_sums(sums);
    put_partial(problem, shared, work);
    __syncthreads();
  }
}

template <bool kScored>
__global__ void __launch_bounds__(kGroupThreads) finish_pass(const __grid_constant__ Problem problem) {
  __shared__ Shared shared;
  for (int64_t pair = blockIdx.x; pair < problem.pairs; pair += gridDim.x) {
    put_pair_totals<8>(problem, shared, pair);
    const seppo::PairLoss out = shared.finish<kScored>(problem, pair, true);
    if (threadIdx.x == 0) problem.coefficients[pair] = {out.winner_coefficient, out.loser_coefficient};
    __syncthreads();
  }
  finish_batch(problem, gridDim.x);
}

template <class P, class T, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, 4) gradient_pass(const __grid_constant__ Problem problem) {
  for (int64_t work = blockIdx.x; work < problem.pairs * problem.groups; work += gridDim.x) {
    const int64_t pair = work / problem.groups, group = work % problem.groups;
    float sums[kSums];
    Piece<P, Scored, T, kVector>::template read<false, true>(problem, pair, group, sums);
    const float2 coefficients = problem.coefficients[pair];
    Piece<P, Scored, T, kVector>::write_gradient(problem, pair, group, coefficients.x, coefficients.y);
  }
}

// factor * upstream * grad in grad's dtype; one upstream for all (stride 0), or one for each pair.
template <class X, bool kVector>
__global__ void __launch_bounds__(kGroupThreads) rescaled(X* to, const X* from, const float* __restrict__ upstream, int64_t stride,
                                                          float factor, int64_t samples, int64_t elements) {
  constexpr int kWidth = kVector ? 16 / sizeof(X) : 1;
  const int64_t per_sample = elements / kWidth, pairs = samples / 2, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < samples * per_sample; i += step) {
    const float coefficient = factor * __ldg(upstream + (stride ? i / per_sample % pairs * stride : 0));
    if constexpr (kVector) {
      union { X values[kWidth]; uint4 word; } data;
      data.word = __ldcs(reinterpret_cast<const uint4*>(from) + i);
#pragma unroll
      for (int k = 0; k < kWidth; k++) data.values[k] = narrow<X>(coefficient * widen(data.values[k]));
      reinterpret_cast<uint4*>(to)[i] = data.word;
    } else {
      to[i] = narrow<X>(coefficient * widen(from[i]));
    }
  }
}

// ---- the host's side ------------------------------------------------------------------------------------------------

struct Device {
  int major = 0, cluster = 0, block_groups = 0;  // the largest cluster, the most groups in one block
  std::atomic<int> processors = 0;               // of them; 0: not asked yet
  std::atomic<unsigned*> tickets = nullptr;      // the device's address of them; null: not asked yet
  std::atomic<unsigned long long> owners[kTickets] = {};  // of the tickets: the stream's id + 1
};

Device& device_of(int index) {
  static Device devices[kMaxDevices];  // two threads that fill one in write the same values, `processors` last
  STD_TORCH_CHECK(index >= 0 && index < kMaxDevices, "seppo_fast: device index ", index);
  Device& device = devices[index];
  if (device.processors == 0) {
    int processors = 0, bytes = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    device.cluster = device.major < 9 ? 1 : device.major <= 10 ? kMaxCluster : 8;
    int groups = kMaxBlockGroups;
    while (groups > 1 && groups * kGroupBytes + (int)sizeof(Shared) > bytes) groups /= 2;
    device.block_groups = groups;
    device.processors = processors;
  }
  return device;
}

struct Guard {
  CUDAGuardHandle handle = nullptr;
  explicit Guard(int device) { TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &handle)); }
  ~Guard() { aoti_torch_delete_cuda_guard(handle); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
};

cudaStream_t stream_of(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

seppo::Place gpu(int index) { return {aoti_torch_device_type_cuda(), index}; }

bool aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

struct Launch {
  int plan;    // Plan
  int blocks;  // of a pair, a power of two; clustered only
  int threads;
};

// A fixed table by shape and chip. Blocks are small where a cluster can join them: while one block waits for its sums, others
// on the same multiprocessor load and store.
Launch choose(int64_t pairs, int64_t groups, const Device& device, int plan, int blocks) {
  // More than a grid or a 32-bit counter can hold.
  if (pairs * (groups < kMaxCluster ? kMaxCluster : groups) > INT32_MAX) return {kInPasses, 0, kGroupThreads};
  if (plan == kAuto) {
    plan = groups <= device.cluster * device.block_groups ? kClustered : kCooperative;
    blocks = 1;
    while (blocks < groups && blocks < 8 && blocks < device.cluster) blocks *= 2;
    if (blocks * device.block_groups < groups) blocks = device.cluster;
  }
  if (plan != kClustered) return {plan, 0, kGroupThreads};
  const bool power_of_two = blocks > 0 && (blocks & (blocks - 1)) == 0;
  STD_TORCH_CHECK(power_of_two && blocks <= device.cluster && groups <= blocks * device.block_groups, "seppo_fast: ",
                  blocks, " blocks do not hold ", groups, " groups of a pair on this device");
  int here = 1;
  while (here * blocks < groups) here *= 2;
  return {kClustered, blocks, here * kGroupThreads};
}

int grid_for(int64_t work, const Device& device) {
  const int64_t most = (int64_t)device.processors * 4;
  return (int)(work < most ? work : most);
}

struct Config {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Config(int64_t grid, int threads, cudaStream_t stream, int bytes = 0) {
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
  }
  Config(const Config&) = delete;
  void cluster(int blocks) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {(unsigned)blocks, 1, 1};
    config.numAttrs = 1;
  }
  void cooperative() {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), Arguments... arguments) const {
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }
};

// Once for each kernel and device: asks for large blocks and clusters, and finds out whether the largest cluster exists. The
// template parameter is the kernel and not its type, which all instantiations share.
template <auto kKernel>
bool largest_cluster_fits(int index) {
  static std::atomic<int8_t> answers[kMaxDevices];  // 0: not asked yet
  std::atomic<int8_t>& answer = answers[index];
  if (answer == 0) {
    const Device& device = device_of(index);
    const int bytes = device.block_groups * kGroupBytes;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    int clusters = 1;
    if (device.cluster > 1) {
      if (device.cluster > 8) STD_CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      Config largest(device.cluster, device.block_groups * kGroupThreads, nullptr, bytes);
      largest.cluster(device.cluster);
      if (cudaOccupancyMaxActiveClusters(&clusters, kKernel, &largest.config) != cudaSuccess) {
        cudaGetLastError();
        clusters = 0;
      }
    }
    answer = clusters > 0 ? 1 : -1;
  }
  return answer > 0;
}

// The word in which a launch counts its pairs, without a memset before it. It belongs to the stream. Two launches never use it at
// once: launches on one stream follow one another, and no later stream gets the same id. Null when every word belongs to another
// stream, and under capture: a graph may run on any stream, at the same time as launches on the stream of its capture.
unsigned* ticket_of(cudaStream_t stream, Device& device) {
  cudaStreamCaptureStatus capture;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return nullptr;
  if (device.tickets == nullptr) {
    void* address = nullptr;
    STD_CUDA_CHECK(cudaGetSymbolAddress(&address, tickets));
    device.tickets = static_cast<unsigned*>(address);
  }
  unsigned long long id;
  STD_CUDA_CHECK(cudaStreamGetId(stream, &id));
  const unsigned long long key = id + 1;
  for (int i = 0; key != 0 && i < kTickets; i++) {
    const int slot = (int)((key + i) % kTickets);
    unsigned long long owner = 0;
    if (device.owners[slot].compare_exchange_strong(owner, key) || owner == key) return device.tickets + slot;
  }
  return nullptr;
}

template <class P, class R, class T, bool kVector>
void run(Problem problem, Launch plan, int device_index, cudaStream_t stream) {
  Device& device = device_of(device_index);
  if (plan.plan == kClustered) {
    if (largest_cluster_fits<clustered<P, R, T, kVector>>(device_index) || plan.blocks <= 8) {
      std::optional<Tensor> own;
      if (problem.pairs > 1) problem.ticket = ticket_of(stream, device);
      if (problem.pairs > 1 && !problem.ticket) {
        own.emplace(seppo::new_floats(1, gpu(device_index)));
        problem.ticket = static_cast<unsigned*>(own->mutable_data_ptr());
        STD_CUDA_CHECK(cudaMemsetAsync(problem.ticket, 0, sizeof(unsigned), stream));
      }
      Config config(problem.pairs * plan.blocks, plan.threads, stream, plan.threads * kThreadBytes);
      if (plan.blocks > 1) config.cluster(plan.blocks);
      config.launch(clustered<P, R, T, kVector>, problem, __builtin_ctz(plan.blocks));
      return;
    }
    plan.plan = kCooperative;
  }
  const int64_t work = problem.pairs * problem.groups;
  // Freed on return: the allocator gives it out again only in the order of this stream.
  const Tensor workspace = seppo::new_floats(work * kSums + problem.pairs * 3 + 1, gpu(device_index));
  problem.partial = floats(workspace);
  problem.coefficients = reinterpret_cast<float2*>(problem.partial + work * kSums);  // an even offset: 8-byte aligned
  problem.arrived = reinterpret_cast<unsigned*>(problem.coefficients + problem.pairs);
  problem.ticket = problem.arrived + problem.pairs;
  if (plan.plan == kCooperative) {
    const auto kernel = cooperative<P, R, T, kVector>;
    int each = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kGroupThreads, kGroupBytes));
    const int64_t resident = (int64_t)each * device.processors;
    if (problem.groups <= resident) {
      Config config(work < resident ? work : resident, kGroupThreads, stream, kGroupBytes);
      config.cooperative();
      config.launch(kernel, problem);
      return;
    }
  }
  Config(grid_for(work, device), kGroupThreads, stream).launch(sum_pass<P, R, T, kVector>, problem);
  Config(grid_for(problem.pairs, device), kGroupThreads, stream).launch(finish_pass<std::is_same_v<R, Scored>>, problem);
  if (problem.grad) {
    Config(grid_for(work, device), kGroupThreads, stream, kGroupBytes).launch(gradient_pass<P, T, kVector>, problem);
  }
}

template <class P>
void run_for(const Problem& problem, bool vector, Launch plan, int device, cudaStream_t stream) {
  const int own = problem.policy.dtype;
  if (problem.given) {
    if (!vector) run<P, Scored, Any, false>(problem, plan, device, stream);
    else if (problem.target.dtype == own) run<P, Scored, P, true>(problem, plan, device, stream);
    else run<P, Scored, Any, true>(problem, plan, device, stream);
  } else {
    if (!vector) run<P, Any, Any, false>(problem, plan, device, stream);
    else if (problem.reference.dtype == own && problem.target.dtype == own) run<P, P, P, true>(problem, plan, device, stream);
    else run<P, Any, Any, true>(problem, plan, device, stream);
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// `reference`: predictions, shaped like model_pred, or their mean squared errors, (2B,). `sign`: (B,), in place of the flipper's.
Outputs pair_loss_planned(const Tensor& model_pred, const Tensor& reference, const Tensor& target, double beta,
                          int64_t flipper, double sft_weight, double scale, double weight, bool wants_grad, int64_t plan,
                          int64_t blocks, std::optional<Tensor> sign) {
  const int64_t samples = model_pred.size(0), total = model_pred.numel();
  STD_TORCH_CHECK(samples >= 2 && samples % 2 == 0 && total > 0, "seppo_fast::pair_loss: model_pred must be (2B, ...)");
  const int64_t pairs = samples / 2, elements = total / samples, targets = target.size(0);
  const bool scored = reference.dim() == 1;
  STD_TORCH_CHECK(reference.numel() == (scored ? samples : total) && (targets == samples || targets == pairs) &&
                      target.numel() == targets * elements,
                  "seppo_fast::pair_loss: the shapes of reference and target do not fit model_pred's");
  STD_TORCH_CHECK(!scored || dtype_code(reference) == kFloat, "seppo_fast::pair_loss: errors must be float32");
  STD_TORCH_CHECK(!sign || seppo::fits_signs(*sign, pairs), "seppo_fast::pair_loss: sign must be float32, (B,) and dense");
  const int device = model_pred.get_device_index();
  STD_TORCH_CHECK(reference.is_cuda() && target.is_cuda() && reference.get_device_index() == device &&
                      target.get_device_index() == device &&
                      (!sign || (sign->is_cuda() && sign->get_device_index() == device)),
                  "seppo_fast::pair_loss: all tensors must be on one device");
  const Guard guard(device);
  const seppo::Place here = gpu(device);
  Tensor loss = seppo::new_float(here), stats = seppo::new_floats(7 * pairs + 2, here),
         grad = wants_grad ? seppo::new_like(model_pred, here) : seppo::new_empty(model_pred, here);

  const auto input = [&](const Tensor& x, int64_t rows) {
    return Input{static_cast<const char*>(x.const_data_ptr()), rows == samples ? pairs * elements : 0, dtype_code(x)};
  };
  Problem problem = {};
  problem.policy = input(model_pred, samples);
  if (scored) problem.given = static_cast<const float*>(reference.const_data_ptr());
  else problem.reference = input(reference, samples);
  if (sign) problem.signs = static_cast<const float*>(sign->const_data_ptr());
  problem.target = input(target, targets);
  problem.grad = wants_grad ? static_cast<char*>(grad.mutable_data_ptr()) : nullptr;
  problem.pairs = pairs;
  problem.elements = elements;
  problem.groups = (elements + kGroup - 1) / kGroup;
  problem.weight = weight;
  problem.beta = (float)beta;
  problem.sft_weight = (float)sft_weight;
  problem.scale = (float)scale;
  problem.flipper = (int)flipper;
  problem.loss = floats(loss), problem.stats = floats(stats);

  // 8 elements are 16 bytes of a half-precision policy, 4 of fp32: samples that divide keep every access aligned.
  const bool vector = elements % (problem.policy.dtype == kFloat ? 4 : 8) == 0 && aligned(model_pred) &&
                      (scored || aligned(reference)) && aligned(target) && aligned(grad);
  const Launch chosen = choose(pairs, problem.groups, device_of(device), (int)plan, (int)blocks);
  const cudaStream_t stream = stream_of(device);
  if (problem.policy.dtype == kFloat) run_for<float>(problem, vector, chosen, device, stream);
  else if (problem.policy.dtype == kHalf) run_for<__half>(problem, vector, chosen, device, stream);
  else run_for<__nv_bfloat16>(problem, vector, chosen, device, stream);
  return {loss, stats, grad};
}

Outputs pair_loss(const Tensor& model_pred, const Tensor& reference, const Tensor& target, double beta, int64_t flipper,
                  double sft_weight, double scale, double weight, bool wants_grad, std::optional<Tensor> sign) {
  return pair_loss_planned(model_pred, reference, target, beta, flipper, sft_weight, scale, weight, wants_grad, kAuto, 0, sign);
}

template <class X>
void run_rescale(const Tensor& out, const Tensor& grad, const Tensor& upstream, double factor, int device) {
  const int64_t samples = grad.size(0), elements = grad.numel() / samples;
  const bool vector = elements % (16 / (int64_t)sizeof(X)) == 0 && aligned(grad) && aligned(out);
  const int64_t work = (samples * elements / (vector ? 16 / (int64_t)sizeof(X) : 1) + kGroupThreads - 1) / kGroupThreads;
  const int64_t most = (int64_t)device_of(device).processors * 32;
  Config(work < most ? work : most, kGroupThreads, stream_of(device))
      .launch(vector ? rescaled<X, true> : rescaled<X, false>, static_cast<X*>(out.mutable_data_ptr()),
              static_cast<const X*>(grad.const_data_ptr()), static_cast<const float*>(upstream.const_data_ptr()),
              upstream.dim() ? upstream.stride(0) : (int64_t)0, (float)factor, samples, elements);
}

// `out` may be grad.
void rescale_into(const Tensor& out, const Tensor& grad, const Tensor& upstream, double factor) {
  const int device = grad.get_device_index(), dtype = dtype_code(grad);
  STD_TORCH_CHECK(upstream.is_cuda() && upstream.get_device_index() == device && dtype_code(upstream) == kFloat &&
                      (upstream.dim() == 0 || 2 * upstream.numel() == grad.size(0)),
                  "seppo_fast::rescale: upstream must be fp32, () or (B,), on grad's device");
  const Guard guard(device);
  if (dtype == kFloat) run_rescale<float>(out, grad, upstream, factor, device);
  else if (dtype == kHalf) run_rescale<__half>(out, grad, upstream, factor, device);
  else run_rescale<__nv_bfloat16>(out, grad, upstream, factor, device);
}

Tensor rescale(const Tensor& grad, const Tensor& upstream, double factor) {
  Tensor out = seppo::new_like(grad, gpu(grad.get_device_index()));
  rescale_into(out, grad, upstream, factor);
  return out;
}

void rescale_in_place(const Tensor& grad, const Tensor& upstream, double factor) { rescale_into(grad, grad, upstream, factor); }

}  // namespace

extern "C" int seppo_fast_abi() { return SEPPO_ABI; }

// The same op with a launch plan that the caller chooses, for tests (no plan may change a bit) and measurements.
STABLE_TORCH_LIBRARY_FRAGMENT(seppo_fast, m) {
  m.def(
      "pair_loss_planned(Tensor model_pred, Tensor reference, Tensor target, float beta, int flipper, float sft_weight, "
      "float scale, float weight, bool wants_grad, int plan, int blocks, Tensor? sign=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seppo_fast, CUDA, m) {
  m.impl("pair_loss", TORCH_BOX(&pair_loss));
  m.impl("pair_loss_planned", TORCH_BOX(&pair_loss_planned));
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("rescale_", TORCH_BOX(&rescale_in_place));
}
