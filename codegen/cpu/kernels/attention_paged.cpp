#include "attention.h"
#include "attention_plan.h"
#include "transpose.h"

namespace llm42::attention {
namespace {

template <class T>
struct PagedCall {
  const Paged& p;
  const HeadShape h;
  const int64_t group;

  explicit PagedCall(const Paged& p_)
      : p(p_), h{p_.head_dim, p_.scale, p_.softcap}, group(p_.q_heads / p_.kv_heads) {}

  // K and V of tokens [begin, end) to their slots.
  void write(int64_t begin, int64_t end) const {
    const int64_t dim = p.head_dim, page = p.page, head_size = dim * page;
    for (int64_t t = begin; t < end; t++) {
      const int64_t slot = p.slot_mapping[t];
      if (slot < 0) continue;
      const int64_t block = slot / page, offset = slot % page;
      for (int64_t head = 0; head < p.kv_heads; head++) {
        const T* k = static_cast<const T*>(p.k) + t * p.k_token + head * p.k_head;
        const T* v = static_cast<const T*>(p.v) + t * p.v_token + head * p.v_head;
        const int64_t base = (block * p.kv_heads + head) * head_size;
        T* k_to = static_cast<T*>(p.k_cache) + base + offset;
        for (int64_t d = 0; d < dim; d++) k_to[d * page] = k[d];
        std::memcpy(static_cast<T*>(p.v_cache) + base + offset * dim, v, size_t(dim) * sizeof(T));
      }
    }
  }

  void load_queries(const Sequence& s, const Job& job, int64_t head, const TileScratch& t) const {
    for (int r = 0; r < job.rows; r++) {
      const int64_t row = job.row0 + r, token = s.first_token + row / group;
      const T* from = static_cast<const T*>(p.q) + token * p.q_token + (head * group + row % group) * p.q_head;
      Score<T>::keep(from, h.dim, t.query<T>(r, h.dim));
    }
  }

  void store_row(const Sequence& s, int64_t row, int64_t head, const Partial& result) const {
    const int64_t token = s.first_token + row / group, q_head = head * group + row % group;
    finish<T>(h, result, p.sinks ? p.sinks + q_head : nullptr,
              static_cast<T*>(p.out) + (token * p.q_heads + q_head) * h.dim);
  }

  void load_split(const Work& work, int split, SplitKV<T>& kv) const {
    const int64_t first = int64_t(split) * kSplit;
    const int units = int(std::min<int64_t>(kUnits, (p.kv_lens[work.job->sequence] - first + kUnit - 1) / kUnit));
    if (p.by_token)
      units_by_token(work, first, units, kv);
    else
      units_of_pages(work, first, units, kv);
    for (int u = units; u < kUnits; u++)  // never read, but prefetched
      kv.k[u] = kv.k[u - 1], kv.k_lines[u] = kv.k_lines[u - 1], kv.v[u] = kv.v[u - 1];
  }

  void units_of_pages(const Work& work, int64_t first, int units, SplitKV<T>& kv) const {
    const int64_t unit_size = kUnit * p.head_dim;
    const int32_t* entry = p.block_table + work.job->sequence * p.table_width + first / p.page;
    int64_t offset = first % p.page, base = 0;
    kv.k_stride = p.page, kv.v_stride = p.head_dim;
    for (int u = 0; u < units; u++, offset += kUnit) {
      if (offset == p.page) offset = 0, entry++;
      if (u == 0 || offset == 0) base = (*entry * p.kv_heads + work.head) * p.head_dim * p.page;
      const int64_t lines = base + offset / kUnit * unit_size;
      kv.k[u] = static_cast<const T*>(p.k_cache) + base + offset;
      kv.k_lines[u] = static_cast<const T*>(p.k_cache) + lines;
      kv.v[u] = static_cast<const T*>(p.v_cache) + lines;
    }
  }

  // k_lines are the rows of the keys; prepare() makes k of them.
  void units_by_token(const Work& work, int64_t first, int units, SplitKV<T>& kv) const {
    const int64_t sequence = work.job->sequence;
    const int32_t* table = p.block_table ? p.block_table + sequence * p.table_width : nullptr;
    kv.k_stride = kUnit, kv.v_stride = p.value_token;
    for (int u = 0; u < units; u++) {
      const int64_t key = first + u * kUnit, page = table ? table[key / p.page] : 0;
      const int64_t row = table ? key % p.page : p.first_key[sequence] + key;
      kv.k_lines[u] = static_cast<const T*>(p.k_cache) + page * p.key_page + row * p.key_token + work.head * p.key_head;
      kv.v[u] = static_cast<const T*>(p.v_cache) + page * p.value_page + row * p.value_token + work.head * p.value_head;
      kv.k[u] = kv.k_lines[u];
    }
  }

  void transpose_keys(const Work& work, int split, SplitKV<T>& kv, T* to) const {
    const int64_t left = p.kv_lens[work.job->sequence] - int64_t(split) * kSplit;
    for (int u = 0; u < kUnits && u * kUnit < left; u++, to += kUnit * p.head_dim) {
      const int keys = int(std::min<int64_t>(kUnit, left - u * kUnit));
      transpose16(kv.k_lines[u], p.key_token, keys, p.head_dim, to);
      kv.k[u] = to;
    }
  }

