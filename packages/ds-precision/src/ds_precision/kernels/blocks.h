// Numbers of 8 bits with one scale a block: rounding to them, and reading them back.

#pragma once

#include <limits>

#include "numbers.h"
#include "threads.h"

namespace ds {

// A format of 8 bits: a sign, an exponent, `mantissa` bits; `bias` is the exponent's.
struct Small {
  float max;
  int mantissa, bias;

  float normal() const { return std::ldexp(1.f, 1 - bias); }  // the smallest normal number
  float step() const { return std::ldexp(1.f, 1 - bias - mantissa); }  // below it
};

constexpr Small kE4M3{448.f, 3, 7};
constexpr Small kE5M2{57344.f, 2, 15};

// The nearest codes, ties to even; what is too large saturates, NaN is NaN.
inline IntVec encode(Vec value, const Small& to) {
  const BitVec sign = ((BitVec)value >> 24) & 0x80;
  const BitVec nan = (BitVec)(value != value) & 0x7f;
  value = (Vec)((BitVec)value & 0x7fffffff);
  value = value > to.max ? spread(to.max) : value;
  const BitVec bits = (BitVec)value;
  const int shift = 23 - to.mantissa;
  const BitVec half = BitVec{} + ((1u << (shift - 1)) - 1u);
  const BitVec normal =
      ((bits + half + ((bits >> shift) & 1)) >> shift) - ((127u - to.bias) << to.mantissa);
  // Added to this number, the sum's last bit is the format's spacing there.
  const Vec raise = spread(std::ldexp(to.step(), 23));
  const BitVec tiny = (BitVec)(value + raise) - (BitVec)raise;
  const BitVec code = value < to.normal() ? tiny : normal;
  return (IntVec)((code & ~(BitVec)(nan != 0)) | nan | sign);
}

inline Vec decode(IntVec codes, const Small& from) {
  const IntVec magnitude = codes & 0x7f;
  const BitVec sign = ((BitVec)codes & 0x80) << 24;
  const Vec tiny = __builtin_convertvector(magnitude, Vec) * from.step();
  const Vec normal = (Vec)(((BitVec)magnitude << (23 - from.mantissa)) + ((127u - from.bias) << 23));
  const IntVec top = IntVec{} + (from.mantissa == 3 ? 0x7f : 0x7c);  // the first that is no number
  const Vec found = magnitude < (1 << from.mantissa) ? tiny : normal;
  const IntVec beyond = from.mantissa == 3 ? magnitude >= top : magnitude > top;
  const IntVec infinite = from.mantissa == 3 ? IntVec{} : magnitude == top;
  const Vec all = infinite ? spread(std::numeric_limits<float>::infinity()) : found;
  return (Vec)((BitVec)(beyond ? spread(std::nanf("")) : all) | sign);
}

inline void store_codes(char* to, IntVec codes, int count) {
#ifdef __AVX512F__
  const __m128i packed = _mm512_cvtepi32_epi8((__m512i)codes);
#else
  const Loose8 packed = __builtin_convertvector(codes, Loose8);
#endif
  if (count == kLanes) std::memcpy(to, &packed, kLanes);
  else std::memcpy(to, &packed, count);
}

inline IntVec load_codes(const char* from, int count) {
  alignas(16) char whole[kLanes] = {};
  std::memcpy(whole, from, count);
  return widened(*reinterpret_cast<const Loose8*>(whole)) & 0xff;
}

// Matrices `[count, rows, columns]` in blocks of `high` x `wide`, `[count, down, across]` of them.
struct Blocks {
  int64_t count, rows, columns, high, wide;
  int64_t down() const { return (rows + high - 1) / high; }
  int64_t across() const { return (columns + wide - 1) / wide; }
};

// The scale of a block whose largest magnitude is `top`; see `quantize_blocks` in Python.
inline float scale_of(float top, const Small& to, bool power_of_two) {
  if (!(top <= std::numeric_limits<float>::max())) return std::nanf("");
  if (!power_of_two) return top == 0.f ? 1.f : std::max(top / to.max, 0x1p-126f);
  uint32_t bits;
  const float least = std::max(top, 1e-4f) / to.max;
  std::memcpy(&bits, &least, 4);
  bits = (bits + 0x7fffff) & 0xff800000;  // up to the next power
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

void quantize(const char* x, Type type, const Blocks& b, const Small& to, bool power_of_two,
              char* values, float* scales) {
  const int64_t padded = (b.columns + kLanes - 1) / kLanes * kLanes;
  const int64_t down = b.down(), across = b.across();
  // Rows of blocks; a thread takes several where they are low.
  const int64_t together = std::max<int64_t>(1, 32 / b.high), all = b.count * down;
  Threads::shared().run((all + together - 1) / together, [&](int64_t task) {
    float* top = scratch(0, 2 * padded);  // of each column
    float* scale = top + padded;
    for (int64_t p = task * together; p < std::min(all, (task + 1) * together); p++) {
      const int64_t first = p / down * b.rows + p % down * b.high;
      const int64_t end = std::min(first + b.high, (p / down + 1) * b.rows);
      std::fill(top, top + padded, 0.f);
      for (int64_t r = first; r < end; r++) {
        for (int64_t c = 0; c < b.columns; c += kLanes) {
          const int real = std::min<int64_t>(kLanes, b.columns - c);
          const Vec value = load(type, x + (r * b.columns + c) * size_of(type), real);
          Vec size = (Vec)((BitVec)value & 0x7fffffff);
          size = size == size ? size : spread(std::numeric_limits<float>::infinity());
          Vec& most = *reinterpret_cast<Vec*>(top + c);
          most = size > most ? size : most;
        }
      }
      for (int64_t q = 0; q < across; q++) {
        const int64_t left = q * b.wide, right = std::min(b.columns, left + b.wide);
        const float found =
            scale_of(*std::max_element(top + left, top + right), to, power_of_two);
        scales[p * across + q] = found;
        std::fill(scale + left, scale + right, found);
      }
      std::fill(scale + b.columns, scale + padded, 1.f);
      for (int64_t r = first; r < end; r++) {
        for (int64_t c = 0; c < b.columns; c += kLanes) {
          const int real = std::min<int64_t>(kLanes, b.columns - c);
          const int64_t at = r * b.columns + c;
          const Vec value = load(type, x + at * size_of(type), real);
          store_codes(values + at, encode(value / *reinterpret_cast<Vec*>(scale + c), to), real);
        }
      }
    }
  });
}

void dequantize(const char* values, const float* scales, const Blocks& b, const Small& from,
                Type type, char* y) {
  const int64_t padded = (b.columns + kLanes - 1) / kLanes * kLanes;
  const int64_t down = b.down(), across = b.across();
  shared_rows(b.count * b.rows, [&](int64_t first, int64_t end) {
    float* scale = scratch(0, padded);
    int64_t filled = -1;
    for (int64_t r = first; r < end; r++) {
      const int64_t p = r / b.rows * down + r % b.rows / b.high;
      if (p != filled) {
        for (int64_t q = 0; q < across; q++) {
          std::fill(scale + q * b.wide, scale + std::min(b.columns, (q + 1) * b.wide),
                    scales[p * across + q]);
        }
        filled = p;
      }
      for (int64_t c = 0; c < b.columns; c += kLanes) {
        const int real = std::min<int64_t>(kLanes, b.columns - c);
        const int64_t at = r * b.columns + c;
        const Vec value = decode(load_codes(values + at, real), from);
        store(type, y + at * size_of(type), value * *reinterpret_cast<Vec*>(scale + c), real);
      }
    }
  });
}

}  // namespace ds
