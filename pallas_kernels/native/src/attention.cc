// Flash attention over paged keys and values. A work item is a tile of consecutive queries of one sequence and one kv
// head with all its query heads, so that a block of keys and values is packed once for all of them.
//
// Blocks start at multiples of kBlock positions and are met in ascending order: a row's running maximum, sum and output
// go through the same numbers in any batch, tile or chunking. A block that a row may not see changes none of them.
#include "attention.h"

#include <memory>
#include <vector>

#include "gemm.h"

namespace jengine {
namespace {

constexpr int kBlock = kTilePanels * kLanes;  // positions per block
constexpr int kItemRows = 48;                 // query rows (tokens x heads) per item: packing costs a tenth of the work
constexpr float kInfinity = __builtin_inff();

struct Item {
  int32_t seq, first, count;  // queries [first, first + count) of the sequence
};

template <class Q, class KV>
using WordsOf = std::conditional_t<sizeof(Q) == 2 && sizeof(KV) == 2, Bf16Words, FloatWords>;

template <class Q, class KV>
class Worker {
  using Words = WordsOf<Q, KV>;
  using E = typename Words::Element;
  static constexpr int kE = Words::kElements;

 public:
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

  void run(const Item& item, int64_t head) {
    const int64_t q_len = a_.cu_q_lens[item.seq + 1] - a_.cu_q_lens[item.seq], kv_len = a_.kv_lens[item.seq];
    position_ = kv_len - q_len + item.first;
    rows_ = item.count * group_;
    load_queries(a_.cu_q_lens[item.seq] + item.first, item.count, head);
    const int64_t begin = a_.window > 0 ? std::max<int64_t>(0, position_ - a_.window + 1) : 0;
    const int64_t end = position_ + item.count;  // <= kv_len
    for (int64_t block = begin / kBlock * kBlock; block < end; block += kBlock) {
      const int panels = static_cast<int>((std::min<int64_t>(kBlock, end - block) + kLanes - 1) / kLanes);
      pack(item.seq, head, block, begin, end, panels);
      score(panels);
      for (int r = 0; r < rows_; ++r) softmax(r, block, panels);
      accumulate(panels);
    }
    store_output(a_.cu_q_lens[item.seq] + item.first, item.count, head);
  }

 private:
  void load_queries(int64_t token, int count, int64_t head) {
    const int64_t H = a_.head_dim;
    for (int i = 0; i < count; ++i) {
      const Q* source = a_.q + ((token + i) * a_.q_heads + head * group_) * H;
      for (int64_t j = 0; j < group_ * H; ++j) q_[i * group_ * H + j] = convert<E>(source[j]);
      for (int g = 0; g < group_; ++g) {
        const int r = i * group_ + g;
        max_[r] = a_.sinks ? a_.sinks[head * group_ + g] : -kInfinity;
        store(&sum_[r * kLanes], v16f{});
        sum_[r * kLanes] = a_.sinks ? 1.0f : 0.0f;
      }
    }
    std::fill_n(out_.begin(), rows_ * H, 0.0f);
  }

  // Positions outside [begin, end) are not read (their pages may hold anything): they pack as zeros.
  void pack(int seq, int64_t head, int64_t block, int64_t begin, int64_t end, int panels) {
    alignas(64) static constexpr float kZeros[kMaxHeadDim] = {};
    const int64_t H = a_.head_dim, entry = a_.kv_heads * H;
    const int32_t* table = a_.page_table + seq * a_.pages_per_seq;
    const KV* key[kBlock];
    const KV* value[kBlock];
    for (int i = 0; i < panels * kLanes; ++i) {
      const int64_t at = block + i;
      key[i] = value[i] = reinterpret_cast<const KV*>(kZeros);
      if (at < begin || at >= end) continue;
      const int64_t page = std::clamp<int64_t>(table[at / a_.page_size], 0, a_.num_pages - 1);
      key[i] = a_.pages + (page * a_.page_size + at % a_.page_size) * 2 * entry + head * H;
      value[i] = key[i] + entry;
    }
    for (int n = 0; n < panels; ++n) {
      pack_rows<Words, KV>(keys_.data() + n * kLanes * (H / kE), kLanes, H, [&](int i) { return key[n * kLanes + i]; });
    }
    pack_columns<Words, KV>(values_.data(), kBlock * kLanes / kE, panels * kLanes, H, [&](int i) { return value[i]; });
  }

