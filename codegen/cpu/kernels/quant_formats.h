// Quantised weights as panels of sixteen columns: what stands in a block, and how it is read.
//
// A panel is a sequence of blocks along k, each `block` values of sixteen columns:
//
//   scales    kHalf: fp16 d[16], with a minimum fp16 m[16] behind
//             kSuper: d[16] (and m[16]), then a byte for every group and column (and those of the minima)
//             kFloat: fp32 d[16], then fp32 m[16]: of values that an fp16 does not hold
//   integers  for every 32 k: eight units of 64 bytes, unit u with k = 4u..4u+3 of column c in bytes 4c..4c+3.
//             Fewer than eight bits: unit u in the low nibbles of 64 bytes and unit u + 4 in the high ones;
//             then the bits above the nibbles, those of unit u in every byte's bit u, or bits 2 (u % 4).
#pragma once
#include "vec.h"

namespace llm42::quant {

inline constexpr int kColumns = 16;
inline constexpr int kUnit = 64;  // bytes of a unit
inline constexpr int kStep = 32;  // values of k whose integers stand together, and that share a scale of x

enum class Scales { kHalf, kSuper, kSignedSuper, kFloat };

// w = scale * (q - kOffset) + minimum; every group of kGroup values of k has a scale and a minimum.
template <int kBits_, int kOffset_, int kBlock_, int kGroup_, Scales kScales_, bool kMin_>
struct Format {
  static constexpr int kBits = kBits_, kOffset = kOffset_, kBlock = kBlock_, kGroup = kGroup_;
  static constexpr Scales kScales = kScales_;
  static constexpr bool kMin = kMin_;
  static constexpr int kGroups = kBlock / kGroup;
  static constexpr int kSteps = kBlock / kStep;
  static constexpr int kStepBytes = kStep * kColumns * kBits / 8;
  static constexpr int kOuter = (kScales == Scales::kFloat ? 4 : 2) * kColumns * (kMin ? 2 : 1);
  static constexpr bool kInner = kScales == Scales::kSuper || kScales == Scales::kSignedSuper;
  static constexpr int kHeader = kOuter + (kInner ? kGroups * kColumns * (kMin ? 2 : 1) : 0);
  static constexpr int kBytes = kHeader + kSteps * kStepBytes;

  static V16 outer(const uint8_t* block, int which) {
    if constexpr (kScales == Scales::kFloat) return V16::load(reinterpret_cast<const float*>(block) + which * kColumns);
    return V16::load(reinterpret_cast<const f16*>(block) + which * kColumns);
  }
  // The scales of a group; exact, as an inner scale has 8 bits and an outer one 11.
  static V16 scale(const uint8_t* block, int group) {
    const uint8_t* inner = block + kOuter + group * kColumns;
    if constexpr (kScales == Scales::kSuper) return outer(block, 0) * from_bytes(inner);
    if constexpr (kScales == Scales::kSignedSuper) return outer(block, 0) * from_bytes(reinterpret_cast<const int8_t*>(inner));
    return outer(block, 0);
  }
  // What is added for a group: minus the minimum of a K-quant, the minimum of the others.
  static V16 minimum(const uint8_t* block, int group) {
    if constexpr (kInner)
      return V16::zero() - outer(block, 1) * from_bytes(block + kOuter + (kGroups + group) * kColumns);
    return outer(block, 1);
  }
  static const uint8_t* step(const uint8_t* block, int step) { return block + kHeader + step * kStepBytes; }
  // Unit u of a step.
  static B64 unit(const uint8_t* step, int u) {
    if constexpr (kBits == 8) return B64::load(step + u * kUnit);
    const B64 pair = B64::load(step + u % 4 * kUnit);
    const B64 nibbles = u < 4 ? low_nibbles(pair) : high_nibbles(pair);
    if constexpr (kBits == 5) return nibbles | bits_above_nibble(B64::load(step + 4 * kUnit), u, 1);
    if constexpr (kBits == 6)
      return nibbles | bits_above_nibble(B64::load(step + (4 + u / 4) * kUnit), 2 * (u % 4), 2);
    return nibbles;
  }
  // Integer k of a step in one column.
  static int32_t integer(const uint8_t* step, int k, int column) {
    const int u = k / 4, at = 4 * column + k % 4;
    if constexpr (kBits == 8) return step[u * kUnit + at];
    int32_t q = step[u % 4 * kUnit + at] >> (u < 4 ? 0 : 4) & 15;
    if constexpr (kBits == 5) q |= (step[4 * kUnit + at] >> u & 1) << 4;
    if constexpr (kBits == 6) q |= (step[(4 + u / 4) * kUnit + at] >> 2 * (u % 4) & 3) << 4;
    return q;
  }
};

using Q8_0 = Format<8, 128, 32, 32, Scales::kHalf, false>;
using Q4_0 = Format<4, 8, 32, 32, Scales::kHalf, false>;
using Q4_1 = Format<4, 0, 32, 32, Scales::kHalf, true>;
using Q5_0 = Format<5, 16, 32, 32, Scales::kHalf, false>;
using Q5_1 = Format<5, 0, 32, 32, Scales::kHalf, true>;
using Q4_K = Format<4, 0, 256, 32, Scales::kSuper, true>;
using Q5_K = Format<5, 0, 256, 32, Scales::kSuper, true>;
using Q6_K = Format<6, 32, 256, 16, Scales::kSignedSuper, false>;
using I4_32 = Format<4, 0, 32, 32, Scales::kFloat, true>;
using I4_64 = Format<4, 0, 64, 64, Scales::kFloat, true>;
using I4_128 = Format<4, 0, 128, 128, Scales::kFloat, true>;

}  // namespace llm42::quant
