// The matrix product. Every output element is one chain acc = fma(x[k], w[k], acc), k ascending from acc = 0;
// of bf16, with zeros for denormals and in pairs of k, or in blocks of two chains (gemm_blocks.h). Vector lanes are
// different columns, and a chain or a sum of blocks that is interrupted is stored and taken up again exactly. So
// the blocking below is free to follow m, n, k, the caches and the number of threads without changing a bit.
#include "gemm.h"

#include "gemm_amx.h"
#include "gemm_pack.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace llm42::gemm {

namespace {

constexpr int64_t kBlockBytes = 24 << 10;      // weights of one panel and one block of k: stay in L1,
constexpr int64_t kNearBlockBytes = 12 << 10;  // or these together with the block that follows
constexpr int64_t kMaxRows = 256;              // rows whose partial sums are kept while a panel is read once
constexpr int64_t kMacsPerThread = 1 << 15;    // below this, waking a thread costs more than it saves
constexpr int64_t kRowsPerThread = 64;         // from here on, a thread's rows are its own
constexpr int64_t kChunkElements = 1 << 24;    // of x, converted at a time

struct KeptX;
struct Partials;
struct DenseBlock;
struct Merged;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a thread needs while it computes.
template <class P>
struct Session {};
#if LLM42_AMX
template <>
struct Session<AmxBlocks> : AmxSession {};
#endif

// Length of the blocks of `depth` Weights: as few as fit `bytes`, of about equal size.
template <class P>
int64_t block_length(int64_t depth, int64_t bytes) {
  const int64_t most = bytes / int64_t(kPanel * sizeof(typename P::Weight));
  return depth <= most ? depth : round_up(ceil_div(depth, ceil_div(depth, most)), P::kBlock);
}

template <class P>
struct Job {
  using T = typename P::Element;
  using Weight = typename P::Weight;
  static constexpr int kDepth = P::kDepth;
  const Problem& p;
  const int64_t depth = ceil_div(p.k, kDepth);  // Weights in a column
  int64_t row0 = 0;                             // the first row of x
  Rows<P> x{};                                  // [rows, depth]
  Session<P> session{};

  // For rows m0..m1. x is used in place if it is fp32, and else kept in memory of this thread: what another
  // core wrote would cost more to fetch than x to convert again.
  Job(const Problem& p_, int64_t m0, int64_t m1) : p(p_), row0(m0) {
    using X = typename P::X;
    const T* from = static_cast<const T*>(p.x) + m0 * p.x_stride;
    if constexpr (std::is_same_v<T, X>) {
      x = {from, p.x_stride};
    } else {
      const int64_t stride = P::kept(depth);
      X* kept = reinterpret_cast<X*>(scratch<KeptX>(round_up(m1 - m0, P::kTile) * stride));
      for (int64_t m = 0; m < m1 - m0; m++) P::keep(from + m * p.x_stride, p.k, kept + m * stride);
      x = {kept, stride};
    }
  }

  const Weight* panel_at(int64_t panel) const { return static_cast<const Weight*>(p.packed) + panel * depth * kPanel; }

  // Weights [count, kPanel] of one panel from `first` on.
  const Weight* block(int64_t panel, int64_t first, int64_t count) const {
    if (p.packed) return panel_at(panel) + first * kPanel;
    auto* out = reinterpret_cast<Weight*>(scratch<DenseBlock>(kBlockBytes / int64_t(sizeof(float))));
    const int64_t n0 = panel * kPanel, k0 = first * kDepth, kc = count * kDepth;
    const T* w = static_cast<const T*>(p.dense) + n0 * p.stride_n + k0 * p.stride_k;
    const int64_t ahead = k0 + kc < p.k ? kc * p.stride_k : kPanel * p.stride_n - k0 * p.stride_k;
    pack_panel<T>({w, p.stride_n, p.stride_k, p.n - n0, p.k - k0}, count, ahead, out);
    return out;
  }

  // Rows m0..m1 of x times one panel -> c: [m1 - m0, kPanel]. The packed weights that are read after each
  // block are fetched meanwhile, evenly spread over its tiles; after this panel comes panel `next`.
  void product(int64_t panel, int64_t next, int64_t m0, int64_t m1, float* c) const {
    const FloatMode<P::kFlush> mode;
    m1 - m0 > P::kTile ? product<true>(panel, next, m0, m1, c) : product<false>(panel, next, m0, m1, c);
  }

