// Conversions between fp32 and bf16 for the C++ helper, and the attributes that make the compiler vectorise it.

#pragma once

#include <cstdint>
#include <cstring>

// CLONED functions are compiled for several instruction sets; the processor's is chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif
#define INLINE inline __attribute__((always_inline))

INLINE float number_of(float number) { return number; }
INLINE float number_of(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &word, 4);
  return number;
}
INLINE void put(float* place, float number) { *place = number; }
INLINE void put(uint16_t* place, float number) {  // rounds to the nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &number, 4);
  *place = number != number ? 0x7FC0 : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
