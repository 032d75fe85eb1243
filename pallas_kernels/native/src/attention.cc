// Flash attention over paged keys and values. A work item is a tile of consecutive queries of one sequence and one kv
// head with all its query heads, so that a block of keys and values is packed once for all of them.
//
// Blocks start at multiples of kBlock positions and are met in ascending order: a row's running maximum, sum and output
// go through the same numbers in any batch, tile or chunking. A block that a row may not see changes none of them.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace jengine {
namespace {

constexpr int kBlock = kTilePanels * kLanes;  // positions per block
constexpr int kItemRows = 48;                 // query rows (tokens x heads) per item: packing costs a tenth of the work
constexpr int64_t kMinParallelWork = 1 << 16;  // about ten microseconds: with less, do not wake anyone
constexpr float kInfinity = __builtin_inff();

struct Item {
  int32_t seq, first, count;  // queries [first, first + count) of the sequence
  int32_t head, num_heads;    // kv heads
};

template <class Q, class KV>
using WordsOf = std::conditional_t<sizeof(Q) == 2 && sizeof(KV) == 2, Bf16Words, FloatWords>;

template <class Q, class KV>
class Worker {
  using Words = WordsOf<Q, KV>;
  using E = typename Words::Element;
  static constexpr int kE = Words::kElements;

 public:
  // max_rows: tokens x query heads of an item.
  Worker(const Attention<Q, KV>& a, int max_rows)
      : a_(a),
        group_(static_cast<int>(a.q_heads / a.kv_heads)),
        q_(max_rows * a.head_dim),
        p_(max_rows * kBlock),
        keys_(kBlock * a.head_dim / kE),
        values_(kBlock * a.head_dim / kE),
        scores_(max_rows * kBlock),
        out_(max_rows * a.head_dim),
        max_(max_rows),
        sum_(max_rows * kLanes) {}

  // `next` is the item after, or null: its first block is fetched into the cache meanwhile.
  void run(const Item& item, const Item* next) {
    const Range range = range_of(item);
    position_ = range.position;
    rows_ = item.count * group_;
    load_queries(item);
    locate(here_, item, range, range.begin / kBlock * kBlock);
    for (int64_t block = range.begin / kBlock * kBlock; block < range.end; block += kBlock) {
      const int panels = static_cast<int>((std::min<int64_t>(kBlock, range.end - block) + kLanes - 1) / kLanes);
      there_.count = 0;
      if (block + kBlock < range.end) {
        locate(there_, item, range, block + kBlock);
      } else if (next) {
        const Range then = range_of(*next);
        locate(there_, *next, then, then.begin / kBlock * kBlock);
      }
      fetched_ = 0;
      const int share = (there_.count + 3 * item.num_heads - 1) / (3 * item.num_heads);
      for (int head = 0; head < item.num_heads; ++head) {
        first_row_ = head * rows_;
        pack(head, panels);
        fetch(share);
        score(panels);
        fetch(share);
        for (int r = 0; r < rows_; ++r) softmax(r, block, panels);
        accumulate(panels);
        fetch(share);
      }
      std::swap(here_, there_);
    }
    store_output(item);
  }

 private:
  struct Range {
    int64_t position;    // of the first query
    int64_t begin, end;  // positions that any of the queries sees
  };

  Range range_of(const Item& item) const {
    const int64_t q_len = a_.cu_q_lens[item.seq + 1] - a_.cu_q_lens[item.seq];
    const int64_t position = a_.kv_lens[item.seq] - q_len + item.first;
    return {position, a_.window > 0 ? std::max<int64_t>(0, position - a_.window + 1) : 0, position + item.count};
  }

  void load_queries(const Item& item) {
    const int64_t H = a_.head_dim, token = a_.cu_q_lens[item.seq] + item.first;
    for (int head = 0; head < item.num_heads; ++head) {
      for (int r = 0; r < rows_; ++r) {
        const int64_t row = head * rows_ + r, q_head = (item.head + head) * group_ + r % group_;
        const Q* source = a_.q + ((token + r / group_) * a_.q_heads + q_head) * H;
        for (int64_t h = 0; h < H; ++h) q_[row * H + h] = convert<E>(source[h]);
        max_[row] = a_.sinks ? a_.sinks[q_head] : -kInfinity;
        store(&sum_[row * kLanes], v16f{});
        sum_[row * kLanes] = a_.sinks ? 1.0f : 0.0f;
      }
    }
    std::fill_n(out_.get(), item.num_heads * rows_ * H, 0.0f);
  }

  // Where a block's positions lie: the key of the item's first head, or null outside the range. Values lie
  // kv_heads x head_dim elements further.
  struct Block {
    const KV* key[kBlock];
    int count;      // positions up to the end of the range
    int num_heads;  // to fetch
  };