  void score(int panels) {
    const int64_t words = a_.head_dim / kE;
    const uint32_t* q = reinterpret_cast<const uint32_t*>(q_.data());
    for (int r = 0; r < rows_; r += kTileRows) {
      const Tile tile{&scores_[r * kBlock], kBlock, q + r * words, words, keys_.data(), words * kLanes, words, false};
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
    const float old_max = max_[r], new_max = std::max(old_max, max_lane(high));
    const float base = new_max == -kInfinity ? 0.0f : new_max;  // nothing seen yet: exp(-inf - 0) = 0
    const v16f decay = exp(splat(old_max - base));
    v16f sum = load(&sum_[r * kLanes]) * decay;
    for (int n = 0; n < panels; ++n) {
      E* p = &p_[r * kBlock + n * kLanes];
      store_as(p, exp(load(scores + n * kLanes) - splat(base)));
      sum += load(p);  // as rounded: the weights of the values then add up to one
    }
    store(&sum_[r * kLanes], sum);
    max_[r] = new_max;
    if (new_max != old_max) {
      float* out = &out_[r * a_.head_dim];
      for (int64_t h = 0; h < a_.head_dim; h += kLanes) store(out + h, load(out + h) * decay);
    }
  }

  void accumulate(int panels) {
    const int64_t H = a_.head_dim;
    const uint32_t* p = reinterpret_cast<const uint32_t*>(p_.data());
    constexpr int64_t kPanel = kBlock * kLanes / kE;
    for (int r = 0; r < rows_; r += kTileRows) {
      for (int64_t h = 0; h < H; h += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kTilePanels, (H - h) / kLanes));
        const Tile tile{&out_[r * H + h], H, p + r * (kBlock / kE), kBlock / kE, values_.data() + h / kLanes * kPanel,
                        kPanel, panels * kLanes / kE, true};
        multiply<Words>(tile, std::min(kTileRows, rows_ - r), count);
      }
    }
  }

  void store_output(int64_t token, int count, int64_t head) {
    const int64_t H = a_.head_dim;
    for (int r = 0; r < rows_; ++r) {
      Q* out = a_.out + ((token + r / group_) * a_.q_heads + head * group_ + r % group_) * H;
      const float sum = sum_lanes(load(&sum_[r * kLanes]));
      for (int64_t h = 0; h < H; h += kLanes) store_as(out + h, load(&out_[r * H + h]) / splat(sum));
    }
  }

  const Attention<Q, KV>& a_;
  const int group_;
  int64_t position_ = 0;  // of the item's first query
  int rows_ = 0;
  std::vector<E> q_, p_;
  std::vector<uint32_t> keys_, values_;
  std::vector<float> scores_, out_, max_, sum_;
};

}  // namespace

template <class Q, class KV>
void attention(Pool& pool, const Attention<Q, KV>& a) {
  const int group = static_cast<int>(a.q_heads / a.kv_heads);
  const int tile = std::max(1, kItemRows / group);
  std::vector<Item> items;
  int64_t work = 0;
  for (int32_t s = 0; s < a.num_seqs; ++s) {
    const int32_t q_len = a.cu_q_lens[s + 1] - a.cu_q_lens[s];
    work += int64_t{q_len} * a.kv_lens[s];
    for (int32_t first = 0; first < q_len; first += tile) items.push_back({s, first, std::min(tile, q_len - first)});
  }
  const int64_t used = a.num_seqs > 0 ? a.cu_q_lens[a.num_seqs] : 0, row = a.q_heads * a.head_dim;
  std::memset(static_cast<void*>(a.out + used * row), 0, (a.tokens - used) * row * sizeof(Q));
  const int64_t num_units = static_cast<int64_t>(items.size()) * a.kv_heads;
  const int workers = work * row < (1 << 16) ? 1 : pool.num_threads();  // a few microseconds: do not wake anyone
  parallel_claim(pool, num_units, workers, [&](int64_t unit, const auto& claim, int64_t& finished) {
    Worker<Q, KV> worker(a, tile * group);
    for (; unit >= 0; unit = claim(), ++finished) {
      const int64_t last_first = num_units - 1 - unit;  // the last tiles of a prompt see most: start with them
      worker.run(items[last_first / a.kv_heads], last_first % a.kv_heads);
    }
  });
}

template void attention(Pool&, const Attention<bf16, bf16>&);
template void attention(Pool&, const Attention<bf16, float>&);
template void attention(Pool&, const Attention<float, bf16>&);
template void attention(Pool&, const Attention<float, float>&);

}  // namespace jengine
