// What a transformer block computes between matrix products, on CPUs, each in one pass over memory (see native.py).
//
// These are plain loops, which the compiler vectorises for each instruction set that `CLONED` names. Sums over tokens
// are computed in pieces of fixed size and added in order, so results are bitwise the same for any number of threads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "convolution.h"
#include "heads.h"
#include "numbers.h"
#include "residual_norm.h"

namespace {

namespace py = pybind11;

constexpr int64_t kTokens = 64;  // per piece of work; a piece has whole rows, which lie one after another in memory

// e^x for x up to 0, with the error of fp32; NaN for NaN.
INLINE float exp_of(float x) {
  constexpr float kToInteger = 12582912.0f + 127.0f;  // 1.5 * 2^23: the low bits hold n and the exponent's bias
  x *= 1.44269504088896341f;
  x = x < -127.0f ? -127.0f : x;
  const float shifted = x + kToInteger, f = x - (shifted - kToInteger);
  const float power = ((((1.535336188319500e-4f * f + 1.339887440266574e-3f) * f + 9.618437357674640e-3f) * f
                        + 5.550332471162809e-2f) * f + 2.402264791363012e-1f) * f + 6.931472028550421e-1f;
  uint32_t word;
  std::memcpy(&word, &shifted, 4);
  word <<= 23;
  float scale;
  std::memcpy(&scale, &word, 4);
  return (power * f + 1.0f) * scale;
}

INLINE float sigmoid(float x) {
  const float small = exp_of(x < 0 ? x : -x), larger = 1.0f / (1.0f + small);
  return x < 0 ? small * larger : larger;
}

// The activation functions and their derivatives. The gated one, swiglu, has functions of its own below.
struct GeluTanh {  // x * sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3), which equals x * (1 + tanh(u)) / 2
  static constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;
  static INLINE float value(float x) { return x * sigmoid(kTwice * (x + kCube * x * x * x)); }
  static INLINE float derivative(float x) {
    const float share = sigmoid(kTwice * (x + kCube * x * x * x));
    return share + x * share * (1.0f - share) * kTwice * (1.0f + 3.0f * kCube * x * x);
  }
};

struct Gelu {  // x * Phi(x); erf by Abramowitz and Stegun, 7.1.26: absolute error 1.5e-7
  static INLINE float share_of(float x, float bell) {  // bell: exp(-x^2 / 2)
    const float size = x < 0 ? -x : x, t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
    const float tail = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f
                       + t * (-1.453152027f + t * 1.061405429f))));
    return x < 0 ? tail : 1.0f - tail;
  }
  static INLINE float value(float x) { return x * share_of(x, exp_of(-0.5f * x * x)); }
  static INLINE float derivative(float x) {
    const float bell = exp_of(-0.5f * x * x);
    return share_of(x, bell) + x * 0.3989422804f * bell;
  }
};

struct SquaredRelu {
  static INLINE float value(float x) { return x > 0 ? x * x : x != x ? x : 0.0f; }
  static INLINE float derivative(float x) { return x > 0 ? 2.0f * x : x != x ? x : 0.0f; }
};

template <class Function, typename Number>
INLINE void forward_row(const Number* wide, const float* bias, Number* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t x = 0; x < count; ++x) put(out + x, Function::value(number_of(wide[x]) + bias[x]));
}

template <typename Number>
INLINE void forward_gated_row(const Number* wide, const float* bias, const Number* gate, const float* gate_bias,
                              Number* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t x = 0; x < count; ++x) {
    const float open = number_of(gate[x]) + gate_bias[x];
    put(out + x, open * sigmoid(open) * (number_of(wide[x]) + bias[x]));
  }
}

template <class Function, typename Number>
INLINE void backward_row(const Number* grad, const Number* wide, const float* bias, Number* grad_wide, float* sums,
                         int64_t count) {
#pragma GCC ivdep
  for (int64_t x = 0; x < count; ++x) {
    const float out = number_of(grad[x]) * Function::derivative(number_of(wide[x]) + bias[x]);
    put(grad_wide + x, out);
    sums[x] += out;
  }
}

