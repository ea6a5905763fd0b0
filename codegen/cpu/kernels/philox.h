// Counter-based noise: a function of (seed, position, vocabulary index) and of nothing else.
#pragma once
#include "vec.h"

namespace llm42 {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for 16 counters
// (first + lane, 0, low half of high, high half of high) under one 64-bit key; word[i][lane] is output
// word i of that counter.
inline void philox16(uint64_t key, uint32_t first, uint64_t high, uint32_t (*word)[16]) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (int i = 0; i < 16; i++)
    c0[i] = first + uint32_t(i), c1[i] = 0, c2[i] = uint32_t(high), c3[i] = uint32_t(high >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < 16; i++) {
      const uint64_t a = uint64_t(0xD2511F53u) * c0[i], b = uint64_t(0xCD9E8D57u) * c2[i];
      c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
      c1[i] = uint32_t(b);
      c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
      c3[i] = uint32_t(a);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  std::memcpy(word[0], c0, sizeof c0);
  std::memcpy(word[1], c1, sizeof c1);
  std::memcpy(word[2], c2, sizeof c2);
  std::memcpy(word[3], c3, sizeof c3);
}

inline constexpr int kNoiseBlock = 64;

// Gumbel noise of the 64 vocabulary entries 64 * block + 16 * i + lane: -log(-log(1 - u)) with
// u = (word + 1/2) / 2^32 from word i of Philox counter (16 * block + lane, position) under key seed.
inline void gumbel64(int64_t seed, int64_t position, int64_t block, float* out) {
  uint32_t word[4][16];
  philox16(uint64_t(seed), uint32_t(block * 16), uint64_t(position), word);
  for (int i = 0; i < 4; i++) {
    const V16 u = fma(from_uint32(word[i]), V16::set1(0x1p-32f), V16::set1(0x1p-33f));
    const V16 exponential = neg_log1m(min(V16::set1(1.f - 0x1p-24f), u));
    (V16::zero() - log(exponential)).store(out + 16 * i);
  }
}

}  // namespace llm42
