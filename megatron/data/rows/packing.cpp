// Packs the proteins of one epoch into rows. packing.py states the rules; its Python twin is this file's test oracle.
//
// A shuffled epoch reads the lengths sequentially and scatters them, with their pieces' numbers, into buckets that fit
// into the cache. This avoids random memory accesses, which at 35 million proteins would cost more than the packing.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// A piece's number and, in the low bits, its token count, ends included; one word, so that scattering writes one word.
struct Piece {
  static constexpr int kTokensBits = 24;
  uint64_t word;

  uint64_t number() const { return word >> kTokensBits; }
  int64_t tokens() const { return word & ((uint64_t{1} << kTokensBits) - 1); }
};

struct Hashed {
  uint64_t hash;
  Piece piece;
};

// The `number`-th output of SplitMix64 seeded with `key`: a bijection of `number`, so no two pieces tie.
inline uint64_t order_hash(uint64_t key, uint64_t number) {
  uint64_t x = key + (number + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

inline uint64_t top_bits(uint64_t hash, int bits) { return bits == 0 ? 0 : hash >> (64 - bits); }

int bits_for(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

// The tokens that a piece of `residues` takes in a row, ends included; 0 if it is left out.
inline int64_t num_tokens(int64_t residues, int64_t seq_length, bool drop_long, int64_t num_ends) {
  const int64_t max_residues = seq_length - num_ends;
  if (residues <= 0 || (drop_long && residues > max_residues)) return 0;
  return std::min(residues, max_residues) + num_ends;
}

// Sorts one bucket by hash: a counting sort into cells of about one piece each, then an insertion sort.
class BucketSort {
 public:
  const std::vector<Hashed>& operator()(const Piece* pieces, int64_t count, uint64_t key, int bucket_bits) {
    const int cell_bits = bits_for(count);
    const auto cell = [&](const Hashed& item) { return top_bits(item.hash << bucket_bits, cell_bits); };
    cells_.assign((size_t{1} << cell_bits) + 1, 0);
    unsorted_.resize(count);
    sorted_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      unsorted_[i] = {order_hash(key, pieces[i].number()), pieces[i]};
      ++cells_[cell(unsorted_[i]) + 1];
    }
    for (size_t i = 1; i < cells_.size(); ++i) cells_[i] += cells_[i - 1];
    for (const Hashed& item : unsorted_) sorted_[cells_[cell(item)]++] = item;
    for (int64_t i = 1; i < count; ++i) {
      const Hashed moving = sorted_[i];
      int64_t j = i;
      for (; j > 0 && sorted_[j - 1].hash > moving.hash; --j) sorted_[j] = sorted_[j - 1];
      sorted_[j] = moving;
    }
    return sorted_;
  }

 private:
  std::vector<uint32_t> cells_;
  std::vector<Hashed> unsorted_, sorted_;
};

// Calls `place(number, tokens)` for every piece that takes tokens, in the order of the hashes. About `most_held` pieces
// are in memory at once; if there are more, each of several passes over the lengths handles a range of the hashes.
template <typename Tokens, typename Place>
void place_shuffled(int64_t num_pieces, uint64_t key, int64_t most_held, Tokens tokens_of, Place place) {
  constexpr int kPiecesPerBucketBits = 12, kMaxBucketBits = 11;  // measured: more buckets are too many write streams
  const int pass_bits = bits_for((num_pieces + most_held - 1) / most_held);
  const int bits = std::clamp(bits_for(num_pieces) - pass_bits - kPiecesPerBucketBits, 0, kMaxBucketBits);
  const int64_t num_passes = int64_t{1} << pass_bits, num_buckets = int64_t{1} << bits;
  std::vector<int64_t> counts(num_passes * num_buckets, 0);
  for (int64_t i = 0; i < num_pieces; ++i) counts[top_bits(order_hash(key, i), pass_bits + bits)] += tokens_of(i) > 0;
  std::vector<int64_t> ends(num_buckets);
  BucketSort sort;
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    const int64_t* sizes = counts.data() + pass * num_buckets;
    std::exclusive_scan(sizes, sizes + num_buckets, ends.begin(), int64_t{0});
    const std::unique_ptr<Piece[]> pieces(new Piece[ends.back() + sizes[num_buckets - 1]]);  // a vector would zero it
    for (int64_t i = 0; i < num_pieces; ++i) {
      const uint64_t bucket = top_bits(order_hash(key, i), pass_bits + bits) - pass * num_buckets;
      if (bucket >= static_cast<uint64_t>(num_buckets)) continue;  // belongs to another pass
      const int64_t tokens = tokens_of(i);
      if (tokens > 0) pieces[ends[bucket]++] = {uint64_t(i) << Piece::kTokensBits | tokens};
    }
    for (int64_t b = 0; b < num_buckets; ++b) {  // ends[b] was its start, until filling advanced it
      for (const Hashed& item : sort(pieces.get() + ends[b] - sizes[b], sizes[b], key, pass_bits + bits))
        place(item.piece.number(), item.piece.tokens());
    }
  }
}

// The rows packed so far: the piece numbers, concatenated, and the index at which each row starts.
template <typename Number>
struct Rows {
  Number* pieces;
  int64_t num_pieces = 0;
  std::vector<int64_t> starts{0};

  void add(uint64_t number) { pieces[num_pieces++] = static_cast<Number>(number); }
  void end_row() { starts.push_back(num_pieces); }
};

// The original's rule: a piece that would reach or pass the end of the row starts the next row.
template <typename Number>
class NextFit {
 public:
  NextFit(int64_t seq_length, Rows<Number>& rows) : seq_length_(seq_length), rows_(rows) {}

  void place(uint64_t number, int64_t tokens) {
    if (filled_ > 0 && filled_ + tokens >= seq_length_) finish();
    rows_.add(number);
    filled_ += tokens;
  }

  void finish() {
    if (filled_ > 0) rows_.end_row();
    filled_ = 0;
  }

 private:
  int64_t seq_length_, filled_ = 0;
  Rows<Number>& rows_;
};

// Best fit among `window` waiting pieces. Pieces with equal token counts form a linked list, oldest first; a bitmap
// over the token counts finds the largest piece that fits.
template <typename Number>
class BestFit {
 public:
  BestFit(int64_t seq_length, int64_t window, Rows<Number>& rows)
      : seq_length_(seq_length), free_(seq_length), waiting_(window), bitmap_(seq_length / 64 + 1),
        chains_(seq_length + 1), rows_(rows) {
    for (int64_t slot = window - 1; slot >= 0; --slot) unused_.push_back(slot);
  }

  void place(uint64_t number, int64_t tokens) {
    const int64_t slot = unused_.back();
    unused_.pop_back();
    waiting_[slot] = {number, tokens, newest_, kNone, kNone};
    (newest_ == kNone ? oldest_ : waiting_[newest_].newer) = slot;
    newest_ = slot;
    Chain& chain = chains_[tokens];
    (chain.first == kNone ? chain.first : waiting_[chain.last].next_of_size) = slot;
    chain.last = slot;
    bitmap_[tokens / 64] |= uint64_t{1} << (tokens % 64);
    if (unused_.empty()) lay_one();
  }

  void finish() {
    while (oldest_ != kNone) lay_one();
    if (free_ < seq_length_) rows_.end_row();
  }

 private:
  static constexpr int64_t kNone = -1;
  struct Waiting {
    uint64_t number;
    int64_t tokens, older, newer, next_of_size;
  };
  struct Chain {
    int64_t first = kNone, last = kNone;
  };

  void lay_one() {
    int64_t slot = oldest_;
    if (free_ < seq_length_ && free_ - waiting_[slot].tokens < seq_length_ / 8) slot = largest_that_fits();
    if (slot == kNone) {
      rows_.end_row();
      free_ = seq_length_;
      slot = oldest_;
    }
    rows_.add(waiting_[slot].number);
    free_ -= waiting_[slot].tokens;
    remove(slot);
  }

  int64_t largest_that_fits() const {
    int64_t word = free_ / 64;
    uint64_t bits = bitmap_[word] & (~uint64_t{0} >> (63 - free_ % 64));
    while (bits == 0) {
      if (--word < 0) return kNone;
      bits = bitmap_[word];
    }
    return chains_[word * 64 + 63 - __builtin_clzll(bits)].first;
  }

  void remove(int64_t slot) {  // it is always the first of its chain
    const Waiting& piece = waiting_[slot];
    (piece.older == kNone ? oldest_ : waiting_[piece.older].newer) = piece.newer;
    (piece.newer == kNone ? newest_ : waiting_[piece.newer].older) = piece.older;
    Chain& chain = chains_[piece.tokens];
    chain.first = piece.next_of_size;
    if (chain.first == kNone) bitmap_[piece.tokens / 64] &= ~(uint64_t{1} << (piece.tokens % 64));
    unused_.push_back(slot);
  }

  int64_t seq_length_, free_, oldest_ = kNone, newest_ = kNone;
  std::vector<Waiting> waiting_;
  std::vector<int64_t> unused_;
  std::vector<uint64_t> bitmap_;
  std::vector<Chain> chains_;
  Rows<Number>& rows_;
};

template <typename Tokens, typename Packer>
void place_all(int64_t num_pieces, std::optional<uint64_t> key, int64_t most_held, Tokens tokens_of, Packer packer) {
  const auto place = [&](uint64_t number, int64_t tokens) { packer.place(number, tokens); };
  if (key) {
    place_shuffled(num_pieces, *key, most_held, tokens_of, place);
  } else {
    for (int64_t i = 0; i < num_pieces; ++i)
      if (const int64_t tokens = tokens_of(i); tokens > 0) place(i, tokens);
  }
  packer.finish();
}

template <typename Number, typename Length>
py::tuple pack_as(const py::array_t<Length, py::array::c_style>& lengths, int64_t seq_length, int64_t window,
                  std::optional<uint64_t> key, bool drop_long, int64_t num_ends, int64_t most_held) {
  const Length* data = lengths.data();
  const int64_t num_pieces = lengths.size();
  py::array_t<Number> pieces(num_pieces);
  Rows<Number> rows{pieces.mutable_data()};
  {
    py::gil_scoped_release release;
    const auto tokens_of = [=](int64_t i) { return num_tokens(data[i], seq_length, drop_long, num_ends); };
    if (window > 0) place_all(num_pieces, key, most_held, tokens_of, BestFit<Number>(seq_length, window, rows));
    else place_all(num_pieces, key, most_held, tokens_of, NextFit<Number>(seq_length, rows));
  }
  auto* starts = new std::vector<int64_t>(std::move(rows.starts));  // the array takes ownership, without a copy
  const py::capsule owner(starts, [](void* owned) { delete static_cast<std::vector<int64_t>*>(owned); });
  return py::make_tuple(pieces[py::slice(0, rows.num_pieces, 1)],
                        py::array_t<int64_t>(starts->size(), starts->data(), owner));
}

template <typename Length>
py::tuple pack(const py::array_t<Length, py::array::c_style>& lengths, int64_t seq_length, int64_t window,
               std::optional<uint64_t> key, bool drop_long, int64_t num_ends, int64_t most_held) {
  if (seq_length <= num_ends || seq_length >= int64_t{1} << Piece::kTokensBits)
    throw std::invalid_argument("a row has room for a residue and its ends, and at most 16,777,215 positions");
  if (lengths.size() >= int64_t{1} << 40) throw std::invalid_argument("an epoch has fewer than 2^40 pieces");
  if (lengths.size() <= int64_t{1} << 32)
    return pack_as<uint32_t>(lengths, seq_length, window, key, drop_long, num_ends, most_held);
  return pack_as<int64_t>(lengths, seq_length, window, key, drop_long, num_ends, most_held);
}

}  // namespace

PYBIND11_MODULE(_packing, m) {
  m.doc() = "Rows of whole proteins for one epoch (see megatron/data/rows/packing.py).";
  const auto bind = [&m](auto function) {
    m.def("pack", function, py::arg("lengths").noconvert(), py::arg("seq_length"), py::arg("window"), py::arg("key"),
          py::arg("drop_long"), py::arg("num_ends"), py::arg("most_held") = int64_t{1} << 27,  // 1 GiB
          "(piece numbers row after row, int64 row starts); window 0 packs sequentially");
  };
  bind(&pack<int32_t>);
  bind(&pack<int64_t>);
}