template <typename Number>
INLINE void backward_gated_row(const Number* grad, const Number* wide, const float* bias, const Number* gate,
                               const float* gate_bias, Number* grad_wide, Number* grad_gate, float* sums,
                               float* gate_sums, int64_t count) {
#pragma GCC ivdep
  for (int64_t x = 0; x < count; ++x) {
    const float open = number_of(gate[x]) + gate_bias[x], share = sigmoid(open), from = number_of(grad[x]);
    const float out = from * open * share;
    const float out_gate = from * (number_of(wide[x]) + bias[x]) * share * (1.0f + open * (1.0f - share));
    put(grad_wide + x, out);
    put(grad_gate + x, out_gate);
    sums[x] += out;
    gate_sums[x] += out_gate;
  }
}

template <typename Number>
INLINE void add_row(const Number* in, float* sums, int64_t count) {
#pragma GCC ivdep
  for (int64_t x = 0; x < count; ++x) sums[x] += number_of(in[x]);
}

struct Shape {
  int64_t tokens, features;

  int64_t pieces() const { return (tokens + kTokens - 1) / kTokens; }
};

// Calls `work` for each piece: its number, its first token, and the one after its last.
template <class Work>
void in_pieces(const Shape& shape, int threads, const Work& work) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t piece = 0; piece < shape.pieces(); ++piece)
    work(piece, piece * kTokens, std::min((piece + 1) * kTokens, shape.tokens));
}

// The biases added to a product and to its gate; zeros if there is none.
struct Biases {
  const float *wide, *gate;
};

template <class Function, typename Number>
CLONED void forward_piece(int64_t first, int64_t last, int64_t features, const Number* wide, const Number* gate,
                          Biases biases, Number* out) {
  for (int64_t place = first * features; place < last * features; place += features) {
    if constexpr (std::is_void_v<Function>)
      forward_gated_row(wide + place, biases.wide, gate + place, biases.gate, out + place, features);
    else
      forward_row<Function>(wide + place, biases.wide, out + place, features);
  }
}

template <class Function, typename Number>
CLONED void backward_piece(int64_t first, int64_t last, int64_t features, const Number* grad, const Number* wide,
                           const Number* gate, Biases biases, Number* grad_wide, Number* grad_gate, float* sums,
                           float* gate_sums) {
  for (int64_t place = first * features; place < last * features; place += features) {
    if constexpr (std::is_void_v<Function>)
      backward_gated_row(grad + place, wide + place, biases.wide, gate + place, biases.gate, grad_wide + place,
                         grad_gate + place, sums, gate_sums, features);
    else
      backward_row<Function>(grad + place, wide + place, biases.wide, grad_wide + place, sums, features);
  }
}

template <typename Number>
CLONED void add_piece(int64_t first, int64_t last, int64_t features, const Number* in, float* sums) {
  for (int64_t token = first; token < last; ++token) add_row(in + token * features, sums, features);
}

template <typename Number>
Number* at(uintptr_t address) {
  return reinterpret_cast<Number*>(address);
}

// Fills `out` with the sums over all tokens: it adds the sums of the pieces, in order.
void sum_up(const std::vector<float>& sums, const Shape& shape, float* out) {
  std::fill(out, out + shape.features, 0.0f);
  for (int64_t piece = 0; piece < shape.pieces(); ++piece)
    for (int64_t x = 0; x < shape.features; ++x) out[x] += sums[piece * shape.features + x];
}

using Addresses = std::vector<uintptr_t>;

// Fills the activation. `tensors`: product, its gate (or 0), their biases in fp32 (or 0), output.
template <class Function, typename Number>
void forward(const Addresses& tensors, const Shape& shape, int threads) {
  const std::vector<float> nothing(shape.features);
  const Biases biases{tensors[2] ? at<float>(tensors[2]) : nothing.data(),
                      tensors[3] ? at<float>(tensors[3]) : nothing.data()};
  in_pieces(shape, threads, [&](int64_t, int64_t first, int64_t last) {
    forward_piece<Function, Number>(first, last, shape.features, at<Number>(tensors[0]), at<Number>(tensors[1]), biases,
                                    at<Number>(tensors[4]));
  });
}

