// x plus a depthwise convolution of x over the tokens of each protein (see convolution.py), forward and backward.

#pragma once

#include <cstdlib>

#include "numbers.h"

// N: of what is convolved. A tap of a weight is a row of it: [taps, features].
template <typename N>
struct Convolution {
  int64_t tokens, features;
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
template <int64_t kTaps, typename N>
INLINE void find_rows(const Convolution<N>& made, const Span& span, int64_t token, const N* zeros,
                      const N* (&rows)[kTaps]) {
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const int64_t way = tap - kTaps / 2, other = token + (made.goes_back ? -way : way);
    const bool is_same = other >= 0 && other < made.tokens
                         && made.positions[other > token ? other : token] >= std::abs(way);
    rows[tap] = is_same ? made.in + other * made.features + span.from : zeros;
  }
}

// `zeros`: as many as a span is wide.
template <int64_t kTaps, typename N>
CLONED void convolve_span(const Convolution<N>& made, const Span& span, const N* zeros) {
  const N* rows[kTaps];
  const float* weight = made.weight + span.from;
  for (int64_t token = span.first; token < span.last; ++token) {
    find_rows(made, span, token, zeros, rows);
    const int64_t features = made.features, place = token * features + span.from;
    const N* own = made.in + place;
    N* out = made.out + place;
#pragma GCC ivdep
    for (int64_t x = 0; x < span.width; ++x) {
      float sum = number_of(own[x]);
#pragma GCC unroll 8
      for (int64_t tap = 0; tap < kTaps; ++tap) sum += weight[tap * features + x] * number_of(rows[tap][x]);
      put(out + x, sum);
    }
  }
}

// The same of gradients; those of the weight [taps, features] are added to `grads`.
template <int64_t kTaps, typename N>
CLONED void convolve_span_back(const Convolution<N>& made, const Span& span, const N* zeros, float* grads) {
  const N* rows[kTaps];
  const float* weight = made.weight + span.from;
  float* grad = grads + span.from;
  for (int64_t token = span.first; token < span.last; ++token) {
    find_rows(made, span, token, zeros, rows);
    const int64_t features = made.features, place = token * features + span.from;
    const N *own = made.in + place, *x_of_token = made.x + place;
    N* out = made.out + place;
#pragma GCC ivdep
    for (int64_t x = 0; x < span.width; ++x) {
      const float number = number_of(x_of_token[x]);
      float sum = number_of(own[x]);
#pragma GCC unroll 8
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const float outer = number_of(rows[tap][x]);
        sum += weight[tap * features + x] * outer;
        grad[tap * features + x] += number * outer;
      }
      put(out + x, sum);
    }
  }
}
