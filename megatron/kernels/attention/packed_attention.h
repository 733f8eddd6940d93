// What the attention kernels of all instruction sets share: the problem, its units of work, and scratch memory.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace packed_attention {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNothing = -1e38f;  // initial value of a running maximum
constexpr float kMasked = -2e38f;   // score of a masked key, below every running maximum

// A strided tensor of rows with `width` numbers: row r of a group of a token is at data + token * per_token +
// group * per_group + r * width.
template <typename Number>
struct Rows {
  Number* data;
  int64_t per_token, per_group;

  Number* at(int64_t token, int64_t group) const { return data + token * per_token + group * per_group; }
};

// Dropout of attention weights: a weight is kept if its random number, of 65,536, is below `kept`; kept weights are
// multiplied by 65,536 / kept.
struct Dropout {
  uint64_t seed;
  uint32_t kept;
  int64_t first_head;

  bool is_on() const { return kept < 65536; }
  float growth() const { return kept ? 65536.0f / kept : 0.0f; }
};

// The queries `first` to `last` of one group, all in the protein with the tokens `begin` to `end`; all tokens are
// counted, and `last` and `end` are exclusive.
struct Unit {
  int64_t begin, end, first, last, group;
};

// The inputs and outputs of one call. Token numbers count all tokens; queries, contexts and statistics here begin with
// token `start`.
template <typename Number>
struct Problem {
  int64_t groups, queries, width;  // groups, query heads per group, head width
  int64_t left, right;             // the window; huge numbers if there is none
  int64_t start;
  float scale;
  Dropout dropout;
  Rows<Number> query, key_value, context;  // `context` is an input in the backward pass
  float* statistics;  // [tokens here, groups, queries, 2]: the softmax's largest score times log2(e), and 1 / its sum
  Rows<Number> grad_context, grad_query, grad_key_value;  // backward only

  float* statistics_at(int64_t token, int64_t group, int64_t head) const {
    return statistics + 2 * (((token - start) * groups + group) * queries + head);
  }
};

// Scratch memory of one thread, reused from unit to unit: the i-th `take` of each unit returns the i-th piece.
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