// Fills the activation's gradients. `tensors`: the first four of `forward`, the output's gradient, and what is filled:
// the gradients of those four (or 0).
template <class Function, typename Number>
void backward(const Addresses& tensors, const Shape& shape, int threads) {
  const std::vector<float> nothing(shape.features);
  const Biases biases{tensors[2] ? at<float>(tensors[2]) : nothing.data(),
                      tensors[3] ? at<float>(tensors[3]) : nothing.data()};
  std::vector<float> sums(shape.pieces() * shape.features);
  std::vector<float> gate_sums(std::is_void_v<Function> ? sums.size() : 0);
  in_pieces(shape, threads, [&](int64_t piece, int64_t first, int64_t last) {
    backward_piece<Function, Number>(first, last, shape.features, at<Number>(tensors[4]), at<Number>(tensors[0]),
                                     at<Number>(tensors[1]), biases, at<Number>(tensors[5]), at<Number>(tensors[6]),
                                     sums.data() + piece * shape.features, gate_sums.data() + piece * shape.features);
  });
  if (tensors[7]) sum_up(sums, shape, at<float>(tensors[7]));
  if (tensors[8]) sum_up(gate_sums, shape, at<float>(tensors[8]));
}

using Pass = void (*)(const Addresses&, const Shape&, int);

template <template <class, typename> class Chosen>
Pass pass_named(const std::string& kind, bool is_bf16) {
  if (kind == "gelu_tanh") return is_bf16 ? Chosen<GeluTanh, uint16_t>::pass : Chosen<GeluTanh, float>::pass;
  if (kind == "gelu") return is_bf16 ? Chosen<Gelu, uint16_t>::pass : Chosen<Gelu, float>::pass;
  if (kind == "squared_relu") return is_bf16 ? Chosen<SquaredRelu, uint16_t>::pass : Chosen<SquaredRelu, float>::pass;
  if (kind == "swiglu") return is_bf16 ? Chosen<void, uint16_t>::pass : Chosen<void, float>::pass;
  throw std::invalid_argument("no activation is called '" + kind + "'");
}

template <class Function, typename Number>
struct Forward {
  static constexpr Pass pass = forward<Function, Number>;
};
template <class Function, typename Number>
struct Backward {
  static constexpr Pass pass = backward<Function, Number>;
};

template <typename Number>
void add_columns(uintptr_t in, uintptr_t out, const Shape& shape, int threads) {
  std::vector<float> sums(shape.pieces() * shape.features);
  in_pieces(shape, threads, [&](int64_t piece, int64_t first, int64_t last) {
    add_piece(first, last, shape.features, at<const Number>(in), sums.data() + piece * shape.features);
  });
  sum_up(sums, shape, at<float>(out));
}

using HeadsShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // tokens, groups, rows, width, half

// Normalises and rotates heads, or fills the gradients. `tensors`: the projection, the scales of queries and of keys,
// cosines, sines, and the output (backward: the projection's gradient); backward also the forward output's gradient
// and, filled, the scales' gradients, summed over tokens.
template <typename Number>
void prepare_heads(const Addresses& tensors, const HeadsShape& shape, float epsilon, bool has_mean, float sign,
                   int threads) {
  const auto [tokens, groups, rows, width, half] = shape;
  const bool goes_back = tensors.size() > 6;
  const Heads<Number> heads{groups, rows, width, half, at<const Number>(tensors[0]), at<const float>(tensors[1]),
                            at<const float>(tensors[2]), at<const float>(tensors[3]), at<const float>(tensors[4]),
                            epsilon, sign, has_mean, goes_back ? at<const Number>(tensors[6]) : nullptr,
                            at<Number>(tensors[5])};
  const Shape wide{tokens, goes_back ? groups * rows * width : 0};
  std::vector<float> sums(wide.pieces() * wide.features);
  const auto prepare = width == 32 ? prepare_tokens<32, Number> : width == 64 ? prepare_tokens<64, Number>
                                                                              : prepare_tokens<0, Number>;
  in_pieces(wide, threads, [&](int64_t piece, int64_t first, int64_t last) {
    std::vector<float> scratch(2 * width);
    prepare(heads, first, last, scratch.data(), sums.data() + piece * wide.features);
  });
  if (goes_back) sum_up(sums, wide, at<float>(tensors[7]));
}

