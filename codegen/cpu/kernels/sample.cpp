#include "sample.h"

#include <atomic>
#include <limits>
#include <vector>

#include "parallel.h"
#include "philox.h"

namespace llm42::sampling {
namespace {

constexpr int kBlock = kNoiseBlock;
constexpr int kBuckets = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The first entries of a row in descending order (equal ones by index): all above x, and those equal to
// x up to `index`.
struct Prefix {
  float x = -kInfinity;
  int64_t index = std::numeric_limits<int64_t>::max();
  bool holds(float value, int64_t i) const { return value > x || (value == x && i <= index); }
};

struct Entry {
  float x;
  int64_t index;
  bool operator<(const Entry& other) const { return x > other.x || (x == other.x && index < other.index); }
};

// Memory that a thread keeps between rows.
struct Workspace {
  std::vector<float> block_max;
  std::vector<Entry> entries;
  std::vector<double> mass;
};

Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

template <class T>
class Row {
 public:
  Row(const T* x, int64_t vocab, Workspace& w) : x_(x), vocab_(vocab), w_(w) { find_maximum(); }

  // False for rows with NaN or without a finite maximum: nothing can be drawn from them.
  bool usable() const { return sum_ > 0.f && sum_ < kInfinity; }
  float logprob(int64_t token) const { return usable() ? (to_float(x_[token]) - max_) - log(sum_) : kNaN; }
  int64_t argmax() const { return first_equal(first_block(max_), max_); }
  int64_t draw(float temperature, int64_t top_k, float top_p, float min_p, int64_t seed, int64_t position) const;
  void top(int64_t k, float* values, int64_t* indices) const;

 private:
  int64_t blocks() const { return (vocab_ + kBlock - 1) / kBlock; }
  V16 at(int64_t i) const { return load_some(x_ + i, vocab_ - i, -kInfinity); }
  V16 shifted(V16 x, float temperature) const { return (x - V16::set1(max_)) / V16::set1(temperature); }

  void find_maximum();
  int64_t first_block(float value) const;
  int64_t first_equal(int64_t block, float value) const;
  float kth_greatest(int64_t k) const;
  float mass(Prefix within, float temperature) const;
  Prefix nucleus(Prefix within, float temperature, float top_p) const;
  template <class F>
  void visit_buckets(Prefix within, float temperature, int last, F f) const;
  void gather(Prefix within) const;

