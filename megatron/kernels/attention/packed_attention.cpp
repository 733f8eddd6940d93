// Attention inside each protein of a packed sequence on CPUs, forward and backward (see native.py).
//
// No two units of work write to the same address, and each computes in a fixed order, so results are bitwise the same
// for any number of threads. A way is the code for one instruction set.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "packed_attention.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_WAYS 1
#include <immintrin.h>
#endif

#if HAS_X86_WAYS
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define LANES 16
#define PAIRS 1
namespace packed_attention::avx512_bf16 {
#include "packed_attention_kernels.inc"
}
#undef LANES
#undef PAIRS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LANES 16
#define PAIRS 0
namespace packed_attention::avx512 {
#include "packed_attention_kernels.inc"
}
#undef LANES
#undef PAIRS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define PAIRS 0
namespace packed_attention::avx2 {
#include "packed_attention_kernels.inc"
}
#undef LANES
#undef PAIRS
#pragma GCC pop_options
#endif

#define LANES 4
#define PAIRS 0
namespace packed_attention::portable {
#include "packed_attention_kernels.inc"
}

namespace packed_attention {
namespace {

namespace py = pybind11;

constexpr int64_t kQueriesOfUnit = 512;  // forward: enough to make the cost of packing the keys per unit negligible

template <typename Number>
using Kernel = void (*)(const Problem<Number>&, const Unit&, Scratch&);

struct Way {
  const char* name;
  bool (*is_supported)();
  Kernel<float> forward, backward;
  Kernel<uint16_t> forward_bf16, backward_bf16, forward_bf16_odd, backward_bf16_odd;  // odd: for odd widths
};

#define WAY_OF_SINGLES(space, supported)                                                                       \
  Way {                                                                                                        \
    #space, supported, space::forward<space::Singles, float>, space::backward<space::Singles, float>,          \
        space::forward<space::Singles, uint16_t>, space::backward<space::Singles, uint16_t>,                   \
        space::forward<space::Singles, uint16_t>, space::backward<space::Singles, uint16_t>                    \
  }

const Way kWays[] = {
#if HAS_X86_WAYS
    {"avx512_bf16", [] { return bool(__builtin_cpu_supports("avx512bf16")); },
     avx512::forward<avx512::Singles, float>, avx512::backward<avx512::Singles, float>,
     avx512_bf16::forward<avx512_bf16::Pairs, uint16_t>, avx512_bf16::backward<avx512_bf16::Pairs, uint16_t>,
     avx512::forward<avx512::Singles, uint16_t>, avx512::backward<avx512::Singles, uint16_t>},
    WAY_OF_SINGLES(avx512, [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }),
    WAY_OF_SINGLES(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
    WAY_OF_SINGLES(portable, [] { return true; }),
};

// Whether products of bf16 pairs are so much faster than fp32's that they pay for packing them. An AMD EPYC multiplies
// bf16 twice as fast as fp32, an Intel Xeon half as fast. The bound is far from both, so that each start, and each rank,
// finds the same.
bool pairs_pay() {
#if HAS_X86_WAYS
  constexpr double kGain = 1.4;
  constexpr int kTimes = 20;
  double pairs_s = 1, singles_s = 1;
  for (int i = 0; i < kTimes; ++i) {
    pairs_s = std::min(pairs_s, avx512_bf16::seconds_of_product<avx512_bf16::Pairs>());
    singles_s = std::min(singles_s, avx512::seconds_of_product<avx512::Singles>());
  }
  return singles_s > kGain * pairs_s;
#else
  return false;
#endif
}

// Those of this build that the processor has, the fastest first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Way& way : kWays)
    if (way.is_supported()) names.push_back(way.name);
  if (names.front() == "avx512_bf16" && !pairs_pay()) std::swap(names[0], names[1]);
  return names;
}

const Way& way_named(const std::string& name) {
  for (const Way& way : kWays)
    if (name == way.name && way.is_supported()) return way;
  throw std::invalid_argument("this processor or this build has no way '" + name + "'");
}

// The units of work for the queries from `start` to `stop`, most expensive first: at most `most` queries each, all of
// one protein and one group.
std::vector<Unit> units_of(const std::vector<int64_t>& lengths, int64_t start, int64_t stop, int64_t groups,
                           int64_t most) {
  std::vector<Unit> units;
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    const int64_t end = begin + length, last = smaller(end, stop);
    for (int64_t first = larger(begin, start); first < last; first += most)
      for (int64_t group = 0; group < groups; ++group)
        units.push_back({begin, end, first, smaller(first + most, last), group});
    begin = end;
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
    return (a.last - a.first) * (a.end - a.begin) > (b.last - b.first) * (b.end - b.begin);
  });
  return units;
}

