#include "attention.h"
#include "attention_plan.h"
#include "transpose.h"

namespace llm42::attention {
namespace {

// The 16 visibility bits of a unit of keys; `count` of them exist.
inline uint16_t bits_of(const bool* visible, int64_t stride, int count) {
  uint16_t bits = 0;
  if (stride == 1 && count == 16) {
    uint64_t bytes[2];
    std::memcpy(bytes, visible, sizeof bytes);
    for (int i = 0; i < 2; i++)  // gathers the lowest bit of eight bytes
      bits |= uint16_t((bytes[i] * 0x0102040810204080u >> 56) << (8 * i));
    return bits;
  }
  for (int j = 0; j < count; j++) bits |= uint16_t(visible[j * stride]) << j;
  return bits;
}

// An added -infinity hides a key.
inline uint16_t bits_of(const float* added, int64_t stride, int count, float* bias) {
  uint16_t bits = 0;
  for (int j = 0; j < count; j++) {
    bias[j] = added[j * stride];
    bits |= uint16_t(bias[j] != -INFINITY) << j;
  }
  return bits;
}

template <class T>
struct DenseCall {
  const Dense& p;
  const HeadShape h;
  const int64_t group;

  explicit DenseCall(const Dense& p_)
      : p(p_), h{p_.head_dim, p_.scale, p_.softcap}, group(p_.q_heads / p_.kv_heads) {}

  int64_t q_head(const Work& work, int64_t row) const { return work.head * group + row % group; }

  bool visible(int64_t at) const { return p.mask ? p.mask[at] : p.bias[at] != -INFINITY; }

  // The first key that the mask shows to any row of a sequence: keys count from there, so that padding on
  // the left moves nothing.
  int64_t origin(int64_t sequence) const {
    if (!p.mask && !p.bias) return 0;
    int64_t first = p.kv_len;
    for (int64_t head = 0; head < (p.mask_head ? p.q_heads : 1); head++)
      for (int64_t token = 0; token < (p.mask_token ? p.q_len : 1); token++) {
        const int64_t row = sequence * p.mask_batch + head * p.mask_head + token * p.mask_token;
        int64_t key = 0;
        while (key < first && !visible(row + key * p.mask_key)) key++;
        first = key;
      }
    return first;
  }

  void load_queries(const Work& work, const TileScratch& t) const {
    for (int r = 0; r < work.job->rows; r++) {
      const int64_t row = work.job->row0 + r;
      Score<T>::keep(static_cast<const T*>(p.q) + work.job->sequence * p.q_batch + q_head(work, row) * p.q_head +
                row / group * p.q_token,
            h.dim, t.query<T>(r, h.dim));
    }
  }

  void store_row(const Work& work, int64_t row, const Partial& result) const {
    finish<T>(h, result, nullptr,
              static_cast<T*>(p.out) + work.job->sequence * p.out_batch + q_head(work, row) * p.out_head +
                  row / group * p.out_token);
  }

  struct Keys {
    const DenseCall& call;
    const Work& work;
    const TileScratch& t;
    const int64_t origin;

    int64_t count() const { return call.p.kv_len - origin; }
    const T* at(const void* data, int64_t batch, int64_t head, int64_t token) const {
      return static_cast<const T*>(data) + work.job->sequence * batch + work.head * head + token;
    }

    void split(int n, SplitKV<T>& kv) const {
      const Dense& p = call.p;
      kv.k_stride = kUnit, kv.v_stride = p.v_token;
      for (int u = 0; u < kUnits; u++) {
        const int64_t key = origin + std::max<int64_t>(0, std::min(int64_t(n) * kSplit + u * kUnit, count() - 1));
        kv.k[u] = static_cast<const T*>(t.units) + u * kUnit * p.head_dim;
        kv.k_lines[u] = at(p.k, p.k_batch, p.k_head, key * p.k_token);
        kv.v[u] = at(p.v, p.v_batch, p.v_head, key * p.v_token);
      }
    }
    bool following(SplitKV<T>&) const { return false; }

    // Transposes the keys of the split; values narrower than a vector get rows of 16.
    void prepare(SplitKV<T>& kv, int n) const {
      const Dense& p = call.p;
      T* values = static_cast<T*>(t.units) + kSplit * p.head_dim;
      for (int u = 0; u < kUnits; u++, values += kUnit * 16) {
        const int keys = int(std::clamp<int64_t>(count() - int64_t(n) * kSplit - u * kUnit, 0, kUnit));
        if (keys == 0) break;
        transpose16(kv.k_lines[u], p.k_token, keys, p.head_dim, const_cast<T*>(kv.k[u]));
        if (p.head_dim >= 16) continue;
        std::fill_n(values, kUnit * 16, T{});
        for (int j = 0; j < keys; j++) std::copy_n(kv.v[u] + j * p.v_token, p.head_dim, values + j * 16);
        kv.v[u] = values;
      }
      if (p.head_dim < 16) kv.v_stride = 16;
    }

