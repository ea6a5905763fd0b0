// Each row of x becomes 8-bit integers, 32 to a scale. A group's products of integers are summed exactly; the
// group's term is then one link of the element's chain:
//
//   acc = fma(scale_w * scale_x, float(sum of q_w q_x), acc),  then  acc = fma(minimum, scale_x * sum of q_x, acc)
//
// groups ascending. Lanes are columns, so the blocking and the number of threads change no bit.
#include "quant.h"

#include <utility>

#include "parallel.h"
#include "quant_formats.h"

namespace llm42::quant {

namespace {

constexpr int kRows = kPlain ? 1 : kLanes == 16 ? 8 : 3;  // a row has two sums in registers, of integers and of floats
constexpr int64_t kMaxRows = 256;            // rows of x whose integers stay in the cache
constexpr int64_t kRowsPerThread = 64;       // from here on, a thread's rows are its own
constexpr int64_t kMacsPerThread = 1 << 16;  // below this, waking a thread costs more than it saves
constexpr float kLeast = 0x1p-119f;          // a step whose largest magnitude is below counts as zeros

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The quantised rows of one tile of R rows: every array is [along k][R].
struct Tile {
  int32_t* words;     // four values of k
  float* scale;       // of a step
  float* sum;         // scale times the step's sum
  int32_t* negative;  // minus the step's sum of integers
  int32_t* halves;    // minus those of its halves: [along k][half][R]
};

struct Integers;

// Memory for all rows; a tile's share begins at its first row.
class Quantised {
 public:
  Quantised(int64_t rows, int64_t k) : k_(k), steps_(k / kStep), rows_(rows) {
    data_ = scratch<Integers>(rows * (k / 4 + 5 * steps_));
  }
  Tile tile(int64_t row) const {
    float* scale = data_ + rows_ * (k_ / 4);
    float* sum = scale + rows_ * steps_;
    int32_t* negative = reinterpret_cast<int32_t*>(sum + rows_ * steps_);
    return {reinterpret_cast<int32_t*>(data_) + row * (k_ / 4), scale + row * steps_, sum + row * steps_,
            negative + row * steps_, negative + rows_ * steps_ + 2 * row * steps_};
  }

