// seppo_fast::pair_loss on the CPU. Stable ABI: one binary for every Python and every torch >= 2.10.
//
// A pair's sums decide the coefficient of its gradient, so every element is needed twice. It is still one pass over memory,
// because a pair (0.4 MB in fp32 for SD-1.5 latents) is in the core's L2 when its gradient is written.
// The sums are added in order from pieces of kPiece elements, whichever thread computes a piece. So the number of threads
// changes no bit of the result.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "pair_loss.h"
#include "tensors.h"

namespace {

using seppo::dtype_code, seppo::floats, seppo::kBFloat, seppo::kFloat, seppo::kHalf, seppo::Tensor;

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Scored {};  // in place of the reference's dtype: only its errors are known
struct Sums { double difference, model, reference; };
// What a thread will read next, to prefetch: each input, and the bytes of its elements; 0 for nothing.
struct Ahead {
  const char* from[3];
  int64_t bytes[3];
};
struct Kernels {
  Sums (*sums)(const void* policy, const void* reference, const void* target, int64_t count);
  void (*gradient)(void* grad, const void* policy, const void* target, int64_t count, float coefficient, bool stream,
                   const Ahead& ahead);
  void (*rescale)(void* to, const void* from, int64_t count, float factor, bool stream);
};
constexpr int kScored = kBFloat + 1;

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// One element at a time, for the ends of samples and for machines without these instructions.
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return as_float((uint32_t)x.bits << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // Inf, NaN
  // Exponent and mantissa, shifted into place, are the value times 2^-112, also for subnormals.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}

inline BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = as_bits(x);
  if (x != x) return {0x7fc0};
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline Float16 narrow(float x, Float16) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const float size = as_float(as_bits(x) & 0x7fffffff);
  if (x != x) return {(uint16_t)(sign | 0x7e00)};
  if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
  if (size < 0x1p-14f) return {(uint16_t)(sign | (as_bits(size + 0.5f) - as_bits(0.5f)))};  // the addition rounds
  const uint32_t bits = as_bits(size) - (112u << 23);
  return {(uint16_t)(sign | (bits + 0xfff + ((bits >> 13) & 1)) >> 13)};
}

inline void narrow_to(float* to, float x) { *to = x; }
template <class Half>
inline void narrow_to(Half* to, float x) { *to = narrow(x, Half{}); }

namespace baseline {
#define LANES 4
#include "cpu_kernels.h"
#undef LANES
}  // namespace baseline

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "cpu_kernels.h"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "cpu_kernels.h"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

Kernels kernels_here(int p, int r, int t) {
#ifdef __x86_64__
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool medium = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
  if (wide) return avx512::kernels_for(p, r, t);
  if (medium) return avx2::kernels_for(p, r, t);
#endif
  return baseline::kernels_for(p, r, t);
}

constexpr int64_t kPiece = 16384;          // elements of a sample that are summed as one piece
constexpr int64_t kShare = 768 << 10;      // bytes a core may keep between sums and gradient: more than half of a small L2
constexpr int64_t kGrain = 8192;           // the fewest elements for which another thread is worth its start
constexpr int64_t kStreamFrom = 4 << 20;   // bytes of traffic from which on the gradient bypasses the caches

// Streaming stores are not ordered: each thread waits for its own before it reports that it is done.
inline void fence(bool streamed) {
#ifdef __x86_64__
  if (streamed) _mm_sfence();
#endif
}

struct View {  // dense samples, one after another
  const char* data;
  int64_t samples, bytes;  // bytes of an element
  const void* at(int64_t sample, int64_t elements, int64_t offset) const {
    return data + ((sample % samples) * elements + offset) * bytes;
  }
};

struct Problem {
  View policy, reference, target;  // the reference has no bytes where only its errors are known
  const float* given;              // these errors (2 * pairs,), or null
  const float* signs;              // (pairs,), or null where the flipper decides
  Kernels kernels;
  int64_t pairs, elements, pieces;
  float beta, sft_weight, scale;
  int flipper;
  bool stream;
  float *losses, *model_mse, *ref_mse, *sign, *logits;
  char* grad;  // null: not wanted