// Fills x plus its convolution, or the gradients. `tensors` forward: x, positions, weight [taps, features] in fp32,
// output; backward: the output's gradient, positions, weight, the gradient of x (filled), x, the weight's gradient in
// fp32 (filled).
template <int64_t kTaps, typename Number>
void convolve(const Addresses& tensors, const Shape& shape, int threads) {
  const bool goes_back = tensors.size() > 4;
  const Convolution<Number> made{shape.tokens, shape.features, at<const int64_t>(tensors[1]),
                                 at<const float>(tensors[2]), at<const Number>(tensors[goes_back ? 4 : 0]),
                                 at<const Number>(tensors[0]), at<Number>(tensors[3]), goes_back};
  const Shape wide{shape.tokens, shape.features * kTaps};
  std::vector<float> grads(goes_back ? wide.pieces() * wide.features : 0);
  const std::vector<Number> zeros(shape.features);
  in_pieces(shape, threads, [&](int64_t piece, int64_t first, int64_t last) {
    if (goes_back)
      convolve_rows_back<kTaps>(made, first, last, zeros.data(), grads.data() + piece * wide.features);
    else
      convolve_rows<kTaps>(made, first, last, zeros.data());
  });
  if (goes_back) sum_up(grads, wide, at<float>(tensors[5]));
}

Pass convolution_of(int64_t taps, bool is_bf16) {
  if (taps == 3) return is_bf16 ? convolve<3, uint16_t> : convolve<3, float>;
  if (taps == 5) return is_bf16 ? convolve<5, uint16_t> : convolve<5, float>;
  if (taps == 7) return is_bf16 ? convolve<7, uint16_t> : convolve<7, float>;
  throw std::invalid_argument("no convolution has " + std::to_string(taps) + " taps");
}

using Types = std::tuple<bool, bool, bool>;  // whether these are bf16: residual stream, branch, norm's output
using Dropout = std::tuple<uint64_t, uint32_t, uint32_t, uint32_t>;  // seed, how many of 65,536 kept, use, first row

Drawn drawn_of(const Dropout& dropout) {
  return {std::get<0>(dropout), std::get<1>(dropout), std::get<2>(dropout), std::get<3>(dropout)};
}

// Calls `work` for each piece of the rows, with scratch memory for two rows and dropout's surplus numbers.
template <class Work>
void by_rows(const Shape& shape, int threads, const Work& work) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(2 * shape.features + kLanes * kDrawn);
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < shape.pieces(); ++piece)
      work(piece, piece * kTokens, std::min((piece + 1) * kTokens, shape.tokens), scratch.data());
  }
}

// `tensors`: the inputs residual, branch, shift, weight, bias, then the outputs sum, normed, statistics (or 0).
template <typename R, typename B, typename N>
struct Joined {
  static void pass(const Addresses& tensors, const Shape& shape, const Dropout& dropout, float epsilon, bool, bool,
                   int threads) {
    const Join<R, B, N> join{shape.features, at<const R>(tensors[0]), at<const B>(tensors[1]),
                             at<const float>(tensors[2]), at<const float>(tensors[3]), at<const float>(tensors[4]),
                             drawn_of(dropout), epsilon, at<R>(tensors[5]), at<N>(tensors[6]), at<float>(tensors[7])};
    by_rows(shape, threads, [&](int64_t, int64_t first, int64_t last, float* scratch) {
      join_rows(join, first, last, scratch);
    });
  }
};

