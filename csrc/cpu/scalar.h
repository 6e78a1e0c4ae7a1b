// Scalar types and constants shared by the instruction sets. Include before any target pragma:
// what is inline here must not be compiled for a newer CPU than the one it may run on.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "low_rank.h"

namespace lora {

// Columns whose mask bits are made at a time: a multiple of every tile.
constexpr int64_t kStrip = 1024;

constexpr int kRounds = 7;
constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

}  // namespace lora