  template <bool kNear>
  void product(int64_t panel, int64_t next, int64_t m0, int64_t m1, float* c) const {
    if (p.k == 0) std::fill(c, c + (m1 - m0) * kPanel, 0.f);
    const int64_t tiles = ceil_div(m1 - m0, P::kTile);
    const int64_t length = block_length<P>(depth, kNear ? kNearBlockBytes : kBlockBytes);
    for (int64_t first = 0; first < depth; first += length) {
      const int64_t count = std::min(length, depth - first);
      const Weight* w = block(panel, first, count);
      const Weight* follow = !p.packed ? w : first + count < depth ? w + count * kPanel : panel_at(next);
      const int64_t share = p.packed ? count * kPanel / tiles : 0;  // weights for each tile to fetch
      const int64_t step = share * int64_t(sizeof(Weight)) / count / P::passes(int(ceil_div(m1 - m0, tiles)));
      for (int64_t i = 0; i < tiles; i++) {
        const auto bound = [&](int64_t i) { return std::min(m1, m0 + round_up((m1 - m0) * i / tiles, P::kWhole)); };
        const int64_t m = bound(i), end = bound(i + 1);
        const Rows<P> rows{x.x + (m - row0) * x.stride + first * P::kSteps, x.stride};
        tile_rows<kNear>(P{}, end - m, rows, w, count, c + (m - m0) * kPanel, first > 0,
                         {reinterpret_cast<const char*>(follow + i * share), step});
      }
    }
  }

  void store_panel(int64_t panel, int64_t m0, int64_t m1, const float* c) const {
    const T* bias = static_cast<const T*>(p.bias);
    const T* residual = static_cast<const T*>(p.residual);
    const int64_t n0 = panel * kPanel;
    for (int64_t n = n0; n < std::min(n0 + kPanel, p.n); n += 16) {
      const int64_t left = p.n - n;
      const V16 b = bias ? load_some(bias + n, left) : V16::zero();
      for (int64_t m = m0; m < m1; m++) {
        V16 y = V16::load(c + (m - m0) * kPanel + (n - n0));
        if (bias) y = y + b;
        if (residual) y = load_some(residual + m * p.residual_stride + n, left) + round_to<T>(y);
        store_some(y, static_cast<T*>(p.out) + m * p.n + n, left);
      }
    }
  }

  void store_silu_mul(int64_t panel, int64_t m0, int64_t m1, const float* gate, const float* up) const {
    for (int64_t m = m0; m < m1; m++)
      for (int64_t n = 0; n < kPanel; n += 16) {
        const int64_t i = (m - m0) * kPanel + n;
        const V16 y = silu_mul<T>(round_to<T>(V16::load(gate + i)), round_to<T>(V16::load(up + i)));
        store(y, static_cast<T*>(p.out) + m * p.n + panel * kPanel + n);
      }
  }
};

// Splits (blocks of rows) x (panels) evenly over the threads: whole blocks of rows for each where there are
// enough rows, since then no core reads what another one wrote.
template <class P>
struct Grid {
  int64_t m, panels, row_blocks, block_rows;
  int threads;

  Grid(int64_t m_, int64_t panels_, int64_t macs, int max_threads) : m(m_), panels(panels_) {
    threads = int(std::clamp<int64_t>(macs / kMacsPerThread, 1, max_threads));
    row_blocks = ceil_div(m, kMaxRows);
    if (m >= kRowsPerThread * threads) row_blocks = ceil_div(row_blocks, threads) * threads;
    while (row_blocks * panels < 4 * threads && ceil_div(m, row_blocks) > 4 * P::kTile) row_blocks *= 2;
    block_rows = round_up(ceil_div(m, row_blocks), P::kTile);
    row_blocks = ceil_div(m, block_rows);
    threads = int(std::min<int64_t>(threads, row_blocks * panels));
  }

