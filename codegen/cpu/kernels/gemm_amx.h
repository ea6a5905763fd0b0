// A tile of products in blocks, by AMX: 16 or 32 rows of x times a panel.
#pragma once
#include "gemm_blocks.h"

namespace llm42::gemm {

#if LLM42_AMX

// For the calling thread, while it computes.
struct AmxSession {
  AmxSession() { amx::configure(); }
  ~AmxSession() { amx::release(); }
};

template <bool kNear>
inline void fetch_block(Prefetch& fetch) {
  const int64_t bytes = kPairsPerBlock * fetch.step;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(fetch.next + at, 0, kNear ? 3 : 2);
  fetch.next += bytes;
}

// Tiles 0 to 2 are sums of the first sixteen rows, 3 to 5 of the next; 6 is of x, 7 of weights. Rows beyond those
// that x has are computed from whatever stands there, and never read.
template <bool kTwo, bool kNear>
LLM42_AMX_CODE inline void amx_tile(Rows<AmxBlocks> x, const bf16x2* w, int64_t blocks, float* c, bool resume,
                                    Prefetch fetch) {
  constexpr int kStride = kPanel * 4, kStep = kPairsPerBlock * kPanel;
  const int64_t stride = x.stride * 4;
  float* below = c + amx::kRows * kPanel;
  amx::written(c);
  if (resume) {
    _tile_loadd(0, c, kStride);
    _tile_loadd(1, c + 16, kStride);
    _tile_loadd(2, c + 32, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }
  if (kTwo && resume) {
    _tile_loadd(3, below, kStride);
    _tile_loadd(4, below + 16, kStride);
    _tile_loadd(5, below + 32, kStride);
  } else if (kTwo) {
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t i = 0; i < blocks; i++, w += kStep) {
    const bf16x2 *first = x.x + i * kPairsPerBlock, *second = first + amx::kRows * x.stride;
    fetch_block<kNear>(fetch);
    _tile_loadd(6, first, stride);
    _tile_loadd(7, w, kStride);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kTwo) {  // each factor that is loaded serves twice in a row where it can
      _tile_loadd(6, second, stride);
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(7, w + 16, kStride);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, first, stride);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, w + 32, kStride);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(6, second, stride);
      _tile_dpbf16ps(5, 6, 7);
    } else {
      _tile_loadd(7, w + 16, kStride);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, w + 32, kStride);
      _tile_dpbf16ps(2, 6, 7);
    }
  }
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + 16, kStride);
  _tile_stored(2, c + 32, kStride);
  if (kTwo) {
    _tile_stored(3, below, kStride);
    _tile_stored(4, below + 16, kStride);
    _tile_stored(5, below + 32, kStride);
  }
}

template <bool kNear>
inline void tile_rows(const AmxBlocks&, int64_t rows, Rows<AmxBlocks> x, const bf16x2* w, int64_t count, float* c,
                      bool resume, Prefetch fetch) {
  const auto run = [&](int64_t blocks) {
    if (rows > amx::kRows)
      amx_tile<true, kNear>(x, w, blocks, c, resume, fetch);
    else
      amx_tile<false, kNear>(x, w, blocks, c, resume, fetch);
  };
  const int64_t whole = count / kPairsPerBlock, rest = count % kPairsPerBlock;
  if (whole) run(whole);
  if (!rest) return;
  // The last block of a depth: fewer words of x, as many rows of weights.
  amx::configure(int(rest));
  x.x += whole * kPairsPerBlock, w += whole * kPairsPerBlock * kPanel, resume |= whole > 0, fetch.step = 0;
  run(1);
  amx::configure();
}

#endif

}  // namespace llm42::gemm
