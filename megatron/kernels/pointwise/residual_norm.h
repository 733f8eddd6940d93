// Adds a branch to the residual stream, with dropout, and normalises the sum, forward and backward (residual_norm.py).
// A row stays in the L1 cache until it is done. Sums along a row are always taken in 16 parts, on every processor.

#pragma once

#include <cmath>

#include "numbers.h"

constexpr int64_t kLanes = 16;
constexpr int64_t kDrawn = 8;  // random numbers from one counter

// Dropout: an element is kept if its random number, of 65,536, is below `kept`; 65,536 means no dropout.
struct Drawn {
  uint64_t seed;
  uint32_t kept, use, first_row;

  bool is_on() const { return kept < 65536; }
  float growth() const { return kept ? 65536.0f / kept : 0.0f; }
};

// Fills `factors` with those by which dropout multiplies a row, the same as in megatron/kernels/dropout.py. It needs
// room for kLanes * kDrawn numbers more than `width`.
INLINE void draw_row(const Drawn& drawn, int64_t row, int64_t width, float* factors) {
  const float growth = drawn.growth();
  for (int64_t from = 0; from < width; from += kLanes * kDrawn) {
    uint32_t words[4][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      uint32_t first = drawn.first_row + uint32_t(row), second = uint32_t(from / kDrawn + lane), third = 0,
               fourth = drawn.use, low_key = uint32_t(drawn.seed), high_key = uint32_t(drawn.seed >> 32);
#pragma GCC unroll 7
      for (int round = 0; round < 7; ++round) {
        const uint64_t product = first * uint64_t{0xD2511F53u}, other = third * uint64_t{0xCD9E8D57u};
        first = uint32_t(other >> 32) ^ second ^ low_key;
        second = uint32_t(other);
        third = uint32_t(product >> 32) ^ fourth ^ high_key;
        fourth = uint32_t(product);
        low_key += 0x9E3779B9u;
        high_key += 0xBB67AE85u;
      }
      words[0][lane] = first;
      words[1][lane] = second;
      words[2][lane] = third;
      words[3][lane] = fourth;
    }
    float* out = factors + from;
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int64_t word = 0; word < 4; ++word) {
        out[kDrawn * lane + 2 * word] = (words[word][lane] & 0xFFFFu) < drawn.kept ? growth : 0.0f;
        out[kDrawn * lane + 2 * word + 1] = words[word][lane] >> 16 < drawn.kept ? growth : 0.0f;
      }
  }
}

typedef float EightLanes __attribute__((vector_size(32)));
typedef float FourLanes __attribute__((vector_size(16)));

// The sum of the parts: halves are added to each other, in registers.
INLINE float sum_of(const float (&parts)[kLanes]) {
  static_assert(kLanes == 16, "two halves of eight");
  EightLanes eight[2];
  std::memcpy(eight, parts, sizeof(eight));
  eight[0] += eight[1];
  FourLanes four[2];
  std::memcpy(four, eight, sizeof(four));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

// The sum of `function(x)` for x from 0 to `width`, exclusive.
template <class Function>
INLINE float sum_along(int64_t width, const Function& function) {
  float parts[kLanes] = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t from = 0; from < whole; from += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) parts[lane] += function(from + lane);
  for (int64_t x = whole; x < width; ++x) parts[x - whole] += function(x);
  return sum_of(parts);
}

// Inputs and outputs of the forward pass; absent ones are null. Number types: R of the residual stream and the sum, B
// of the branch, N of the norm's output. `statistics`: each row's mean and inverse standard deviation.
template <typename R, typename B, typename N>
struct Join {
  int64_t width;
  const R* residual;
  const B* branch;
  const float *shift, *weight, *bias;
  Drawn drawn;
  float epsilon;
  R* sum;
  N* normed;
  float* statistics;
};

