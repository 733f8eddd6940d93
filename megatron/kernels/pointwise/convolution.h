// x plus a depthwise convolution of x over the tokens of each protein (see convolution.py), forward and backward.

#pragma once

#include <cstdlib>

#include "numbers.h"

// N: of what is convolved. A tap of a weight is a row of it: [taps, features].
template <typename N>
struct Convolution {
  int64_t tokens, features, taps;
  const int64_t* positions;
  const float* weight;
  const N* x;  // what was convolved; forward it is `in`
  const N* in;  // what is convolved: x, or backward the gradient of what was made
  N* out;
  bool goes_back;  // taps are then taken from the other side
};

// Tokens `first` to `last`, of each `width` features from `from` on.
struct Span {
  int64_t first, last, from, width;
};

// For each tap the row that it reads, from the first feature of `span` on; `zeros` where another protein is.
template <typename N>
INLINE void find_rows(const Convolution<N>& made, const Span& span, int64_t token, const N* zeros, const N** rows) {
  for (int64_t tap = 0; tap < made.taps; ++tap) {
    const int64_t way = tap - made.taps / 2, other = token + (made.goes_back ? -way : way);
    const bool is_same = other >= 0 && other < made.tokens
                         && made.positions[other > token ? other : token] >= std::abs(way);
    rows[tap] = is_same ? made.in + other * made.features + span.from : zeros;
  }
}

// `zeros`: as many as a span is wide; `sums`: room for as many; `rows`: room for each tap.
template <typename N>
CLONED void convolve_span(const Convolution<N>& made, const Span& span, const N* zeros, float* sums, const N** rows) {
  for (int64_t token = span.first; token < span.last; ++token) {
    find_rows(made, span, token, zeros, rows);
    const int64_t place = token * made.features + span.from;
    const N* own = made.in + place;
    for (int64_t x = 0; x < span.width; ++x) sums[x] = number_of(own[x]);
    for (int64_t tap = 0; tap < made.taps; ++tap) {
      const float* weight = made.weight + tap * made.features + span.from;
      const N* row = rows[tap];
#pragma GCC ivdep
      for (int64_t x = 0; x < span.width; ++x) sums[x] += weight[x] * number_of(row[x]);
    }
    N* out = made.out + place;
#pragma GCC ivdep
    for (int64_t x = 0; x < span.width; ++x) put(out + x, sums[x]);
  }
}

// The same of gradients; those of the weight [taps, features] are added to `grads`.
template <typename N>
CLONED void convolve_span_back(const Convolution<N>& made, const Span& span, const N* zeros, float* sums,
                               const N** rows, float* grads) {
  for (int64_t token = span.first; token < span.last; ++token) {
    find_rows(made, span, token, zeros, rows);
    const int64_t place = token * made.features + span.from;
    const N *own = made.in + place, *x_of_token = made.x + place;
    for (int64_t x = 0; x < span.width; ++x) sums[x] = number_of(own[x]);
    for (int64_t tap = 0; tap < made.taps; ++tap) {
      const int64_t from = tap * made.features + span.from;
      const float* weight = made.weight + from;
      const N* row = rows[tap];
      float* grad = grads + from;
#pragma GCC ivdep
      for (int64_t x = 0; x < span.width; ++x) {
        sums[x] += weight[x] * number_of(row[x]);
        grad[x] += number_of(x_of_token[x]) * number_of(row[x]);
      }
    }
    N* out = made.out + place;
#pragma GCC ivdep
    for (int64_t x = 0; x < span.width; ++x) put(out + x, sums[x]);
  }
}
