// The radix trie of fst_fast/prefix_tree.py. No dependency on Python or torch: raw pointers in and out, loaded by ctypes.
//
// Sequences are inserted one by one: each walks down the trie and compares its tokens with those of the nodes it passes,
// which other sequences have just brought into the cache, so a build reads every sequence about once, in order. One that
// shares its storage with an earlier one is not read at all.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

// Open addressing, keys of 64 bits, values >= 0.
class Table {
 public:
  explicit Table(int64_t expected) {
    while (capacity_ < 2 * expected) capacity_ *= 2;
    keys_.resize(capacity_);
    values_.assign(capacity_, -1);
  }
  // The value of `key`: -1, to be set by the caller, where it is new. Valid until the next call.
  int64_t& operator[](uint64_t key) {
    if (2 * used_ > capacity_) grow();
    const int64_t i = slot(key);
    if (values_[i] < 0) {
      keys_[i] = key;
      ++used_;
    }
    return values_[i];
  }

 private:
  int64_t slot(uint64_t key) const {
    int64_t i = static_cast<int64_t>((key * 0x9E3779B97F4A7C15ull) >> 20) & (capacity_ - 1);
    while (values_[i] >= 0 && keys_[i] != key) i = (i + 1) & (capacity_ - 1);
    return i;
  }
  void grow() {
    std::vector<uint64_t> keys(2 * capacity_);
    std::vector<int64_t> values(2 * capacity_, -1);
    keys.swap(keys_);
    values.swap(values_);
    capacity_ *= 2;
    for (size_t i = 0; i < values.size(); ++i)
      if (values[i] >= 0) {
        const int64_t to = slot(keys[i]);
        keys_[to] = keys[i];
        values_[to] = values[i];
      }
  }
  int64_t capacity_ = 64, used_ = 0;
  std::vector<uint64_t> keys_;
  std::vector<int64_t> values_;
};

// The length of the common prefix of a[:limit] and b[:limit].
int64_t common_prefix(const int32_t* a, const int32_t* b, int64_t limit) {
  if (a == b) return limit;
  constexpr int64_t block = 64;
  int64_t i = 0;
  while (i + block <= limit && std::memcmp(a + i, b + i, block * sizeof(int32_t)) == 0) i += block;
  while (i < limit && a[i] == b[i]) ++i;
  return i;
}

struct Building {
  int64_t parent, start, end, sequence;
};

uint64_t edge(int64_t node, int32_t token) {
  return (static_cast<uint64_t>(node + 1) << 32) | static_cast<uint32_t>(token);
}

}  // namespace

extern "C" {

// Sequence i is ids[starts[i] : starts[i] + lengths[i]]. Nodes come out depth-first, children by their first token:
// parent, start, end (depths in tokens), size (nodes of the subtree) and first (into order), each with room for 2n;
// leaf[n] = the node where each sequence ends (-1: empty); order[n] = sequences depth-first. Returns the node count.
int64_t fst_prefix_tree(const int32_t* ids, const int64_t* starts, const int64_t* lengths, int64_t n, int64_t* parent,
                        int64_t* start, int64_t* end, int64_t* size, int64_t* first, int64_t* leaf, int64_t* order) {
  std::vector<Building> nodes;
  Table children(n), stored(n);
  std::vector<int64_t> ends(n, -1);
  for (int64_t i = 0; i < n; ++i) {
    if (lengths[i] == 0) continue;
    int64_t& same = stored[static_cast<uint64_t>(starts[i])];
    if (same >= 0 && lengths[same] == lengths[i]) {
      ends[i] = ends[same];
      continue;
    }
    same = i;
    const int32_t* tokens = ids + starts[i];
    int64_t at = -1, depth = 0;
    while (depth < lengths[i]) {
      int64_t& child = children[edge(at, tokens[depth])];
      if (child < 0) {
        child = static_cast<int64_t>(nodes.size());
        nodes.push_back({at, depth, lengths[i], i});
        at = child;
        break;
      }
      Building& below = nodes[child];
      const int64_t limit = std::min(below.end, lengths[i]);
      const int32_t* other = ids + starts[below.sequence];
      depth += common_prefix(tokens + depth, other + depth, limit - depth);
      if (depth == below.end) {
        at = child;
        continue;
      }
      // split: a new node takes the upper part, so that the lower one keeps its children and its sequences
      const int64_t lower = child, upper = static_cast<int64_t>(nodes.size());
      child = upper;
      const Building above = {below.parent, below.start, depth, i};
      below.start = depth;
      below.parent = upper;
      nodes.push_back(above);
      children[edge(upper, other[depth])] = lower;
      at = upper;
    }
    ends[i] = at;
  }

  // children of each node by first token; -1, the root, comes first
  const int64_t count = static_cast<int64_t>(nodes.size());
  std::vector<std::pair<std::pair<int64_t, int32_t>, int64_t>> edges(count);
  for (int64_t v = 0; v < count; ++v)
    edges[v] = {{nodes[v].parent, ids[starts[nodes[v].sequence] + nodes[v].start]}, v};
  std::sort(edges.begin(), edges.end());
  std::vector<int64_t> from(count + 2, 0);  // node v's children are edges[from[v + 1] : from[v + 2]]
  for (const auto& e : edges) ++from[e.first.first + 2];
  for (int64_t v = 1; v <= count + 1; ++v) from[v] += from[v - 1];

  std::vector<int64_t> number(count), stack;
  int64_t next = 0;
  for (int64_t e = from[1]; e-- > from[0];) stack.push_back(edges[e].second);
  while (!stack.empty()) {
    const int64_t v = stack.back();
    stack.pop_back();
    const int64_t k = number[v] = next++;
    parent[k] = nodes[v].parent < 0 ? -1 : number[nodes[v].parent];
    start[k] = nodes[v].start;
    end[k] = nodes[v].end;
    size[k] = 1;
    for (int64_t e = from[v + 2]; e-- > from[v + 1];) stack.push_back(edges[e].second);
  }
  for (int64_t k = count; k-- > 0;)
    if (parent[k] >= 0) size[parent[k]] += size[k];

  // sequences by the node they end at, empty ones before all
  std::vector<int64_t> here(count + 2, 0);
  for (int64_t i = 0; i < n; ++i) {
    leaf[i] = ends[i] < 0 ? -1 : number[ends[i]];
    ++here[leaf[i] + 2];
  }
  for (int64_t k = 1; k <= count + 1; ++k) here[k] += here[k - 1];
  for (int64_t k = 0; k < count; ++k) first[k] = here[k + 1];
  for (int64_t i = 0; i < n; ++i) order[here[leaf[i] + 1]++] = i;
  return count;
}

}  // extern "C"
