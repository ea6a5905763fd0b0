// AMX: sixteen rows of sixteen words a tile. Compiled for its own instructions whatever the library is compiled
// for, and used where the CPU and the operating system have them.
#pragma once
#include <cstdint>

#if defined(__linux__) && defined(__AVX512BF16__) && !defined(LLM42_GENERIC_VEC) && \
    (__GNUC__ >= 11 || __clang_major__ >= 12)
#define LLM42_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define LLM42_AMX 0
#endif

namespace llm42::amx {

inline constexpr int kRows = 16, kWords = 16;

#if LLM42_AMX
#define LLM42_AMX_CODE [[gnu::target("amx-tile,amx-bf16")]]

// Asks the system for the tiles' registers once.
inline bool available() {
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return found;
}

// Compilers do not know what the instructions of tiles read: what stands at `p`, and everywhere else, is in memory
// from here on.
inline void written(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// All tiles whole, but the factors, 6 and 7: `words` words of a row of x, so many rows of weights.
LLM42_AMX_CODE inline void configure(int words = kWords) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = kRows;
  config.bytes[6] = uint16_t(4 * words);
  config.rows[7] = uint8_t(words);
  written(&config);
  _tile_loadconfig(&config);
}

LLM42_AMX_CODE inline void release() { _tile_release(); }
#else
inline bool available() { return false; }
inline void configure(int = kWords) {}
inline void release() {}
#endif

}  // namespace llm42::amx