  // body(job, panel, next panel, m0, m1), with a Job of each thread's rows
  template <class F>
  void run(const Problem& p, F body) const {
    parallel(threads, [&](int thread, int team) {
      const int64_t items = row_blocks * panels, first = items * thread / team, end = items * (thread + 1) / team;
      const Job<P> job(p, first / panels * block_rows, std::min(m, ceil_div(end, panels) * block_rows));
      for (int64_t i = first; i < end; i++) {
        const int64_t m0 = i / panels * block_rows;
        body(job, i % panels, std::min(i + 1, end - 1) % panels, m0, std::min(m, m0 + block_rows));
      }
    });
  }
};

template <class P>
void run_linear(const Problem& p, int threads) {
  const Grid<P> grid(p.m, panel_count(p.n), p.m * p.n * p.k, threads);
  grid.run(p, [&](const Job<P>& job, int64_t panel, int64_t next, int64_t m0, int64_t m1) {
    float* c = scratch<Partials>(grid.block_rows * kPanel);
    job.product(panel, next, m0, m1, c);
    job.store_panel(panel, m0, m1, c);
  });
}

// n is a multiple of kPanel: gate and up of the same columns are panels, and never leave the cache.
template <class P>
void run_silu_mul(const Problem& p, int threads) {
  const int64_t panels = p.n / kPanel;
  const Grid<P> grid(p.m, panels, 2 * p.m * p.n * p.k, threads);
  grid.run(p, [&](const Job<P>& job, int64_t panel, int64_t next, int64_t m0, int64_t m1) {
    float* gate = scratch<Partials>(2 * grid.block_rows * kPanel);
    float* up = gate + grid.block_rows * kPanel;
    job.product(panel, panel + panels, m0, m1, gate);
    job.product(panel + panels, next, m0, m1, up);
    job.store_silu_mul(panel, m0, m1, gate, up);
  });
}

// Any n: the merged product first.
template <class P>
void run_silu_mul_in_two(const Problem& p, int threads) {
  using T = typename P::Element;
  T* merged = reinterpret_cast<T*>(scratch<Merged>(2 * p.m * p.n));
  Problem first = p;
  first.n = 2 * p.n;
  first.out = merged;
  run_linear<P>(first, threads);
  parallel_rows(p.m, p.m * p.n, 1 << 12, threads, [&](int64_t m) {
    const T* gate = merged + m * 2 * p.n;
    T* out = static_cast<T*>(p.out) + m * p.n;
    for (int64_t n = 0; n < p.n; n += 16)
      store_some(silu_mul<T>(load_some(gate + n, p.n - n), load_some(gate + p.n + n, p.n - n)), out + n, p.n - n);
  });
}

// run(part) for parts of the rows that bound the memory for x.
template <class P, class F>
void in_chunks(const Problem& p, F run) {
  using T = typename P::Element;
  const int64_t rows = std::max(kMaxRows, kChunkElements / std::max<int64_t>(p.k, 1) / kMaxRows * kMaxRows);
  for (int64_t m = 0; m < p.m; m += rows) {
    Problem part = p;
    part.m = std::min(rows, p.m - m);
    part.x = static_cast<const T*>(p.x) + m * p.x_stride;
    part.out = static_cast<T*>(p.out) + m * p.n;
    if (p.residual) part.residual = static_cast<const T*>(p.residual) + m * p.residual_stride;
    run(part);
  }
}

// f(P{}) with what computes the problem's order.
template <class F>
void with_product(const Problem& p, F f) {
  if (p.order == Order::chain) return with_element(p.dtype, [&]<class T>(T) { f(Chain<T>{}); });
#if LLM42_AMX
  if (amx::available()) return f(AmxBlocks{});
#endif
  f(Blocks{});
}

}  // namespace

int64_t panel_width() { return kPanel; }
int64_t panel_count(int64_t n) { return ceil_div(n, kPanel); }

void pack(Dtype dtype, const void* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, void* packed,
          int threads) {
  with_element(dtype, [&]<class T>(T) {
    const int64_t depth = ceil_div(k, Chain<T>::kDepth);
    parallel_rows(panel_count(n), n * k, 1 << 14, threads, [&](int64_t panel) {
      const int64_t n0 = panel * kPanel;
      const T* w = static_cast<const T*>(weight) + n0 * stride_n;
      auto* out = static_cast<typename Chain<T>::Weight*>(packed) + n0 * depth;
      pack_panel<T>({w, stride_n, stride_k, n - n0, k}, depth, 64, out);
    });
  });
}

void unpack(Dtype dtype, const void* packed, int64_t n, int64_t k, void* weight, int threads) {
  with_element(dtype, [&]<class T>(T) {
    const int64_t depth = ceil_div(k, Chain<T>::kDepth);
    parallel_rows(n, n * k, 1 << 14, threads, [&](int64_t row) {
      const int column = int(row % kPanel);
      const auto* panel = static_cast<const typename Chain<T>::Weight*>(packed) + (row - column) * depth;
      unpack_column<T>(panel, column, k, static_cast<T*>(weight) + row * k);
    });
  });
}

void linear(const Problem& p, int threads) {
  if (p.n == 0) return;
  with_product(p, [&]<class P>(P) {
    in_chunks<P>(p, [&](const Problem& part) { run_linear<P>(part, threads); });
  });
}

void linear_silu_mul(const Problem& p, int threads) {
  if (p.n == 0) return;
  with_product(p, [&]<class P>(P) {
    in_chunks<P>(p, [&](const Problem& part) {
      p.n % kPanel == 0 ? run_silu_mul<P>(part, threads) : run_silu_mul_in_two<P>(part, threads);
    });
  });
}

}  // namespace llm42::gemm