  int64_t length(int64_t piece) const { return piece + 1 < pieces ? kPiece : elements - piece * kPiece; }

  Sums piece_sums(int64_t sample, int64_t piece) const {
    const int64_t offset = piece * kPiece;
    return kernels.sums(policy.at(sample, elements, offset), reference.at(sample, elements, offset),
                        target.at(sample, elements, offset), length(piece));
  }

  // `more`: the thread goes on with the next pair. Its inputs are prefetched while this gradient is written, when the memory has
  // little to do. Half-precision pairs then take a tenth less time, fp32 pairs the same.
  void piece_gradient(int64_t sample, int64_t piece, float coefficient, bool more) const {
    const int64_t offset = piece * kPiece;
    Ahead ahead = {};
    if (more) {
      const auto next = [&](const View& view) { return (const char*)view.at(sample + 1, elements, offset); };
      ahead = {{next(policy), next(reference), next(target)}, {policy.bytes, reference.bytes, target.bytes}};
    }
    kernels.gradient(grad + (sample * elements + offset) * policy.bytes, policy.at(sample, elements, offset),
                     target.at(sample, elements, offset), length(piece), coefficient, stream, ahead);
  }

  float finish_sample(int64_t sample, const Sums& sum) const {  // returns the mean difference
    const double n = (double)elements;
    model_mse[sample] = (float)(sum.model / n);
    if (given) {
      ref_mse[sample] = given[sample];
      return seppo::excess(model_mse[sample], given[sample]);
    }
    ref_mse[sample] = (float)(sum.reference / n);
    return (float)(sum.difference / n);
  }

  seppo::PairLoss finish_pair(int64_t pair, float winner, float loser) const {
    const float decided = signs ? signs[pair] : seppo::sign_of(winner, flipper);
    const seppo::PairLoss out =
        seppo::pair_loss(winner, loser, decided, model_mse[pair], (float)elements, beta, sft_weight, scale);
    losses[pair] = out.loss;
    sign[pair] = out.sign;
    logits[pair] = out.logit;
    return out;
  }
};

void add(Sums& to, const Sums& more) {
  to.difference += more.difference;
  to.model += more.model;
  to.reference += more.reference;
}

// Many small pairs: one thread computes a pair's sums and then, at once, its gradient.
void one_thread_a_pair(const Problem& problem) {
  const int64_t grain = (kGrain + problem.elements - 1) / problem.elements;
  torch::stable::parallel_for(0, problem.pairs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; pair++) {
      float difference[2];
      for (int half = 0; half < 2; half++) {
        const int64_t sample = pair + half * problem.pairs;
        Sums sum = {};
        for (int64_t piece = 0; piece < problem.pieces; piece++) add(sum, problem.piece_sums(sample, piece));
        difference[half] = problem.finish_sample(sample, sum);
      }
      const seppo::PairLoss out = problem.finish_pair(pair, difference[0], difference[1]);
      if (!problem.grad) continue;
      // What was read last is written first: the nearest cache still holds the end of the loser.
      for (int half = 1; half >= 0; half--) {
        const float coefficient = half ? out.loser_coefficient : out.winner_coefficient;
        for (int64_t piece = problem.pieces - 1; piece >= 0; piece--) {
          problem.piece_gradient(pair + half * problem.pairs, piece, coefficient, pair + 1 < end);
        }
      }
    }
    fence(problem.stream);
  });
}

