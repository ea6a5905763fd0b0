// Who computes which rows and splits. Nothing here shows in the bits: rows never mix, and splits are
// folded from the left whoever has computed them.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "attention.h"
#include "attention_tile.h"
#include "parallel.h"

namespace llm42::attention {

// The keys that the query tokens of one sequence see. A causal token t stands at position offset + t.
struct Horizon {
  int64_t offset, keys, window;
  bool causal;

  int64_t hi(int64_t token) const { return causal ? std::min(keys, offset + token + 1) : keys; }
  int64_t lo(int64_t token) const { return window > 0 ? std::max<int64_t>(0, offset + token + 1 - window) : 0; }
};

inline constexpr int64_t kDecodeRows = 12;  // a sequence with no more reads more than it computes
inline constexpr int64_t kSerialCost = 1 << 17;  // products that one thread computes faster than several

struct Sequence {
  int64_t first_token, tokens;
  Horizon horizon;
};

// Rows [row0, row0 + rows) of a sequence and one KV head, over splits [split0, split1). Row r is query
// token r / group of query head r % group of the KV head's group.
struct Job {
  int32_t sequence, row0, rows, split0, split1;
  int32_t shared;  // index of the tile that several jobs share the splits of, or -1
  int64_t cost;
};

struct SharedTile {
  int32_t jobs, split0, split1;
  int64_t partials;  // where its partial results begin, in floats, inside one KV head's region
};

struct Plan {
  std::vector<Sequence> sequences;
  std::vector<Job> jobs;
  std::vector<SharedTile> shared;
  size_t prefills = 0;   // the first so many jobs are prefills, the rest decodes, each longest first
  int64_t partials = 0;  // floats a KV head
  int64_t cost = 0;      // rows * keys over all KV heads
  int max_rows = 0;

  void make(int64_t group, int64_t kv_heads, int64_t width, const Schedule& how);

 private:
  void order(int64_t group, bool roles);
  void add_tiles(int32_t sequence, int64_t group, int64_t tile_rows);
  void share_long_tiles(int64_t limit, int64_t width);
};

inline void Plan::add_tiles(int32_t index, int64_t group, int64_t tile_rows) {
  const Sequence& s = sequences[size_t(index)];
  const int64_t rows = s.tokens * group;
  for (int64_t r = 0; r < rows; r += tile_rows) {
    const int64_t n = std::min(tile_rows, rows - r), first = r / group, last = (r + n - 1) / group;
    const int64_t lo = s.horizon.lo(first), hi = std::max(s.horizon.hi(first), s.horizon.hi(last));
    const int64_t seen = std::max<int64_t>(1, (s.horizon.hi(first) + hi) / 2 - lo);
    const int64_t split0 = lo / kSplit, split1 = std::max(split0 + 1, (hi + kSplit - 1) / kSplit);
    jobs.push_back({index, int32_t(r), int32_t(n), int32_t(split0), int32_t(split1), -1, n * seen});
  }
}

// Cuts the splits of each tile that costs more than `limit` into several jobs.
inline void Plan::share_long_tiles(int64_t limit, int64_t width) {
  const size_t tiles = jobs.size();
  for (size_t i = 0; i < tiles; i++) {
    const Job tile = jobs[i];
    const int64_t splits = tile.split1 - tile.split0;
    const int64_t parts = std::min(splits, tile.cost / std::max<int64_t>(1, limit) + 1);
    if (parts < 2) continue;
    const int32_t id = int32_t(shared.size());
    shared.push_back({int32_t(parts), tile.split0, tile.split1, partials});
    partials += splits * tile.rows * (width + 2);
    for (int64_t n = 0; n < parts; n++) {
      Job part = tile;
      part.split0 = int32_t(tile.split0 + splits * n / parts);
      part.split1 = int32_t(tile.split0 + splits * (n + 1) / parts);
      part.shared = id;
      part.cost = tile.cost / parts;
      if (n == 0)
        jobs[i] = part;
      else
        jobs.push_back(part);
    }
  }
}

inline void Plan::order(int64_t group, bool roles) {
  const auto longer = [](const Job& a, const Job& b) { return a.cost > b.cost; };
  const auto prefill = [&](const Job& job) { return sequences[size_t(job.sequence)].tokens * group > kDecodeRows; };
  std::stable_sort(jobs.begin(), jobs.end(), longer);
  prefills = jobs.size();
  if (roles) prefills = size_t(std::stable_partition(jobs.begin(), jobs.end(), prefill) - jobs.begin());
}

// `sequences` is set by the caller.
inline void Plan::make(int64_t group, int64_t kv_heads, int64_t width, const Schedule& how) {
  constexpr int64_t kTileRows = 96, kJobsPerThread = 4;
  const int threads = how.threads;
  const int64_t wanted = kJobsPerThread * threads;
  for (int64_t tile_rows = kTileRows;; tile_rows /= 2) {
    jobs.clear();
    for (size_t i = 0; i < sequences.size(); i++) add_tiles(int32_t(i), group, tile_rows);
    if (threads == 1 || int64_t(jobs.size()) * kv_heads >= wanted || tile_rows <= kDecodeRows) break;
  }
  shared.clear();
  partials = cost = max_rows = 0;
  for (const Job& job : jobs) {
    cost += job.cost * kv_heads;
    max_rows = std::max(max_rows, int(job.rows));
  }
  prefills = jobs.size();
  if (threads == 1 || jobs.empty()) return;
  share_long_tiles(cost / wanted, width);
  order(group, how.decode_workers > 0);
}

// One job for one KV head.
struct Work {
  const Job* job;
  int64_t head;
};

// The jobs [first, last) of a plan, for every KV head. drain() calls run(work, following) for all of them, in
// their order, and fold(shared tile, work) after the last job of a shared tile. `following` is the work that
// the thread does next, if that is settled. To be called by every thread of a team.
struct Queue {
  static constexpr int64_t kPatience = 64;
  const Plan& plan;
  const int64_t kv_heads, last;
  std::atomic<int64_t> next;
  std::unique_ptr<std::atomic<int32_t>[]> done;  // [shared, kv_heads]