 private:
  int64_t k_, steps_, rows_;
  float* data_;
};

// 32 values at x as integers; r of `rows` rows of step s of a tile.
template <class T>
void quantise_step(const T* x, const Tile& tile, int64_t s, int64_t r, int64_t rows) {
  float values[kStep];
  widen(x, kStep, values);
  uint32_t largest = 0;  // of the magnitudes as integers, which have their order; NaN is above infinity
  for (float value : values) largest = std::max(largest, bits_of_float(value) & 0x7fffffffu);
  const bool finite = largest < 0x7f800000u;
  const float magnitude = float_of_bits(largest);
  const float inverse = finite && magnitude >= kLeast ? 127.f / magnitude : 0.f;
  const float scale = !finite ? NAN : inverse == 0.f ? 0.f : magnitude / 127.f;
  int8_t q[kStep];
  for (int i = 0; i < kStep; i++) {  // 1.5 · 2^23: the sum's low bits are the value rounded to even
    const float moved = (finite ? values[i] : 0.f) * inverse + 12582912.f;
    q[i] = int8_t(bits_of_float(moved));
  }
  int32_t halves[2] = {0, 0};
  for (int i = 0; i < kStep; i++) halves[i / 16] -= q[i];
  for (int u = 0; u < kStep / 4; u++) std::memcpy(tile.words + (s * (kStep / 4) + u) * rows + r, q + 4 * u, 4);
  tile.scale[s * rows + r] = scale;
  tile.sum[s * rows + r] = scale * float(-(halves[0] + halves[1]));
  tile.negative[s * rows + r] = halves[0] + halves[1];
  for (int h = 0; h < 2; h++) tile.halves[(2 * s + h) * rows + r] = halves[h];
}

// R rows times one panel -> c: [R, kColumns].
template <class F, int R>
void tile_product(const uint8_t* panel, int64_t k, const Tile& x, float* c) {
  constexpr int kFold = std::min(F::kGroup, kStep);  // values of k in a sum of integers
  V16 acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) acc[r] = V16::zero();
  const int32_t* words = x.words;
  int64_t s = 0;
  for (int64_t k0 = 0; k0 < k; k0 += F::kBlock, panel += F::kBytes)
#pragma GCC unroll 1
    for (int in_block = 0; in_block < F::kSteps; in_block++, s++) {
      const uint8_t* step = F::step(panel, in_block);
#pragma GCC unroll 2
      for (int first = 0; first < kStep; first += kFold) {
        I16 sum[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const int32_t* negative = kFold == kStep ? x.negative + s * R : x.halves + (2 * s + first / 16) * R;
          sum[r] = I16::set1(F::kOffset ? negative[r] * F::kOffset : 0);
        }
#pragma GCC unroll 8
        for (int u = first / 4; u < (first + kFold) / 4; u++, words += R) {
          const B64 w = F::unit(step, u);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) sum[r] = dot4<F::kBits>(sum[r], w, words[r]);
        }
        const V16 scale = F::scale(panel, (in_block * kStep + first) / F::kGroup);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          acc[r] = fma(scale * V16::set1(x.scale[s * R + r]), to_float(sum[r]), acc[r]);
      }
      if constexpr (F::kMin) {
        const V16 minimum = F::minimum(panel, in_block * kStep / F::kGroup);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = fma(minimum, V16::set1(x.sum[s * R + r]), acc[r]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) acc[r].store(c + r * kColumns);
}

// One row of the weight.
template <class F>
void row_values(const uint8_t* panel, int64_t k, int column, float* out) {
  for (int64_t k0 = 0; k0 < k; k0 += F::kBlock, panel += F::kBytes)
    for (int group = 0; group < F::kGroups; group++) {
      float scale[kColumns], minimum[kColumns];
      F::scale(panel, group).store(scale);
      if constexpr (F::kMin) F::minimum(panel, group).store(minimum);
      for (int i = group * F::kGroup; i < (group + 1) * F::kGroup; i++) {
        const int32_t q = F::integer(F::step(panel, i / kStep), i % kStep, column) - F::kOffset;
        out[k0 + i] = scale[column] * float(q);
        if constexpr (F::kMin) out[k0 + i] += minimum[column];
      }
    }
}

using Product = void (*)(const uint8_t*, int64_t, const Tile&, float*);

struct Kernels : Layout {
  Product product[kRows];  // by rows - 1
  void (*row)(const uint8_t*, int64_t, int, float*);
};

template <class F>
constexpr Kernels kernels_of(std::string_view name) {
  return [&]<int... R>(std::integer_sequence<int, R...>) {
    return Kernels{{name, F::kBlock, F::kBytes}, {tile_product<F, R + 1>...}, row_values<F>};
  }(std::make_integer_sequence<int, kRows>{});
}

constexpr Kernels kFormats[] = {
    kernels_of<Q8_0>("q8_0"),   kernels_of<Q4_0>("q4_0"),   kernels_of<Q4_1>("q4_1"),    kernels_of<Q5_0>("q5_0"),
    kernels_of<Q5_1>("q5_1"),   kernels_of<Q4_K>("q4_k"),   kernels_of<Q5_K>("q5_k"),    kernels_of<Q6_K>("q6_k"),
    kernels_of<I4_32>("i4_32"), kernels_of<I4_64>("i4_64"), kernels_of<I4_128>("i4_128"),
};

const Kernels& kernels(const Segment& segment) { return *static_cast<const Kernels*>(segment.layout); }

// One panel of columns of the output: of which segment, and where.
struct Place {
  const Segment* segment;
  int64_t panel, column;  // in the segment; of the output
};

Place place_of(const Problem& p, int64_t panel) {
  int64_t column = 0;
  for (const Segment& segment : p.segments) {
    const int64_t count = panel_count(segment.n);
    if (panel < count) return {&segment, panel, column + panel * kColumns};
    panel -= count;
    column += segment.n;
  }
  return {};
}

void product(const Segment& segment, int64_t panel, int64_t k, const Tile& x, int64_t rows, float* c) {
  const uint8_t* weights = segment.packed + panel * (k / segment.layout->block) * segment.layout->bytes;
  kernels(segment).product[rows - 1](weights, k, x, c);
}

template <class T>
void store_rows(const Problem& p, const Place& at, int64_t m, int64_t rows, const float* c) {
  const int64_t left = at.segment->n - at.panel * kColumns, n = at.column;
  const T* residual = static_cast<const T*>(p.residual);
  const V16 bias = p.bias ? load_some(static_cast<const T*>(p.bias) + n, left) : V16::zero();
  for (int64_t r = 0; r < rows; r++) {
    V16 y = V16::load(c + r * kColumns);
    if (p.bias) y = y + bias;
    if (residual) y = load_some(residual + (m + r) * p.residual_stride + n, left) + round_to<T>(y);
    store_some(y, static_cast<T*>(p.out) + (m + r) * p.n + n, left);
  }
}

template <class T>
void run_tile(const Problem& p, int64_t panel, const Tile& x, int64_t m, int64_t rows) {
  float c[kRows * kColumns];
  const Place at = place_of(p, panel);
  product(*at.segment, at.panel, p.k, x, rows, c);
  if (!p.gated) return store_rows<T>(p, at, m, rows, c);
  float up[kRows * kColumns];
  product(p.segments[1], at.panel, p.k, x, rows, up);
  for (int64_t r = 0; r < rows; r++) {
    const V16 gate = round_to<T>(V16::load(c + r * kColumns));
    const V16 y = silu_mul<T>(gate, round_to<T>(V16::load(up + r * kColumns)));
    store_some(y, static_cast<T*>(p.out) + (m + r) * p.n + at.column, p.n - at.column);
  }
}

// Tiles tile0..end of x, in memory of this thread: what another core wrote would cost more to fetch than x to
// quantise again.
template <class T>
Quantised quantise(const Problem& p, int64_t tile0, int64_t end) {
  const int64_t first = tile0 * kRows;
  const Quantised x(std::min(p.m, end * kRows) - first, p.k);
  for (int64_t m0 = first; m0 < std::min(p.m, end * kRows); m0 += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, p.m - m0);
    for (int64_t r = 0; r < rows; r++) {
      const T* row = static_cast<const T*>(p.x) + (m0 + r) * p.x_stride;
      for (int64_t s = 0; s < p.k / kStep; s++) quantise_step(row + s * kStep, x.tile(m0 - first), s, r, rows);
    }
  }
  return x;
}

template <class T>
void run_rows(const Problem& p, int max_threads) {
  int64_t panels = 0;
  for (const Segment& segment : p.segments) panels += panel_count(segment.n);
  if (p.gated) panels /= 2;
  const int64_t macs = p.m * panels * kColumns * p.k, tiles = ceil_div(p.m, kRows);
  const int threads = int(std::clamp<int64_t>(macs / kMacsPerThread, 1, max_threads));
  int64_t row_blocks = panels >= 4 * threads ? 1 : std::min<int64_t>(tiles, 4 * threads);
  if (p.m >= kRowsPerThread * threads) row_blocks = ceil_div(row_blocks, threads) * threads;
  const auto first_tile = [&](int64_t block) { return tiles * block / row_blocks; };
  parallel(int(std::min<int64_t>(threads, row_blocks * panels)), [&](int thread, int team) {
    const int64_t items = row_blocks * panels, first = items * thread / team, end = items * (thread + 1) / team;
    const int64_t tile0 = first_tile(first / panels), tiles_end = first_tile(ceil_div(end, panels));
    const Quantised x = quantise<T>(p, tile0, tiles_end);
    for (int64_t i = first; i < end; i++)
      for (int64_t tile = first_tile(i / panels); tile < first_tile(i / panels + 1); tile++) {
        const int64_t m = tile * kRows;
        run_tile<T>(p, i % panels, x.tile(m - tile0 * kRows), m, std::min<int64_t>(kRows, p.m - m));
      }
  });
}

}  // namespace

