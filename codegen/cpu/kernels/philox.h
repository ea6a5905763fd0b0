// Counter-based noise: a function of (seed, position, vocabulary index) and of nothing else.
#pragma once
#include <algorithm>

#include "vec/math.h"

namespace llm42 {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for 16 counters
// (first + lane, 0, low half of high, high half of high) under one 64-bit key; word[i][lane] is output
// word i of that counter.
inline void philox16(uint64_t key, uint32_t first, uint64_t high, uint32_t (*word)[16]) {
  for (int lane = 0; lane < 16; lane += 8) {
    W8 c0 = W8::ascending(first + uint32_t(lane)), c1 = W8::set1(0);
    W8 c2 = W8::set1(uint32_t(high)), c3 = W8::set1(uint32_t(high >> 32));
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++) {
      W8 a_high, a_low, b_high, b_low;
      multiply(c0, W8::set1(0xD2511F53u), a_high, a_low);
      multiply(c2, W8::set1(0xCD9E8D57u), b_high, b_low);
      c0 = b_high ^ c1 ^ W8::set1(k0), c1 = b_low;
      c2 = a_high ^ c3 ^ W8::set1(k1), c3 = a_low;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    c0.store(word[0] + lane);
    c1.store(word[1] + lane);
    c2.store(word[2] + lane);
    c3.store(word[3] + lane);
  }
}

inline constexpr int kNoiseBlock = 64;

// The random words of the 64 vocabulary entries from 64 * block on: entry 16 * i + lane takes word i of Philox
// counter (16 * block + lane, position) under key seed.
inline void noise_words(int64_t seed, int64_t position, int64_t block, uint32_t (*word)[16]) {
  philox16(uint64_t(seed), uint32_t(block * 16), uint64_t(position), word);
}

// Their Gumbel noise, -log(-log(1 - u)) with u = (word + 1/2) / 2^32.
inline void gumbel64(const uint32_t (*word)[16], float* out) {
  for (int i = 0; i < 4; i++) {
    const V16 u = fma(from_uint32(word[i]), V16::set1(0x1p-32f), V16::set1(0x1p-33f));
    neg_log1m(min(V16::set1(1.f - 0x1p-24f), u)).store(out + 16 * i);
  }
  for (int i = 0; i < 64; i += 16) (V16::zero() - log(V16::load(out + i))).store(out + i);
}

// No entry of the block has more noise than this: -log(-log(1 - u)) <= -log(u), and the least word has a
// bit set at or below its leading zeros.
inline float gumbel64_bound(const uint32_t (*word)[16]) {
  uint32_t low[16], least = ~0u;
  for (int lane = 0; lane < 16; lane++)
    low[lane] = std::min(std::min(word[0][lane], word[1][lane]), std::min(word[2][lane], word[3][lane]));
  for (int lane = 0; lane < 16; lane++) least = std::min(least, low[lane]);
  return 0.6932f * float(__builtin_clz(least | 1u) + 2) + 1e-3f;
}

}  // namespace llm42