  Queue(const Plan& plan_, int64_t kv_heads_, size_t first, size_t last_)
      : plan(plan_), kv_heads(kv_heads_), last(int64_t(last_) * kv_heads_), next(int64_t(first) * kv_heads_) {
    const size_t n = first < last_ ? plan.shared.size() * size_t(kv_heads) : 0;
    if (n) done.reset(new std::atomic<int32_t>[n]());
  }

  Work take() {
    const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    return i < last ? Work{&plan.jobs[size_t(i / kv_heads)], i % kv_heads} : Work{};
  }

  template <class Run, class Fold>
  void drain(int team, Run run, Fold fold) {
    // Work that may wait for the thread that has taken it.
    const int64_t brief = std::max<int64_t>(6 * kSplit, plan.cost / (kPatience * team));
    for (Work work = take(); work.job;) {
      const Job& job = *work.job;
      const bool ahead = job.cost <= brief;
      Work following = ahead ? take() : Work{};
      run(work, following);
      if (job.shared >= 0) {
        const SharedTile& tile = plan.shared[size_t(job.shared)];
        auto& count = done[size_t(job.shared * kv_heads + work.head)];
        if (count.fetch_add(1, std::memory_order_acq_rel) + 1 == tile.jobs) fold(tile, work);
      }
      work = ahead ? following : take();
    }
  }
};

// Memory of one thread for one tile.
struct TileScratch {
  float *q, *m, *l, *o;              // [rows, dim], [rows], [rows], [rows, width]
  float *s, *new_m, *new_l, *new_o;  // of one microtile: [kMicroRows, …]
  Mask* mask;
  void* units;  // [kSplit * (dim + 16)] elements of up to 4 bytes

  // Where the queries from a row on are kept.
  template <class T>
  auto* query(int64_t row, int64_t dim) const {
    return reinterpret_cast<typename Score<T>::X*>(q) + row * (dim / Score<T>::kDepth * Score<T>::kSteps);
  }