const Layout* layout_of(std::string_view name) {
  for (const Kernels& format : kFormats)
    if (format.name == name) return &format;
  return nullptr;
}

int64_t panel_count(int64_t n) { return ceil_div(n, kColumns); }

void linear(const Problem& p, int threads) {
  if (p.n == 0) return;
  with_element(p.dtype, [&]<class T>(T) {
    for (int64_t m = 0; m < p.m; m += kMaxRows) {
      Problem part = p;
      part.m = std::min(kMaxRows, p.m - m);
      part.x = static_cast<const T*>(p.x) + m * p.x_stride;
      part.out = static_cast<T*>(p.out) + m * p.n;
      if (p.residual) part.residual = static_cast<const T*>(p.residual) + m * p.residual_stride;
      run_rows<T>(part, threads);
    }
  });
}

struct RowValues;

void rows(const Segment& weight, int64_t k, const int64_t* ids, int64_t count, Dtype dtype, void* out, int threads) {
  with_element(dtype, [&]<class T>(T) {
    parallel_rows(count, count * k, 1 << 14, threads, [&](int64_t i) {
      float* values = scratch<RowValues>(k);
      const int64_t panel = ids[i] / kColumns, blocks = k / weight.layout->block;
      kernels(weight).row(weight.packed + panel * blocks * weight.layout->bytes, k, int(ids[i] % kColumns), values);
      T* row = static_cast<T*>(out) + i * k;
      for (int64_t j = 0; j < k; j += 16) store_some(V16::load(values + j), row + j, k - j);
    });
  });
}

}  // namespace llm42::quant
