// NEON: every 64-bit Arm.
#include "scalar.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace lora {
namespace neon {

#include "neon.inl"
// Of these vectors.
#include "few_rows.inl"
// Of both.
#include "coded.inl"
#include "gating.inl"
#include "low_rank.inl"

}  // namespace neon

extern const Kernels kNeon = {
    neon::kTile,    neon::kRows,  neon::W,      neon::kFewColumns, false,
    neon::load_any, neon::shrink, neon::outer,  neon::expand_any,  neon::multiply_widened,
    neon::combine,  neon::kTerms, neon::decode, neon::spread,      nullptr,
    neon::gate};

}  // namespace lora
#endif