  struct Tag {};
  static TileScratch of_this_thread(const HeadShape& h, int64_t rows) {
    const auto align = [](int64_t n) { return (n + 15) / 16 * 16; };
    const int64_t mask_floats = align(int64_t(sizeof(Mask) / sizeof(float)) + 1);
    const int64_t sizes[] = {align(rows * h.dim), align(rows), align(rows),      rows * h.width(),
                             kMicroRows * kSplit, 16,          16,               kMicroRows * h.width(),
                             mask_floats,         kSplit * (h.dim + 16)};
    int64_t total = 16;
    for (int64_t n : sizes) total += n;
    float* at = scratch<Tag>(total);
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64 / sizeof(float);
    float* part[10];
    for (int i = 0; i < 10; i++) part[i] = at, at += sizes[i];
    return {part[0], part[1], part[2], part[3], part[4],
            part[5], part[6], part[7], reinterpret_cast<Mask*>(part[8]), part[9]};
  }
};

// The spans of rows [row, row + n) in the split that begins at key `base`.
inline void make_spans(const Horizon& horizon, int64_t group, int64_t row, int n, int64_t base, Span* spans) {
  for (int r = 0; r < n; r++) {
    const int64_t token = (row + r) / group;
    const int64_t lo = std::clamp<int64_t>(horizon.lo(token) - base, 0, kSplit);
    const int64_t hi = std::clamp<int64_t>(horizon.hi(token) - base, 0, kSplit);
    spans[r] = lo < hi ? Span{int(lo), int(hi)} : Span{};
  }
}

// Runs one job over the splits that `keys` serves: keys.split(n, kv) points kv at split n, keys.following(kv)
// at what is read after the last one, if that is known; keys.prepare(kv, n) is called before kv is computed with;
// keys.mask(row, n, base, spans, mask) returns whether there is a mask and fills it. Results of a job with
// a tile of its own go into scratch.m/l/o; those of a shared one into `partials`: [split][m | l | o].
template <class T, class Keys>
inline void run_job(const Job& job, const SharedTile* tile, const Horizon& horizon, int64_t group, const HeadShape& h,
                    const TileScratch& t, float* partials, const Keys& keys) {
  const int rows = job.rows;
  SplitKV<T> both[2];
  keys.split(job.split0, both[job.split0 & 1]);
  for (int split = job.split0; split < job.split1; split++) {
    SplitKV<T>&kv = both[split & 1], &ahead = both[~split & 1];
    if (split + 1 < job.split1)
      keys.split(split + 1, ahead);
    else if (!keys.following(ahead))
      ahead = kv;
    keys.prepare(kv, split);
    for (int r0 = 0, n; r0 < rows; r0 += n) {
      n = micro_rows(rows - r0);
      const int64_t base = int64_t(split) * kSplit;
      Span spans[kMicroRows];
      make_spans(horizon, group, job.row0 + r0, n, base, spans);
      const bool masked = keys.mask(job.row0 + r0, n, base, spans, t.mask);
      const bool first_split = split == job.split0;
      Partial to{t.new_m, t.new_l, t.new_o};
      if (tile) {
        float* first = partials + tile->partials + (split - tile->split0) * int64_t(rows) * (h.width() + 2);
        to = {first + r0, first + rows + r0, first + 2 * rows + r0 * h.width()};
      } else if (first_split) {
        to = {t.m + r0, t.l + r0, t.o + r0 * h.width()};
      }
      attend<T>(n, h, kv, ahead, t.query<T>(r0, h.dim), spans, masked ? t.mask : nullptr, t.s, to.m, to.l, to.o);
      for (int r = 0; !tile && !first_split && r < n; r++)
        fold(h, {t.m + r0 + r, t.l + r0 + r, t.o + (r0 + r) * h.width()},
             {to.m + r, to.l + r, to.o + r * h.width()});
    }
  }
}

// The result of row r of a shared tile, folded into its first split's place.
inline Partial fold_shared(const SharedTile& tile, int rows, int r, const HeadShape& h, float* partials) {
  const int64_t stride = int64_t(rows) * (h.width() + 2);
  float* base = partials + tile.partials;
  const auto at = [&](int64_t split) {
    float* p = base + split * stride;
    return Partial{p + r, p + rows + r, p + 2 * rows + r * h.width()};
  };
  for (int64_t split = 1; split < tile.split1 - tile.split0; split++) fold(h, at(0), at(split));
  return at(0);
}

}  // namespace llm42::attention
