// Normalises and rotates each query and key head before attention, and copies values, forward and backward (heads.py).

#pragma once

#include "numbers.h"
#include "residual_norm.h"

// N: the number type of the projection. Each token has `groups` groups of `rows` rows: queries, a key, a value.
// Pointers to absent inputs are null: without scales nothing is normalised; with `half` 0 nothing is rotated. In the
// backward pass `grad` is the output's gradient, and `out` receives that of `x`; in the forward pass `grad` is null.
template <typename N>
struct Heads {
  int64_t groups, rows, width, half;
  const N* x;
  const float *query_scale, *key_scale, *cos, *sin;
  float epsilon, sign;
  bool has_mean;
  const N* grad;
  N* out;

  const float* scale_of(int64_t group, int64_t row) const {
    if (!query_scale) return nullptr;
    return row < rows - 2 ? query_scale + (group * (rows - 2) + row) * width : key_scale + group * width;
  }
};

// Rotates the two halves of a row by the token's angles, back if `sign` is -1, and copies the rest.
template <typename From, typename To>
INLINE void turn_row(const From* in, const float* cos, const float* sin, float sign, To* out, int64_t half,
                     int64_t width) {
#pragma GCC ivdep
  for (int64_t x = 0; x < half; ++x) {
    const float first = number_of(in[x]), second = number_of(in[x + half]), turn = sign * sin[x];
    put(out + x, first * cos[x] - second * turn);
    put(out + x + half, second * cos[x] + first * turn);
  }
#pragma GCC ivdep
  for (int64_t x = 2 * half; x < width; ++x) put(out + x, number_of(in[x]));
}

// Fills `normal` with the normalised row; returns the inverse standard deviation (RMSNorm: inverse root mean square).
template <typename N>
INLINE float normalise_row(const N* in, float epsilon, bool has_mean, int64_t width, float* normal) {
  const float mean = has_mean ? sum_along(width, [=](int64_t x) { return number_of(in[x]); }) / width : 0.0f;
#pragma GCC ivdep
  for (int64_t x = 0; x < width; ++x) normal[x] = number_of(in[x]) - mean;
  const float inverse = 1.0f / std::sqrt(sum_along(width, [=](int64_t x) { return normal[x] * normal[x]; }) / width
                                         + epsilon);
#pragma GCC ivdep
  for (int64_t x = 0; x < width; ++x) normal[x] *= inverse;
  return inverse;
}

// Fills `out` with the gradient of the row, and adds that of the scale to `sums`. `outer`: the output's gradient,
// rotated back; it is overwritten.
template <typename N>
INLINE void normalise_row_back(const Heads<N>& heads, const N* in, const float* scale, int64_t width, float* outer,
                               float* normal, float* sums, N* out) {
  const float inverse = normalise_row(in, heads.epsilon, heads.has_mean, width, normal);
#pragma GCC ivdep
  for (int64_t x = 0; x < width; ++x) {
    sums[x] += outer[x] * normal[x];
    outer[x] *= scale[x];
  }
  const float along = sum_along(width, [=](int64_t x) { return outer[x] * normal[x]; }) / width;
  const float all = heads.has_mean ? sum_along(width, [=](int64_t x) { return outer[x]; }) / width : 0.0f;
#pragma GCC ivdep
  for (int64_t x = 0; x < width; ++x) put(out + x, (outer[x] - normal[x] * along - all) * inverse);
}

// Processes the tokens `first` to `last`, exclusive. kWidth: the width if known at compile time, else 0. `scratch`:
// room for two rows. `sums`: the scales' gradients are added to it, [groups, rows, width]; backward only.
template <int64_t kWidth, typename N>
CLONED void prepare_tokens(const Heads<N>& heads, int64_t first, int64_t last, float* scratch, float* sums) {
  const int64_t width = kWidth ? kWidth : heads.width, half = heads.half, rows = heads.rows;
  float *values = scratch, *normal = scratch + width;
  for (int64_t token = first; token < last; ++token) {
    const float *cos = heads.cos + token * half, *sin = heads.sin + token * half;
    for (int64_t group = 0; group < heads.groups; ++group) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t of_token = (group * rows + row) * width, place = token * heads.groups * rows * width + of_token;
        const N* from = (heads.grad ? heads.grad : heads.x) + place;
        const float* scale = heads.scale_of(group, row);
        N* out = heads.out + place;
        if (row == rows - 1) {
          std::memcpy(out, from, width * sizeof(N));
        } else if (!scale) {
          turn_row(from, cos, sin, heads.sign, out, half, width);
        } else if (heads.grad) {
          turn_row(from, cos, sin, -heads.sign, values, half, width);
          normalise_row_back(heads, heads.x + place, scale, width, values, normal, sums + of_token, out);
        } else {
          normalise_row(from, heads.epsilon, heads.has_mean, width, values);
          for (int64_t x = 0; x < width; ++x) values[x] *= scale[x];
          turn_row(values, cos, sin, heads.sign, out, half, width);
        }
      }
    }
  }
}