    // Narrows the spans to the visible keys; a mask remains only if there are holes in them or a bias.
    bool mask(int64_t row, int n, int64_t base, Span* spans, Mask* mask) const {
      const Dense& p = call.p;
      if (!p.mask && !p.bias) return false;
      bool holes = false;
      mask->has_bias = p.bias;
      for (int r = 0; r < n; r++) {
        const int64_t token = (row + r) / call.group, head = call.q_head(work, row + r);
        const int64_t from = work.job->sequence * p.mask_batch + head * p.mask_head + token * p.mask_token;
        uint16_t* visible = mask->visible[r];
        std::fill_n(visible, kUnits, uint16_t(0));
        const Span seen = spans[r];
        spans[r] = {};
        int shown = 0;
        for (int u = seen.lo / kUnit; u * kUnit < seen.hi; u++) {
          const int first = u * kUnit, end = std::min(kUnit, seen.hi - first);
          const int64_t offset = from + (origin + base + first) * p.mask_key;
          uint16_t bits = p.mask ? bits_of(p.mask + offset, p.mask_key, end)
                                 : bits_of(p.bias + offset, p.mask_key, end, mask->bias[r] + first);
          if (seen.lo > first) bits &= uint16_t(0xffff << (seen.lo - first));
          visible[u] = bits;
          if (!bits) continue;
          if (shown == 0) spans[r].lo = first + __builtin_ctz(bits);
          spans[r].hi = first + 32 - __builtin_clz(uint32_t(bits));
          shown += __builtin_popcount(bits);
        }
        holes = holes || shown != spans[r].hi - spans[r].lo;
      }
      return holes || mask->has_bias;
    }
  };

  void run(const Plan& plan, const Work& work, float* partials) const {
    const Job& job = *work.job;
    const TileScratch t = TileScratch::of_this_thread(h, plan.max_rows);
    const SharedTile* tile = job.shared < 0 ? nullptr : &plan.shared[size_t(job.shared)];
    load_queries(work, t);
    const Horizon& horizon = plan.sequences[size_t(job.sequence)].horizon;
    run_job<T>(job, tile, horizon, group, h, t, partials + work.head * plan.partials,
               Keys{*this, work, t, p.kv_len - horizon.keys});
    for (int r = 0; !tile && r < job.rows; r++) store_row(work, job.row0 + r, {t.m + r, t.l + r, t.o + r * h.width()});
  }

  void make_plan(Plan& plan, const Schedule& how) const {
    plan.sequences.clear();
    for (int64_t b = 0; b < p.batch; b++) {
      // SDPA's causal mask begins at the upper left corner; a window without it ends at the last key.
      const int64_t first = origin(b), offset = p.causal ? 0 : p.kv_len - p.q_len;
      plan.sequences.push_back({0, p.q_len, {offset - first, p.kv_len - first, p.window, p.causal}});
    }
    plan.make(group, p.kv_heads, h.width(), how);
  }

  void drain(Queue& queue, int team, float* partials) const {
    const Plan& plan = queue.plan;
    queue.drain(
        team, [&](const Work& work, const Work&) { run(plan, work, partials); },
        [&](const SharedTile& tile, const Work& work) {
          for (int r = 0; r < work.job->rows; r++)
            store_row(work, work.job->row0 + r,
                      fold_shared(tile, work.job->rows, r, h, partials + work.head * plan.partials));
        });
  }
};

template <class T>
void run_one(const Dense& p, Schedule how) {
  struct Tag {};
  thread_local Plan plan;
  const Plan& ours = plan;  // other threads have their own `plan`
  const DenseCall<T> call{p};
  how.decode_workers = 0;
  call.make_plan(plan, how);
  if (plan.cost * p.head_dim < kSerialCost) how.threads = 1;
  float* partials = scratch<Tag>(ours.partials * p.kv_heads);
  Queue queue(ours, p.kv_heads, 0, ours.jobs.size());
  parallel(how.threads, [&](int, int team) { call.drain(queue, team, partials); });
}

}  // namespace

void dense(const Dense& p, const Schedule& how) {
  with_element(p.dtype, [&](auto element) { run_one<decltype(element)>(p, how); });
}

}  // namespace llm42::attention