// Few or large pairs: all threads share a group of pairs piece by piece, first the sums, then the gradient.
void threads_share_pairs(const Problem& problem, int64_t group) {
  std::vector<Sums> partial(group * 2 * problem.pieces);
  std::vector<float> coefficients(group * 2);
  const int64_t grain = (kGrain + kPiece - 1) / kPiece;
  for (int64_t first = 0; first < problem.pairs; first += group) {
    const int64_t pairs = group < problem.pairs - first ? group : problem.pairs - first;
    const int64_t tasks = pairs * 2 * problem.pieces;
    const auto sample_of = [&](int64_t row) { return first + row / 2 + (row % 2) * problem.pairs; };
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        partial[task] = problem.piece_sums(sample_of(task / problem.pieces), task % problem.pieces);
      }
    });
    for (int64_t pair = 0; pair < pairs; pair++) {
      float difference[2];
      for (int half = 0; half < 2; half++) {
        Sums sum = {};
        for (int64_t piece = 0; piece < problem.pieces; piece++) {
          add(sum, partial[(2 * pair + half) * problem.pieces + piece]);
        }
        difference[half] = problem.finish_sample(first + pair + half * problem.pairs, sum);
      }
      const seppo::PairLoss out = problem.finish_pair(first + pair, difference[0], difference[1]);
      coefficients[2 * pair] = out.winner_coefficient;
      coefficients[2 * pair + 1] = out.loser_coefficient;
    }
    if (!problem.grad) continue;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = end - 1; task >= begin; task--) {
        problem.piece_gradient(sample_of(task / problem.pieces), task % problem.pieces,
                               coefficients[task / problem.pieces], false);
      }
      fence(problem.stream);
    });
  }
}

seppo::Place cpu() { return {aoti_torch_device_type_cpu(), 0}; }

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// `reference`: predictions, shaped like model_pred, or their mean squared errors, (2B,). `sign`: (B,), in place of the flipper's.
Outputs pair_loss(const Tensor& model_pred, const Tensor& reference, const Tensor& target, double beta, int64_t flipper,
                  double sft_weight, double scale, double weight, bool wants_grad, std::optional<Tensor> sign) {
  const int64_t samples = model_pred.size(0), total = model_pred.numel();
  STD_TORCH_CHECK(samples >= 2 && samples % 2 == 0 && total > 0, "seppo_fast::pair_loss: model_pred must be (2B, ...)");
  const int64_t pairs = samples / 2, elements = total / samples, targets = target.size(0);
  const bool scored = reference.dim() == 1;
  STD_TORCH_CHECK(reference.numel() == (scored ? samples : total) && (targets == samples || targets == pairs) &&
                      target.numel() == targets * elements,
                  "seppo_fast::pair_loss: the shapes of reference and target do not fit model_pred's");
  STD_TORCH_CHECK(!scored || dtype_code(reference) == kFloat, "seppo_fast::pair_loss: errors must be float32");
  STD_TORCH_CHECK(!sign || seppo::fits_signs(*sign, pairs), "seppo_fast::pair_loss: sign must be float32, (B,) and dense");
  const seppo::Place here = cpu();
  Tensor loss = seppo::new_float(here), stats = seppo::new_floats(7 * pairs + 2, here),
         grad = wants_grad ? seppo::new_like(model_pred, here) : seppo::new_empty(model_pred, here);

  const auto view = [](const Tensor& x, int64_t count) {
    return View{static_cast<const char*>(x.const_data_ptr()), count, (int64_t)x.element_size()};
  };
  Problem problem;
  problem.policy = view(model_pred, samples);
  problem.reference = scored ? View{nullptr, samples, 0} : view(reference, samples);
  problem.given = scored ? static_cast<const float*>(reference.const_data_ptr()) : nullptr;
  problem.signs = sign ? static_cast<const float*>(sign->const_data_ptr()) : nullptr;
  problem.target = view(target, targets);
  problem.kernels = kernels_here(dtype_code(model_pred), scored ? kScored : dtype_code(reference), dtype_code(target));
  problem.pairs = pairs;
  problem.elements = elements;
  problem.pieces = (elements + kPiece - 1) / kPiece;
  problem.beta = (float)beta;
  problem.sft_weight = (float)sft_weight;
  problem.scale = (float)scale;
  problem.flipper = (int)flipper;
  problem.model_mse = floats(stats);
  problem.ref_mse = problem.model_mse + samples;
  problem.sign = problem.ref_mse + samples;
  problem.logits = problem.sign + pairs;
  problem.losses = problem.logits + pairs;
  problem.grad = wants_grad ? static_cast<char*>(grad.mutable_data_ptr()) : nullptr;

  const int64_t per_element = problem.policy.bytes + problem.reference.bytes + problem.target.bytes;
  const int64_t pair_bytes = 2 * elements * per_element;
  problem.stream = total * (per_element + problem.policy.bytes) >= kStreamFrom;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || 2 * elements < kGrain || (pairs >= threads && pair_bytes <= kShare)) {
    one_thread_a_pair(problem);
  } else {
    const int64_t fitting = threads * kShare / pair_bytes;
    threads_share_pairs(problem, fitting < 1 ? 1 : fitting < pairs ? fitting : pairs);
  }

  double sum = 0;
  int64_t accurate = 0, flipped = 0;
  for (int64_t pair = 0; pair < pairs; pair++) {
    sum += (double)problem.losses[pair];
    accurate += problem.logits[pair] > 0.0f;
    flipped += problem.sign[pair] == -1.0f;
  }
  *floats(loss) = (float)(weight * sum);
  problem.losses[pairs] = (float)((double)accurate / (double)pairs);
  problem.losses[pairs + 1] = (float)((double)flipped / (double)pairs);
  return {loss, stats, grad};
}