// `tensors`: the inputs gradient of the sum, gradient of the norm's output, sum, statistics, weight; then the outputs:
// the gradients of residual and branch, and one fp32 tensor with those of weight, bias and shift that exist, summed
// over tokens (or 0).
template <typename R, typename B, typename N>
struct JoinedBackward {
  static void pass(const Addresses& tensors, const Shape& shape, const Dropout& dropout, float, bool has_mean,
                   bool has_shift, int threads) {
    const JoinBackward<R, B, N> join{shape.features, at<const R>(tensors[0]), at<const N>(tensors[1]),
                                     at<const R>(tensors[2]), at<const float>(tensors[3]), at<const float>(tensors[4]),
                                     drawn_of(dropout), has_mean, has_shift, at<R>(tensors[5]), at<B>(tensors[6])};
    const Shape wide{shape.tokens, shape.features * ((tensors[4] ? 1 + has_mean : 0) + has_shift)};
    std::vector<float> sums(wide.pieces() * wide.features);
    by_rows(shape, threads, [&](int64_t piece, int64_t first, int64_t last, float* scratch) {
      join_rows_backward(join, first, last, scratch, sums.data() + piece * wide.features);
    });
    if (wide.features) sum_up(sums, wide, at<float>(tensors[7]));
  }
};

using JoinPass = void (*)(const Addresses&, const Shape&, const Dropout&, float, bool, bool, int);

template <template <typename, typename, typename> class Chosen>
JoinPass join_pass(const Types& is_bf16) {
  using Half = uint16_t;
  const auto [residual, branch, normed] = is_bf16;
  if (residual)
    return branch ? normed ? Chosen<Half, Half, Half>::pass : Chosen<Half, Half, float>::pass
                  : normed ? Chosen<Half, float, Half>::pass : Chosen<Half, float, float>::pass;
  return branch ? normed ? Chosen<float, Half, Half>::pass : Chosen<float, Half, float>::pass
                : normed ? Chosen<float, float, Half>::pass : Chosen<float, float, float>::pass;
}

}  // namespace

PYBIND11_MODULE(_pointwise, m) {
  m.doc() = "What a block does between its matrix products (see megatron/kernels/pointwise/native.py).";
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def("activate", [](const std::string& kind, bool is_bf16, const Addresses& tensors,
                       std::tuple<int64_t, int64_t> shape, int threads) {
    const bool goes_back = tensors.size() > 5;
    const Pass pass = goes_back ? pass_named<Backward>(kind, is_bf16) : pass_named<Forward>(kind, is_bf16);
    pass(tensors, {std::get<0>(shape), std::get<1>(shape)}, threads);
  }, released, "fills the activation, or, given nine tensors, the gradients");
  m.def("prepare_heads", [](bool is_bf16, const Addresses& tensors, const HeadsShape& shape, float epsilon,
                            bool has_mean, float sign, int threads) {
    (is_bf16 ? prepare_heads<uint16_t> : prepare_heads<float>)(tensors, shape, epsilon, has_mean, sign, threads);
  }, released, "queries and keys normalised and turned, values copied, or, given eight tensors, the gradients");
  m.def("add_columns", [](bool is_bf16, uintptr_t in, uintptr_t out, std::tuple<int64_t, int64_t> shape, int threads) {
    (is_bf16 ? add_columns<uint16_t> : add_columns<float>)(in, out, {std::get<0>(shape), std::get<1>(shape)}, threads);
  }, released, "fp32 sums over the tokens");
  m.def("convolve", [](bool is_bf16, const Addresses& tensors, std::tuple<int64_t, int64_t> shape, int64_t taps,
                       int threads) {
    convolution_of(taps, is_bf16)(tensors, {std::get<0>(shape), std::get<1>(shape)}, threads);
  }, released, "fills x plus its convolution, or, given six tensors, the gradients");
  m.def("join", [](const Types& is_bf16, const Addresses& tensors, std::tuple<int64_t, int64_t> shape,
                   const Dropout& dropout, float epsilon, int threads) {
    join_pass<Joined>(is_bf16)(tensors, {std::get<0>(shape), std::get<1>(shape)}, dropout, epsilon, false, false,
                               threads);
  }, released, "the sum of residual and branch, and its norm");
  m.def("join_backward", [](const Types& is_bf16, const Addresses& tensors, std::tuple<int64_t, int64_t> shape,
                            const Dropout& dropout, bool has_mean, bool has_shift, int threads) {
    join_pass<JoinedBackward>(is_bf16)(tensors, {std::get<0>(shape), std::get<1>(shape)}, dropout, 0.0f, has_mean,
                                       has_shift, threads);
  }, released, "their gradients");
}