// Computes the rows `first` to `last`, exclusive. `scratch`: room for two rows and kLanes * kDrawn numbers more.
template <typename R, typename B, typename N>
CLONED void join_rows(const Join<R, B, N>& join, int64_t first, int64_t last, float* scratch) {
  const int64_t width = join.width;
  float *values = scratch, *factors = scratch + width;
  const bool drops = join.drawn.is_on();
  for (int64_t row = first; row < last; ++row) {
    const R* residual = join.residual + row * width;
    if (!join.branch) {
      for (int64_t x = 0; x < width; ++x) values[x] = number_of(residual[x]);
    } else {
      const B* branch = join.branch + row * width;
      for (int64_t x = 0; x < width; ++x) values[x] = number_of(branch[x]);
      if (join.shift)
        for (int64_t x = 0; x < width; ++x) values[x] += join.shift[x];
      if (drops) {
        draw_row(join.drawn, row, width, factors);
        for (int64_t x = 0; x < width; ++x) values[x] *= factors[x];
      }
      R* sum = join.sum + row * width;
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) {
        put(sum + x, number_of(residual[x]) + values[x]);
        values[x] = number_of(sum[x]);  // the rounded sum, which the backward pass reads
      }
    }
    if (!join.weight) continue;
    const float mean = join.bias ? sum_along(width, [=](int64_t x) { return values[x]; }) / width : 0.0f;
    const float square = sum_along(width, [=](int64_t x) { return (values[x] - mean) * (values[x] - mean); });
    const float inverse = 1.0f / std::sqrt(square / width + join.epsilon);
    join.statistics[2 * row] = mean;
    join.statistics[2 * row + 1] = inverse;
    N* normed = join.normed + row * width;
    const float *weight = join.weight, *bias = join.bias;
    if (bias) {
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) put(normed + x, (values[x] - mean) * inverse * weight[x] + bias[x]);
    } else {
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) put(normed + x, values[x] * inverse * weight[x]);
    }
  }
}

// Inputs and outputs of the backward pass; absent ones are null. `x`: the sum that was normalised.
template <typename R, typename B, typename N>
struct JoinBackward {
  int64_t width;
  const R* grad_sum;
  const N* grad_normed;
  const R* x;
  const float *statistics, *weight;
  Drawn drawn;
  bool has_mean, has_shift;
  R* grad_residual;
  B* grad_branch;
};

// Computes the gradients of the rows, and adds those of weight, bias and shift to `sums`, where those that exist follow
// each other in this order. `scratch`: as in `join_rows`.
template <typename R, typename B, typename N>
CLONED void join_rows_backward(const JoinBackward<R, B, N>& join, int64_t first, int64_t last, float* scratch,
                               float* sums) {
  const int64_t width = join.width;
  float *gradient = scratch, *normal = scratch + width, *factors = normal;
  float *weight_sum = sums, *bias_sum = weight_sum + (join.weight ? width : 0);
  float* shift_sum = bias_sum + (join.weight && join.has_mean ? width : 0);
  const float* weight = join.weight;
  for (int64_t row = first; row < last; ++row) {
    const int64_t place = row * width;
    if (join.grad_sum)
      for (int64_t x = 0; x < width; ++x) gradient[x] = number_of(join.grad_sum[place + x]);
    else
      for (int64_t x = 0; x < width; ++x) gradient[x] = 0;
    if (weight) {
      const float mean = join.has_mean ? join.statistics[2 * row] : 0.0f, inverse = join.statistics[2 * row + 1];
      const N* outer = join.grad_normed + place;
      const R* x_of_row = join.x + place;
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) {
        normal[x] = (number_of(x_of_row[x]) - mean) * inverse;
        weight_sum[x] += number_of(outer[x]) * normal[x];
      }
      if (join.has_mean) {
#pragma GCC ivdep
        for (int64_t x = 0; x < width; ++x) bias_sum[x] += number_of(outer[x]);
      }
      const float along = sum_along(width, [=](int64_t x) { return number_of(outer[x]) * weight[x] * normal[x]; });
      const float all = join.has_mean ? sum_along(width, [=](int64_t x) { return number_of(outer[x]) * weight[x]; })
                                      : 0.0f;
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x)
        gradient[x] += (number_of(outer[x]) * weight[x] - normal[x] * (along / width) - all / width) * inverse;
    }
    if (join.grad_residual) {
      R* out = join.grad_residual + place;
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) put(out + x, gradient[x]);
    }
    if (join.drawn.is_on()) {
      draw_row(join.drawn, row, width, factors);
      for (int64_t x = 0; x < width; ++x) gradient[x] *= factors[x];
    }
    if (join.has_shift) {
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) shift_sum[x] += gradient[x];
    }
    if (join.grad_branch) {
      B* out = join.grad_branch + place;
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) put(out + x, gradient[x]);
    }
  }
}
