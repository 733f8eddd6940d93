// Numbers of fp32 and bf16 for the compiled helper, and what makes vectors of plain loops.

#pragma once

#include <cstdint>
#include <cstring>

// A function that is compiled for several sets of instructions; the processor's is chosen when it is loaded.
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
