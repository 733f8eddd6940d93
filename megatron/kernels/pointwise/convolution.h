// x plus a depthwise convolution of x over the tokens of each protein (see convolution.py), forward and backward.

#pragma once

#include <cstdlib>

#include "numbers.h"

// One convolution. N: the numbers' type, of the input. `weight` is [taps, features].
template <typename N>
struct Convolution {
  int64_t tokens, features;
  const int64_t* positions;
  const float* weight;
  const N* x;  // the forward pass's input
  const N* in;  // what this pass convolves: x, or backward the output's gradient
  N* out;
  bool goes_back;  // whether this is the backward pass, which mirrors the taps
};

// Fills `rows` with the row that each tap reads; `zeros` if it is in another protein.
template <int64_t kTaps, typename N>
INLINE void find_rows(const Convolution<N>& made, int64_t token, const N* zeros, const N* (&rows)[kTaps]) {
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const int64_t way = tap - kTaps / 2, other = token + (made.goes_back ? -way : way);
    const bool is_same = other >= 0 && other < made.tokens
                         && made.positions[other > token ? other : token] >= std::abs(way);
    rows[tap] = is_same ? made.in + other * made.features : zeros;
  }
}

// Fills `out` with `in` plus its convolution, for the tokens `first` to `last`, exclusive. `zeros`: as many as features.
template <int64_t kTaps, typename N>
CLONED void convolve_rows(const Convolution<N>& made, int64_t first, int64_t last, const N* zeros) {
  const N* rows[kTaps];
  const float* weight = made.weight;
  const int64_t features = made.features;
  for (int64_t token = first; token < last; ++token) {
    find_rows(made, token, zeros, rows);
    const N* own = made.in + token * features;
    N* out = made.out + token * features;
#pragma GCC ivdep
    for (int64_t x = 0; x < features; ++x) {
      float sum = number_of(own[x]);
#pragma GCC unroll 8
      for (int64_t tap = 0; tap < kTaps; ++tap) sum += weight[tap * features + x] * number_of(rows[tap][x]);
      put(out + x, sum);
    }
  }
}

// Fills `out` with the gradient of x, and adds the gradient of the weight to `grad` [taps, features].
template <int64_t kTaps, typename N>
CLONED void convolve_rows_back(const Convolution<N>& made, int64_t first, int64_t last, const N* zeros, float* grad) {
  const N* rows[kTaps];
  const float* weight = made.weight;
  const int64_t features = made.features;
  for (int64_t token = first; token < last; ++token) {
    find_rows(made, token, zeros, rows);
    const N *own = made.in + token * features, *x_of_token = made.x + token * features;
    N* out = made.out + token * features;
#pragma GCC ivdep
    for (int64_t x = 0; x < features; ++x) {
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