  void locate(Block& out, const Item& item, const Range& range, int64_t block) const {
    const int32_t* table = a_.page_table + item.seq * a_.pages_per_seq;
    const int64_t entry = 2 * a_.kv_heads * a_.head_dim;
    out.count = static_cast<int>(std::min<int64_t>(kBlock, range.end - block));
    out.num_heads = item.num_heads;
    std::fill_n(out.key, kBlock, nullptr);
    int64_t at = std::max(block, range.begin);
    while (at < block + out.count) {
      const int64_t page = std::clamp<int64_t>(table[at / a_.page_size], 0, a_.num_pages - 1);
      const int64_t offset = at % a_.page_size, stop = std::min(block + out.count, at + a_.page_size - offset);
      const KV* key = a_.pages + (page * a_.page_size + offset) * entry + item.head * a_.head_dim;
      for (; at < stop; ++at, key += entry) out.key[at - block] = key;
    }
  }

  // Prefetches the next `count` positions of the block that comes after. In small portions between the stages: at once
  // they would fill the core's miss queue, and the arithmetic would wait for them.
  void fetch(int count) {
    const int64_t bytes = there_.num_heads * a_.head_dim * sizeof(KV), value = a_.kv_heads * a_.head_dim;
    for (const int end = std::min(there_.count, fetched_ + count); fetched_ < end; ++fetched_) {
      const KV* key = there_.key[fetched_];
      if (!key) continue;
      prefetch(reinterpret_cast<const char*>(key), bytes);
      prefetch(reinterpret_cast<const char*>(key + value), bytes);
    }
  }

  // Positions outside the range are not read (their pages may hold anything): they pack as zeros.
  void pack(int head, int panels) {
    alignas(64) static constexpr float kZeros[kMaxHeadDim] = {};
    const int64_t H = a_.head_dim, words = H / kE;
    const auto row = [&](int i, int64_t offset) {
      const KV* key = here_.key[i];
      return key ? key + head * H + offset : reinterpret_cast<const KV*>(kZeros);
    };
    for (int n = 0; n < panels; ++n) {
      pack_rows<Words, KV>(&keys_[n * kLanes * words], kLanes, H, [&](int i) { return row(n * kLanes + i, 0); });
    }
    const int64_t value = a_.kv_heads * H;
    pack_columns<Words, KV>(values_.get(), kBlock * kLanes / kE, panels * kLanes, H,
                            [&](int i) { return row(i, value); });
  }

  void score(int panels) {
    const int64_t words = a_.head_dim / kE;
    const uint32_t* q = reinterpret_cast<const uint32_t*>(&q_[first_row_ * a_.head_dim]);
    for (int r = 0; r < rows_; r += kTileRows) {
      const Tile tile{&scores_[r * kBlock], kBlock, q + r * words, words, keys_.get(), words * kLanes, words, false};
      multiply<Words>(tile, std::min(kTileRows, rows_ - r), panels);
    }
  }

  // Scores of one row -> probabilities against the running maximum; rescales what the row has summed so far.
  void softmax(int r, int64_t block, int panels) {
    const int64_t position = position_ + r / group_;
    const int64_t first = a_.window > 0 ? position - a_.window + 1 : 0;
    const bool sees_all = block >= first && block + panels * kLanes - 1 <= position;
    float* scores = &scores_[r * kBlock];
    v16f high = splat(-kInfinity);
    for (int n = 0; n < panels; ++n) {
      v16f s = load(scores + n * kLanes) * splat(a_.scale);
      if (a_.soft_cap > 0) s = splat(a_.soft_cap) * tanh(s / splat(a_.soft_cap));
      if (!sees_all) {
        const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const v16i at = lane + static_cast<int32_t>(block + n * kLanes - position);  // relative: fits 32 bits
        const v16i is_seen = (at <= 0) & (at >= static_cast<int32_t>(first - position));
        s = is_seen ? s : splat(-kInfinity);
      }
      store(scores + n * kLanes, s);
      high = max(s, high);  // of a NaN and a number: the number; the NaN comes back through exp
    }
    float& row_max = max_[first_row_ + r];
    float* row_sum = &sum_[(first_row_ + r) * kLanes];
    const float old_max = row_max, new_max = std::max(old_max, max_lane(high));
    const float base = new_max == -kInfinity ? 0.0f : new_max;  // nothing seen yet: exp(-inf - 0) = 0
    v16f sum = load(row_sum);
    if (new_max != old_max) {
      const v16f decay = exp(splat(old_max - base));
      float* out = &out_[(first_row_ + r) * a_.head_dim];
      for (int64_t h = 0; h < a_.head_dim; h += kLanes) store(out + h, load(out + h) * decay);
      sum *= decay;
    }
    for (int n = 0; n < panels; ++n) {
      E* p = &p_[r * kBlock + n * kLanes];
      store_as(p, exp(load(scores + n * kLanes) - splat(base)));
      sum += load(p);  // as rounded: the weights of the values then add up to one
    }
    store(row_sum, sum);
    row_max = new_max;
  }

