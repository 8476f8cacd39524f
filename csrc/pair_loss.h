// Loss and coefficients of a pair from its sums: Eq. 8 in the convention of App. B.2, shared by every compiled backend.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define SEPPO_HD __host__ __device__ __forceinline__
#else
#define SEPPO_HD inline
#endif

// Goes up by one with every change of the operators' arguments; seppo_fast/ops/native.py has the same number.
#define SEPPO_ABI 6

namespace seppo {

// The codes that seppo_fast/ops/fused.py passes.
constexpr int kAaf = 0, kIndicator = 1, kNone = 2;

struct PairLoss {
  float loss, sign, logit;
  float winner_coefficient, loser_coefficient;  // gradient of scale * loss = coefficient * (policy - target)
};

// The policy's MSE minus the reference's where only these are known. An infinite reference error would give a loss of 0, as of a
// pair learnt perfectly: Inf - Inf makes it NaN.
SEPPO_HD float excess(float model_mse, float ref_mse) { return model_mse - (ref_mse + (ref_mse - ref_mse)); }

// What the flipper makes of a winner's difference. The sign of a tie is -1, and that of NaN, too: NaN reaches the logit anyway,
// and from there the loss and both coefficients.
SEPPO_HD float sign_of(float winner, int flipper) {
  const bool worse = winner > 0.0f && flipper != kNone;
  return !worse ? -1.0f : flipper == kAaf ? 1.0f : 0.0f;
}

// `winner`, `loser`: the policy's MSE minus the reference's, of a sample with `elements` elements; `sign`: the flipper's, or the
// caller's; `model_mse`: the policy's MSE of the winner, of which the loss gets `sft_weight` times as much.
SEPPO_HD PairLoss pair_loss(float winner, float loser, float sign, float model_mse, float elements, float beta, float sft_weight,
                            float scale) {
  const float logit = -0.5f * beta * (winner + sign * loser);
  // exp only of a negative number: loss and sigmoid do not overflow, and keep their small values.
  const float e = expf(-fabsf(logit));
  float loss = (logit < 0.0f ? -logit : 0.0f) + log1pf(e);
  const float slope = (logit < 0.0f ? 1.0f : e) / (1.0f + e);  // -d loss / d logit = sigmoid(-logit)
  // An infinite reference error gives a loss of 0, as of a pair learnt perfectly: NaN - NaN and Inf - Inf make it NaN.
  const float coefficient = scale * (beta / elements) * slope + (logit - logit);
  float winner_coefficient = coefficient;
  if (sft_weight != 0.0f) {  // a weight of 0 changes no bit, not even of an infinite loss
    loss += sft_weight * model_mse;
    // The MSE may overflow where the errors do not: an infinite loss has no finite gradient.
    winner_coefficient += scale * (2.0f * sft_weight / elements) + (model_mse - model_mse);
  }
  return {loss, sign, logit, winner_coefficient, sign * coefficient};
}

}  // namespace seppo