  const T* x_;
  const int64_t vocab_;
  Workspace& w_;
  float max_ = -kInfinity, sum_ = 0.f;
};

// The maximum, the maxima of blocks, and the sum of exp(x - max). NaN is passed over at first, and then
// shows in the sum.
template <class T>
void Row<T>::find_maximum() {
  w_.block_max.resize(size_t(blocks()));
  for (int64_t b = 0; b < blocks(); b++) {
    const int64_t end = std::min(vocab_, (b + 1) * kBlock);
    V16 top = V16::set1(-kInfinity);
    for (int64_t i = b * kBlock; i < end; i += 16) top = max(at(i), top);
    const float m = hmax(top);
    w_.block_max[size_t(b)] = m;
    max_ = m > max_ ? m : max_;
  }
  V16 sum = V16::zero();
  const V16 shift = V16::set1(max_);  // -inf - -inf and inf - inf are NaN: not usable
  for (int64_t i = 0; i < vocab_; i += 16) sum = sum + exp_nonpositive(at(i) - shift);
  sum_ = hsum(sum);
}

template <class T>
int64_t Row<T>::first_block(float value) const {
  int64_t b = 0;
  while (w_.block_max[size_t(b)] != value) b++;
  return b;
}

template <class T>
int64_t Row<T>::first_equal(int64_t block, float value) const {
  int64_t i = block * kBlock;
  while (to_float(x_[i]) != value) i++;
  return i;
}

// All entries of a prefix, by ascending index.
template <class T>
void Row<T>::gather(Prefix within) const {
  w_.entries.clear();
  for (int64_t b = 0; b < blocks(); b++) {
    if (w_.block_max[size_t(b)] < within.x) continue;
    for (int64_t i = b * kBlock; i < std::min(vocab_, (b + 1) * kBlock); i++)
      if (const float x = to_float(x_[i]); within.holds(x, i)) w_.entries.push_back({x, i});
  }
}

// k of the block maxima are entries, so the k-th of them bounds the k-th entry from below.
template <class T>
float Row<T>::kth_greatest(int64_t k) const {
  Prefix bound;
  if (k <= blocks()) {
    std::vector<float> maxima(w_.block_max);
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
    bound.x = maxima[size_t(k - 1)];
  }
  gather(bound);
  std::nth_element(w_.entries.begin(), w_.entries.begin() + (k - 1), w_.entries.end());
  return w_.entries[size_t(k - 1)].x;
}

// f(bucket, exponential, entry) for the entries of `within`, which ends with a value, in buckets 0 to `last` and for some beyond. A
// bucket is 1/32 of the scaled logit wide, descending; the last of all takes the rest.
template <class T>
template <class F>
void Row<T>::visit_buckets(Prefix within, float temperature, int last, F f) const {
  const V16 per_unit = V16::set1(-32.f), rest = V16::set1(float(kBuckets - 1));
  for (int64_t b = 0; b < blocks(); b++) {
    const float top = w_.block_max[size_t(b)];
    if (top < within.x) continue;
    if (last < kBuckets - 1 && (top - max_) / temperature * -32.f >= float(last + 1)) continue;
    for (int64_t i = b * kBlock, end = std::min(vocab_, i + kBlock); i < end; i += 16) {
      float x[16], e[16], bucket[16];
      const V16 z = shifted(at(i), temperature);
      at(i).store(x);
      exp_nonpositive(z).store(e);
      min(rest, z * per_unit).store(bucket);
      for (int n = 0, count = int(std::min<int64_t>(16, end - i)); n < count; n++)
        if (x[n] >= within.x) f(int(bucket[n]), e[n], Entry{x[n], i + n});
    }
  }
}

// Sum of exp(scaled logit) over `within`, in 16 lanes.
template <class T>
float Row<T>::mass(Prefix within, float temperature) const {
  const V16 cut = V16::set1(within.x);
  V16 sum = V16::zero();
  for (int64_t b = 0; b < blocks(); b++) {
    if (w_.block_max[size_t(b)] < within.x) continue;
    for (int64_t i = b * kBlock, end = std::min(vocab_, i + kBlock); i < end; i += 16)
      sum = sum + select_lt(at(i), cut, V16::zero(), exp_nonpositive(shifted(at(i), temperature)));
  }
  return hsum(sum);
}

// The shortest prefix whose probability, relative to that of `within`, reaches top_p. Probabilities are
// added in fp64: entries to their buckets by ascending index, buckets in descending order, and in the
// bucket where top_p is reached entries in descending order.
template <class T>
Prefix Row<T>::nucleus(Prefix within, float temperature, float top_p) const {
  const double wanted = double(top_p) * double(mass(within, temperature));
  double before = 0.;
  int bucket = 0;
  for (int last : {kBuckets / 4, kBuckets - 1}) {  // most often the first few buckets are enough
    w_.mass.assign(kBuckets, 0.);
    visit_buckets(within, temperature, last, [&](int b, float e, Entry) { w_.mass[size_t(b)] += e; });
    for (bucket = 0, before = 0.; bucket < last; bucket++) {
      if (before + w_.mass[size_t(bucket)] >= wanted) break;
      before += w_.mass[size_t(bucket)];
    }
    if (bucket < last) break;
  }

  w_.entries.clear();
  visit_buckets(within, temperature, bucket, [&](int b, float, Entry entry) {
    if (b == bucket) w_.entries.push_back(entry);
  });
  std::sort(w_.entries.begin(), w_.entries.end());
  Prefix result = within;
  for (const Entry& entry : w_.entries) {
    result = {entry.x, entry.index};
    float e[16];
    exp_nonpositive(shifted(V16::set1(entry.x), temperature)).store(e);
    before += e[0];
    if (before >= wanted) break;
  }
  return result;
}

// Gumbel-max over the kept entries: temperature, then top-k (ties at its end stay), top-p, min-p.
template <class T>
int64_t Row<T>::draw(float temperature, int64_t top_k, float top_p, float min_p, int64_t seed,
                     int64_t position) const {
  Prefix kept;
  if (top_k > 0 && top_k < vocab_) kept.x = kth_greatest(top_k);
  if (top_p < 1.f) kept = nucleus(kept, temperature, top_p);
  const V16 nothing = V16::set1(-kInfinity), cut = V16::set1(kept.x), least = V16::set1(min_p);
  float best = -kInfinity;
  int64_t token = argmax();
  for (int64_t b = 0; b < blocks(); b++) {
    const float block_max = w_.block_max[size_t(b)];
    if (block_max < kept.x) continue;
    uint32_t word[4][16];
    noise_words(seed, position, b, word);
    if ((block_max - max_) / temperature + gumbel64_bound(word) < best) continue;  // cannot win
    float score[kBlock];
    gumbel64(word, score);
    V16 top = nothing;
    for (int i = 0; i < kBlock; i += 16) {
      const int64_t first = b * kBlock + i;
      const V16 x = first < vocab_ ? at(first) : nothing, z = shifted(x, temperature);
      V16 s = select_lt(x, cut, nothing, z + V16::load(score + i));
      if (min_p > 0.f) s = select_lt(exp_nonpositive(z), least, nothing, s);
      s.store(score + i);
      for (int n = 0; kept.index < first + 16 && n < 16 && first + n < vocab_; n++)
        if (!kept.holds(to_float(x_[first + n]), first + n)) score[i + n] = -kInfinity;
      top = max(V16::load(score + i), top);
    }
    const float m = hmax(top);
    if (!(m > best)) continue;
    best = m;
    token = b * kBlock + (std::find(score, score + kBlock, m) - score);
  }
  return token;
}

template <class T>
void Row<T>::top(int64_t k, float* values, int64_t* indices) const {
  if (!usable()) {
    std::fill_n(values, k, kNaN);
    std::fill_n(indices, k, -1);
    return;
  }
  Prefix bound;
  bound.x = kth_greatest(k);
  gather(bound);
  std::partial_sort(w_.entries.begin(), w_.entries.begin() + k, w_.entries.end());
  for (int64_t i = 0; i < k; i++) {
    indices[i] = w_.entries[size_t(i)].index;
    values[i] = logprob(indices[i]);
  }
}

// f(row, its index) for all rows; threads take the next row when they are done with one.
template <class F>
void for_each_row(const Logits& x, int threads, F f) {
  constexpr int64_t kPerThread = 1 << 14;  // entries that are worth waking a thread
  const int64_t useful = std::clamp<int64_t>(x.rows * x.vocab / kPerThread, 1, threads);
  std::atomic<int64_t> next{0};
  with_element(x.dtype, [&](auto element) {
    using T = decltype(element);
    parallel(int(std::min(useful, std::max<int64_t>(1, x.rows))), [&](int, int) {
      for (int64_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < x.rows;)
        f(Row<T>(static_cast<const T*>(x.data) + r * x.stride, x.vocab, workspace()), r);
    });
  });
}

}  // namespace

void sample(const Sample& p, int threads) {
  for_each_row(p.logits, threads, [&](const auto& row, int64_t r) {
    p.token[r] = -1;
    p.logprob[r] = kNaN;
    if (!row.usable()) return;
    p.token[r] = p.temperature[r] == 0.f ? row.argmax()
                                         : row.draw(p.temperature[r], p.top_k[r], p.top_p[r], p.min_p[r], p.seed[r],
                                                    p.position[r]);
    p.logprob[r] = row.logprob(p.token[r]);
  });
}

void token_logprobs(const Logits& x, const int64_t* tokens, int64_t count, float* out, int threads) {
  for_each_row(x, threads, [&](const auto& row, int64_t r) {
    for (int64_t n = r * count; n < (r + 1) * count; n++) out[n] = row.logprob(tokens[n]);
  });
}

void top_logprobs(const Logits& x, int64_t k, float* values, int64_t* indices, int threads) {
  for_each_row(x, threads, [&](const auto& row, int64_t r) { row.top(k, values + r * k, indices + r * k); });
}

void apply_token_mask(const Logits& x, const int32_t* mask, void* out, int threads) {
  const int64_t words = (x.vocab + 31) / 32;
  with_element(x.dtype, [&]<class T>(T) {
    const T nothing = from_float<T>(-kInfinity);
    parallel_rows(x.rows, x.rows * x.vocab, 1 << 16, threads, [&](int64_t r) {
      const T* from = static_cast<const T*>(x.data) + r * x.stride;
      T* to = static_cast<T*>(out) + r * x.vocab;
      for (int64_t w = 0; w < words; w++) {
        const uint32_t bits = uint32_t(mask[r * words + w]);
        const int64_t first = w * 32, end = std::min(x.vocab, first + 32);
        if (bits == 0) {
          std::fill(to + first, to + end, nothing);
        } else if (bits == ~uint32_t(0)) {
          std::copy(from + first, from + end, to + first);
        } else {
          for (int64_t v = first; v < end; v++) to[v] = (bits >> (v - first) & 1) ? from[v] : nothing;
        }
      }
    });
  });
}

}  // namespace llm42::sampling