  // Rows of 16 elements for heads that are narrower than a vector; of `keys` of them.
  void widen_values(SplitKV<T>& kv, int64_t keys, T* to) const {
    for (int u = 0; u < kUnits && u * kUnit < keys; u++) {
      const T* from = kv.v[u];
      kv.v[u] = to;
      for (int j = 0; j < kUnit; j++, to += 16) {
        std::fill_n(to, 16, T{});
        if (u * kUnit + j < keys) std::copy_n(from + j * kv.v_stride, h.dim, to);
      }
    }
    kv.v_stride = 16;
  }

  struct Keys {
    const PagedCall& call;
    const Work &work, &following_work;
    const TileScratch& t;

    void split(int n, SplitKV<T>& kv) const { call.load_split(work, n, kv); }
    bool following(SplitKV<T>& kv) const {
      if (following_work.job) call.load_split(following_work, following_work.job->split0, kv);
      return following_work.job;
    }
    void prepare(SplitKV<T>& kv, int n) const {
      T* to = static_cast<T*>(t.units);
      if (call.p.by_token) call.transpose_keys(work, n, kv, to);
      const int64_t keys = call.p.kv_lens[work.job->sequence] - int64_t(n) * kSplit;
      if (call.h.dim < 16) call.widen_values(kv, keys, to + kSplit * call.h.dim);
    }
    bool mask(int64_t, int, int64_t, const Span*, Mask*) const { return false; }
  };

  void run(const Plan& plan, const Work& work, const Work& following, float* partials) const {
    const Job& job = *work.job;
    const Sequence& s = plan.sequences[size_t(job.sequence)];
    const TileScratch t = TileScratch::of_this_thread(h, plan.max_rows);
    const SharedTile* tile = job.shared < 0 ? nullptr : &plan.shared[size_t(job.shared)];
    load_queries(s, job, work.head, t);
    run_job<T>(job, tile, s.horizon, group, h, t, partials + work.head * plan.partials,
               Keys{*this, work, following, t});
    for (int r = 0; !tile && r < job.rows; r++)
      store_row(s, job.row0 + r, work.head, {t.m + r, t.l + r, t.o + r * h.width()});
  }

  void make_plan(Plan& plan, const Schedule& how) const {
    plan.sequences.clear();
    for (int64_t s = 0; s < p.sequences; s++) {
      const int64_t tokens = p.cu_seqlens_q[s + 1] - p.cu_seqlens_q[s], keys = p.kv_lens[s];
      plan.sequences.push_back({p.cu_seqlens_q[s], tokens, {keys - tokens, keys, p.window, true}});
    }
    plan.make(group, p.kv_heads, h.width(), how);
  }

  void clear_padding() const {
    const int64_t used = p.cu_seqlens_q[p.sequences], row = p.q_heads * p.head_dim;
    std::memset(static_cast<T*>(p.out) + used * row, 0, size_t((p.tokens - used) * row) * sizeof(T));
  }

  void drain(Queue& queue, int team, float* partials) const {
    const Plan& plan = queue.plan;
    queue.drain(
        team, [&](const Work& work, const Work& following) { run(plan, work, following, partials); },
        [&](const SharedTile& tile, const Work& work) {
          const Job& job = *work.job;
          for (int r = 0; r < job.rows; r++)
            store_row(plan.sequences[size_t(job.sequence)], job.row0 + r, work.head,
                      fold_shared(tile, job.rows, r, h, partials + work.head * plan.partials));
        });
  }

  void operator()(Schedule how) const {
    struct Tag {};
    constexpr int64_t kSerialWrites = 4096;
    thread_local Plan plan_of_this_thread;
    Plan& plan = plan_of_this_thread;
    make_plan(plan, how);
    if (plan.cost * h.dim < kSerialCost) how.threads = 1;
    float* partials = scratch<Tag>(plan.partials * p.kv_heads);
    Queue prefills(plan, p.kv_heads, 0, plan.prefills), decodes(plan, p.kv_heads, plan.prefills, plan.jobs.size());
    const int64_t writes = p.slot_mapping ? p.tokens : 0;
    const bool write_first = how.threads == 1 || writes * p.kv_heads * h.dim < kSerialWrites;
    if (write_first) write(0, writes);
    clear_padding();
    parallel(how.threads, [&](int thread, int team) {
      if (!write_first) {
        write(writes * thread / team, writes * (thread + 1) / team);
#pragma omp barrier
      }
      const bool decodes_first = thread < how.decode_workers;
      drain(decodes_first ? decodes : prefills, team, partials);
      drain(decodes_first ? prefills : decodes, team, partials);
    });
  }
};

}  // namespace

void paged(const Paged& p, const Schedule& how) {
  with_element(p.dtype, [&](auto element) { PagedCall<decltype(element)>{p}(how); });
}

}  // namespace llm42::attention