// factor * upstream * grad in grad's dtype, the product in fp32; one upstream for all, or one for each pair. `out` may be grad.
void rescale_into(const Tensor& out, const Tensor& grad, const Tensor& upstream, double factor) {
  STD_TORCH_CHECK(dtype_code(upstream) == kFloat && upstream.numel() > 0 && grad.numel() > 0 &&
                      (upstream.dim() == 0 || 2 * upstream.numel() == grad.size(0)),
                  "seppo_fast::rescale: upstream must be fp32, () or (B,)");
  const int64_t samples = grad.size(0), elements = grad.numel() / samples, pairs = upstream.numel();
  const float* given = static_cast<const float*>(upstream.const_data_ptr());
  const int64_t stride = upstream.dim() ? upstream.stride(0) : 0;
  const int64_t bytes = (int64_t)grad.element_size();
  const Kernels kernels = kernels_here(dtype_code(grad), kFloat, kFloat);
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool stream = 2 * grad.numel() * bytes >= kStreamFrom;
  const int64_t pieces = (elements + kPiece - 1) / kPiece;
  const int64_t length = elements < kPiece ? elements : kPiece;
  torch::stable::parallel_for(0, samples * pieces, (kGrain + length - 1) / length, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t sample = task / pieces, offset = task % pieces * kPiece, at = (sample * elements + offset) * bytes;
      const int64_t count = elements - offset < kPiece ? elements - offset : kPiece;
      kernels.rescale(to + at, from + at, count, (float)factor * given[sample % pairs * stride], stream);
    }
    fence(stream);
  });
}

Tensor rescale(const Tensor& grad, const Tensor& upstream, double factor) {
  Tensor out = seppo::new_like(grad, cpu());
  rescale_into(out, grad, upstream, factor);
  return out;
}

void rescale_in_place(const Tensor& grad, const Tensor& upstream, double factor) { rescale_into(grad, grad, upstream, factor); }

}  // namespace

extern "C" int seppo_fast_abi() { return SEPPO_ABI; }

STABLE_TORCH_LIBRARY_IMPL(seppo_fast, CPU, m) {
  m.impl("pair_loss", TORCH_BOX(&pair_loss));
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("rescale_", TORCH_BOX(&rescale_in_place));
}
