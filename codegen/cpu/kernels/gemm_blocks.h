// Products of bf16 numbers in blocks of 32 values of k (`two-chains32`): in each, one chain over the even places
// and one over the odd ones, both from zero; their sum is added to the sum of the blocks before it. That is how
// AMX computes them. Where there is none, vectors do the same steps.
#pragma once
#include "vec/amx.h"
#include "gemm_lanes.h"

namespace llm42::gemm {

inline constexpr int kPairsPerBlock = 16;

template <class X_>
struct BlocksOf {
  using Element = bf16;
  using Weight = bf16x2;
  using X = X_;
  static constexpr int kDepth = 2, kBlock = kPairsPerBlock;

  template <int Step>
  static auto weights(const bf16x2* p) {
    return link_factor<Step>(p);
  }
};

// By vectors. x is kept as fp32 numbers.
struct Blocks : BlocksOf<LinkX> {
  static constexpr int kSteps = 2, kTile = kPlain ? 1 : kLanes == 16 ? 4 : 2, kWhole = 1;
  static constexpr bool kFlush = kLinksByMode;
  static constexpr int kVecsAtOnce = 3;
  static constexpr int passes(int) { return kVecs / kVecsAtOnce; }
  static int64_t kept(int64_t depth) { return 2 * depth; }
  static void keep(const bf16* x, int64_t n, X* out) {
    widen(x, n, out);
    if (n % 2) out[n] = 0.f;
  }
};

// By AMX. x is kept as pairs, in whole blocks.
struct AmxBlocks : BlocksOf<bf16x2> {
  static constexpr int kSteps = 1, kTile = 2 * amx::kRows, kWhole = amx::kRows;
  static constexpr bool kFlush = false;  // AMX takes zero for denormals whatever the mode
  static constexpr int passes(int) { return 1; }
  static int64_t kept(int64_t depth) { return (depth + kBlock - 1) / kBlock * kBlock; }
  static void keep(const bf16* x, int64_t n, X* out) {
    for (int64_t i = 0; i < n / 2; i++) out[i] = pair_of(x[2 * i], x[2 * i + 1]);
    if (n % 2) out[n / 2] = pair_of(x[n - 1], {});
    std::fill(out + (n + 1) / 2, out + kept((n + 1) / 2), bf16x2{});
  }
};

// kR rows times kN registers of a panel from kV0 on, as `tile` in gemm_tile.h.
template <int kR, int kV0, int kN, bool kNear>
inline void tile_of_blocks(Rows<Blocks> x, const bf16x2* w, int64_t count, float* c, bool resume, Prefetch fetch) {
  constexpr int kLine = 64, kBytes = kN * kLanes * int(sizeof *w) / (kNear ? 2 : 1);
  constexpr int kLines = (kBytes + kLine - 1) / kLine;
  for (int64_t first = 0; first < count; first += kPairsPerBlock, resume = true) {
    Vec chains[2][kR][kN];
    unrolled<2 * kR * kN>([&](auto i) { chains[i / (kR * kN)][i / kN % kR][i % kN] = Vec::zero(); });
    const int64_t end = std::min(first + kPairsPerBlock, count);
#pragma GCC unroll 1
    for (int64_t i = first; i < end; i++) {
      unrolled<kLines>([&](auto line) { __builtin_prefetch(fetch.next + line * kLine, 0, kNear ? 3 : 2); });
      fetch.next += fetch.step;
      const bf16x2* row = w + i * kPanel + kV0 * kLanes;
      unrolled<2>([&](auto step) {
        unrolled<kN>([&](auto v) {
          const auto b = link_factor<step>(row + v * kLanes);
          unrolled<kR>([&](auto r) {
            Vec& chain = chains[step][r][v];
            chain = fma(link_factor(x.x[r * x.stride + 2 * i + step]), b, chain);
          });
        });
      });
    }
    unrolled<kR * kN>([&](auto i) {
      float* at = c + i / kN * kPanel + (kV0 + i % kN) * kLanes;
      const Vec sum = sum_of_chains(chains[0][i / kN][i % kN], chains[1][i / kN][i % kN]);
      sum_of_chains(resume ? Vec::load(at) : Vec::zero(), sum).store(at);
    });
  }
}

template <bool kNear, int kR = Blocks::kTile>
inline void tile_rows(const Blocks& product, int64_t rows, Rows<Blocks> x, const bf16x2* w, int64_t count, float* c,
                      bool resume, Prefetch fetch) {
  if constexpr (kR > 1) {
    if (rows < kR) return tile_rows<kNear, kR - 1>(product, rows, x, w, count, c, resume, fetch);
  }
  constexpr int kN = Blocks::kVecsAtOnce;
  unrolled<kVecs / kN>([&](auto pass) {
    const Prefetch part{fetch.next + pass * count * fetch.step, fetch.step};
    tile_of_blocks<kR, pass * kN, kN, kNear>(x, w, count, c, resume, part);
  });
}

}  // namespace llm42::gemm
