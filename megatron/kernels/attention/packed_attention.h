// What the attention kernels of every instruction set share: the problem, its units of work, scratch memory.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace packed_attention {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNothing = -1e38f;  // a maximum before the first score
constexpr float kMasked = -2e38f;   // a score that does not count, below every maximum

// Rows of `width` numbers: row r of a token's group lies at data + token * per_token + group * per_group + r * width.
template <typename Number>
struct Rows {
  Number* data;
  int64_t per_token, per_group;

  Number* at(int64_t token, int64_t group) const { return data + token * per_token + group * per_group; }
};

// Dropout of weights: out of 65,536 numbers `kept` keep theirs, which grows by the inverse of that share.
struct Dropout {
  uint64_t seed;
  uint32_t kept;
  int64_t first_head;

  bool is_on() const { return kept < 65536; }
  float growth() const { return kept ? 65536.0f / kept : 0.0f; }
};

// Queries `first` to `last` (places among all tokens) of one group, and the protein in which they lie.
struct Unit {
  int64_t begin, end, first, last, group;
};

// Tokens are numbered among all; the queries, contexts and logsumexps here begin with that of token `start`.
template <typename Number>
struct Problem {
  int64_t groups, queries, width;  // of a group: so many heads with queries
  int64_t left, right;             // the window, as wide as can be where there is none
  int64_t start;
  float scale;
  Dropout dropout;
  Rows<Number> query, key_value, context;  // backward: `context` is only read
  float* statistics;  // [tokens here, groups, queries, 2]: the softmax's largest score, by log2(e), and 1 / its sum
  Rows<Number> grad_context, grad_query, grad_key_value;  // backward alone

  float* statistics_at(int64_t token, int64_t group, int64_t head) const {
    return statistics + 2 * (((token - start) * groups + group) * queries + head);
  }
};

// Memory of one thread that its units share: the i-th `take` of each unit gets the i-th piece.
class Scratch {
 public:
  void start_over() { next_ = 0; }

  template <typename Number>
  Number* take(int64_t count) {
    if (next_ == pieces_.size()) pieces_.emplace_back();
    Piece& piece = pieces_[next_++];
    const size_t bytes = (count * sizeof(Number) + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
    if (piece.bytes < bytes) {
      piece.memory.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes)));
      if (!piece.memory) throw std::bad_alloc();
      piece.bytes = bytes;
    }
    return reinterpret_cast<Number*>(piece.memory.get());
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  struct Piece {
    std::unique_ptr<char, Free> memory;
    size_t bytes = 0;
  };
  std::vector<Piece> pieces_;
  size_t next_ = 0;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

}  // namespace packed_attention