template <typename Number>
void run(Kernel<Number> kernel, const Problem<Number>& problem, const std::vector<Unit>& units, int threads) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      Scratch scratch;
      for (size_t i; (i = next++) < units.size();) kernel(problem, units[i], scratch);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

using Place = std::tuple<uintptr_t, int64_t, int64_t>;  // address, strides of tokens and of groups in elements

template <typename Number>
Rows<Number> rows_at(const Place& place) {
  return {reinterpret_cast<Number*>(std::get<0>(place)), std::get<1>(place), std::get<2>(place)};
}

struct Call {
  std::string way;
  int threads;
  bool is_bf16;
  std::vector<int64_t> lengths;
  std::tuple<int64_t, int64_t> queries_here;           // first token, and the one after the last
  std::tuple<int64_t, int64_t, int64_t> shape;         // groups, query heads per group, head width
  std::tuple<int64_t, int64_t> window;
  std::tuple<uint64_t, uint32_t, int64_t> dropout;     // seed, how many of 65,536 are kept, first head
};

template <typename Number>
void attend(const Call& call, const std::vector<Place>& places, uintptr_t statistics, bool goes_back) {
  const auto [groups, queries, width] = call.shape;
  const auto [start, stop] = call.queries_here;
  Problem<Number> problem{groups, queries, width, std::get<0>(call.window), std::get<1>(call.window), start,
                          1.0f / std::sqrt(float(width)), {std::get<0>(call.dropout), std::get<1>(call.dropout), std::get<2>(call.dropout)},
                          rows_at<Number>(places[0]), rows_at<Number>(places[1]), rows_at<Number>(places[2]),
                          reinterpret_cast<float*>(statistics), {}, {}, {}};
  if (goes_back) {
    problem.grad_context = rows_at<Number>(places[3]);
    problem.grad_query = rows_at<Number>(places[4]);
    problem.grad_key_value = rows_at<Number>(places[5]);
  }
  const Way& way = way_named(call.way);
  Kernel<Number> kernel;
  if constexpr (std::is_same_v<Number, float>)
    kernel = goes_back ? way.backward : way.forward;
  else if (width % 2)
    kernel = goes_back ? way.backward_bf16_odd : way.forward_bf16_odd;
  else
    kernel = goes_back ? way.backward_bf16 : way.forward_bf16;
  // The gradients of a protein's keys are sums over all its queries, so one unit has to compute them.
  const int64_t most = goes_back ? INT64_MAX / 2 : kQueriesOfUnit;
  const std::vector<Unit> units = units_of(call.lengths, start, stop, groups, most);
  run(kernel, problem, units, std::max(1, std::min<int>(call.threads, units.size())));
}

}  // namespace
}  // namespace packed_attention

PYBIND11_MODULE(_packed_attention, m) {
  using namespace packed_attention;
  m.doc() = "Attention inside each protein of a packed sequence (see megatron/kernels/attention/native.py).";
  m.def("instruction_sets", &instruction_sets, "those of this build that the processor has, the fastest first");
  m.def("attend", [](const std::string& way, int threads, bool is_bf16, const std::vector<int64_t>& lengths,
                     std::tuple<int64_t, int64_t> queries_here, std::tuple<int64_t, int64_t, int64_t> shape,
                     std::tuple<int64_t, int64_t> window, std::tuple<uint64_t, uint32_t, int64_t> dropout,
                     const std::vector<Place>& places, uintptr_t statistics) {
    const Call call{way, threads, is_bf16, lengths, queries_here, shape, window, dropout};
    const py::gil_scoped_release release;
    if (is_bf16) attend<uint16_t>(call, places, statistics, places.size() > 3);
    else attend<float>(call, places, statistics, places.size() > 3);
  }, "fills the context and statistics, or, given six places, the gradients");
}