  void accumulate(int panels) {
    const int64_t H = a_.head_dim;
    const uint32_t* p = reinterpret_cast<const uint32_t*>(p_.get());
    constexpr int64_t kPanel = kBlock * kLanes / kE;
    for (int r = 0; r < rows_; r += kTileRows) {
      for (int64_t h = 0; h < H; h += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kTilePanels, (H - h) / kLanes));
        const Tile tile{&out_[(first_row_ + r) * H + h], H, p + r * (kBlock / kE), kBlock / kE,
                        &values_[h / kLanes * kPanel], kPanel, panels * kLanes / kE, true};
        multiply<Words>(tile, std::min(kTileRows, rows_ - r), count);
      }
    }
  }

  void store_output(const Item& item) {
    const int64_t H = a_.head_dim, token = a_.cu_q_lens[item.seq] + item.first;
    for (int64_t row = 0; row < item.num_heads * rows_; ++row) {
      const int64_t r = row % rows_, q_head = (item.head + row / rows_) * group_ + r % group_;
      Q* out = a_.out + ((token + r / group_) * a_.q_heads + q_head) * H;
      const v16f sum = splat(sum_lanes(load(&sum_[row * kLanes])));
      for (int64_t h = 0; h < H; h += kLanes) store_as(out + h, load(&out_[row * H + h]) / sum);
    }
  }

  const Attention<Q, KV>& a_;
  const int group_;
  int64_t position_ = 0;  // of the item's first query
  int rows_ = 0;          // of each kv head: tokens x group
  int first_row_ = 0;     // of the kv head at work
  int fetched_ = 0;       // positions of `there_`
  Block here_, there_;
  const Buffer<E> q_, p_;
  const Buffer<uint32_t> keys_, values_;
  const Buffer<float> scores_, out_, max_, sum_;
};

// Longest first. All kv heads of a tile in one item read whole pages; a single head an item if there are few tiles.
template <class Q, class KV>
std::vector<Item> plan_items(const Attention<Q, KV>& a, int tile, int workers) {
  int64_t num_tiles = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s) num_tiles += (a.cu_q_lens[s + 1] - a.cu_q_lens[s] + tile - 1) / tile;
  const int heads = num_tiles >= 4 * workers || workers == 1 ? static_cast<int>(a.kv_heads) : 1;
  std::vector<Item> items;
  items.reserve(num_tiles * a.kv_heads / heads);
  for (int32_t s = 0; s < a.num_seqs; ++s) {
    const int32_t q_len = a.cu_q_lens[s + 1] - a.cu_q_lens[s];
    for (int32_t first = (q_len - 1) / tile * tile; q_len > 0 && first >= 0; first -= tile) {
      for (int32_t head = 0; head < a.kv_heads; head += heads) {
        items.push_back({s, first, std::min(tile, q_len - first), head, heads});
      }
    }
  }
  const auto reads = [&](const Item& item) { return a.kv_lens[item.seq] + item.first; };
  std::stable_sort(items.begin(), items.end(), [&](const Item& x, const Item& y) { return reads(x) > reads(y); });
  return items;
}

}  // namespace

template <class Q, class KV>
void attention(Pool& pool, const Attention<Q, KV>& a) {
  const int group = static_cast<int>(a.q_heads / a.kv_heads), tile = std::max(1, kItemRows / group);
  const int64_t used = a.num_seqs > 0 ? a.cu_q_lens[a.num_seqs] : 0, row = a.q_heads * a.head_dim;
  std::memset(static_cast<void*>(a.out + used * row), 0, (a.tokens - used) * row * sizeof(Q));
  int64_t work = 0, longest = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t q_len = a.cu_q_lens[s + 1] - a.cu_q_lens[s];
    work += q_len * a.kv_lens[s] * row;
    longest = std::max(longest, q_len);
  }
  const int workers = work < kMinParallelWork ? 1 : pool.num_threads();
  const std::vector<Item> items = plan_items(a, tile, workers);
  const int max_rows = static_cast<int>(std::min<int64_t>(tile, longest) * a.q_heads);
  parallel_claim(pool, items.size(), workers, [&](int64_t unit, const auto& claim, int64_t& finished) {
    Worker<Q, KV> worker(a, max_rows);
    for (; unit >= 0; ++finished) {
      const int64_t next = claim();
      worker.run(items[unit], next < 0 ? nullptr : &items[next]);
      unit = next;
    }
  });
}

template void attention(Pool&, const Attention<bf16, bf16>&);
template void attention(Pool&, const Attention<bf16, float>&);
template void attention(Pool&, const Attention<float, bf16>&);
template void attention(Pool&, const Attention<float, float>&);

}  // namespace jengine
