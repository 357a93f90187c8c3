// Sixteen numbers at a time: loading, storing and rounding them, and the functions of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace ds {

// Compilers turn these into one AVX-512 register, two AVX2 ones or four of NEON.
typedef float Vec __attribute__((vector_size(64)));
typedef float LooseVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t Loose16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t Loose8 __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int kLanes = 16;
#ifdef __AVX512F__
constexpr int kTileRows = 14;  // 28 of 32 registers hold sums
#else
constexpr int kTileRows = 3;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a tile
constexpr int64_t kPanels = 8;       // most panels packed together
constexpr int64_t kPacked = 192 * 1024;  // and most numbers in them, to stay in the cache
constexpr int kThinRows = 8;        // up to here weights are read where they lie
constexpr int kRowBlock = 1008;     // most rows that share a packed panel
constexpr int kRowsTogether = 32;   // of weights, read where they lie; scales span whole ones

// `kRounded` is float32 in memory and bfloat16 in the product. The three small ones are weights with
// scales: whole numbers of 8 bits; of 4 bits, two rows in one row of bytes, the even one in the low
// halves; and E4M3.
enum class Type { kFloat, kBfloat16, kRounded, kInt8, kInt4, kE4M3 };

constexpr bool is_small(Type type) { return type >= Type::kInt8; }

// Bytes that hold a number, or two of 4 bits.
constexpr int64_t size_of(Type type) {
  return is_small(type) ? 1 : type == Type::kBfloat16 ? 2 : 4;
}

constexpr int64_t rows_a_byte(Type type) { return type == Type::kInt4 ? 2 : 1; }

// The bits of the nearest bfloat16, ties to even, in the upper halves; NaN stays NaN.
inline auto nearest_bfloat16(Vec value) {
  const BitVec bits = (BitVec)value;
  const BitVec nan = (BitVec)(value != value);
  const BitVec near = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return (near & ~nan) | (nan & 0x7fc00000);
}

// Compilers take these apart where the processor has one instruction for them.
#ifdef __AVX512BW__
inline BitVec widened(const Loose16& from) {
  return (BitVec)_mm512_cvtepu16_epi32((__m256i)from);
}
inline IntVec widened(const Loose8& from) { return (IntVec)_mm512_cvtepi8_epi32((__m128i)from); }
#else
inline BitVec widened(const Loose16& from) { return __builtin_convertvector(from, BitVec); }
inline IntVec widened(const Loose8& from) { return __builtin_convertvector(from, IntVec); }
#endif
#ifdef __AVX512BF16__
inline Loose16 narrowed(Vec value) { return (Loose16)_mm512_cvtneps_pbh((__m512)value); }
#else
inline Loose16 narrowed(Vec value) {
  return __builtin_convertvector(nearest_bfloat16(value) >> 16, Loose16);
}
#endif

inline Vec spread(float value) { return value - Vec{}; }

// E4M3 2^8 times too small: its bits as float16, whose exponents run further.
inline Vec eighth_powers(const Loose8& codes) {
#ifdef __AVX512BW__
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16((__m128i)codes), 7);
  return (Vec)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(0xbfff - 0x10000)));
#else
  const IntVec wide = widened(codes);
  const IntVec magnitude = wide & 0x7f;
  // Made as normal numbers, for threads that take subnormal ones for zeros.
  const Vec tiny = __builtin_convertvector(magnitude, Vec) * 0x1p-17f;
  const Vec normal = (Vec)((magnitude << 20) + (112 << 23));
  const BitVec sign = (BitVec)wide & 0x80000000u;
  return (Vec)((BitVec)(magnitude < 8 ? tiny : normal) | sign);
#endif
}
constexpr float kEighthPower = 256;

// What the low 4 bits stand for, 8 being zero.
inline Vec from_four_bits(IntVec codes) {
  const Vec numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
#ifdef __AVX512F__
  return (Vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)numbers);  // looks at 4 bits only
#else
  return __builtin_shuffle(numbers, codes & 15);
#endif
}

// Calls `visit` with a type as a constant.
template <class Visit>
inline auto with(Type type, const Visit& visit) {
  switch (type) {
    case Type::kFloat: return visit(std::integral_constant<Type, Type::kFloat>{});
    case Type::kBfloat16: return visit(std::integral_constant<Type, Type::kBfloat16>{});
    case Type::kRounded: return visit(std::integral_constant<Type, Type::kRounded>{});
    case Type::kInt8: return visit(std::integral_constant<Type, Type::kInt8>{});
    case Type::kInt4: return visit(std::integral_constant<Type, Type::kInt4>{});
    default: return visit(std::integral_constant<Type, Type::kE4M3>{});
  }
}

template <Type type>
inline Vec load(const char* from) {
  if constexpr (type == Type::kFloat) return *reinterpret_cast<const LooseVec*>(from);
  if constexpr (type == Type::kRounded) {
    return (Vec)nearest_bfloat16(*reinterpret_cast<const LooseVec*>(from));
  }
  if constexpr (type == Type::kBfloat16) {
    return (Vec)(widened(*reinterpret_cast<const Loose16*>(from)) << 16);
  }
}

inline Vec load(Type type, const char* from, int count = kLanes) {
  alignas(64) char whole[64];
  if (count < kLanes) {
    std::memset(whole, 0, sizeof(whole));
    std::memcpy(whole, from, count * size_of(type));
    from = whole;
  }
  switch (type) {
    case Type::kFloat: return load<Type::kFloat>(from);
    case Type::kBfloat16: return load<Type::kBfloat16>(from);
    default: return load<Type::kRounded>(from);
  }
}

inline void store(Type type, char* to, Vec value, int count = kLanes) {
  if (type == Type::kFloat) {
    if (count == kLanes) *reinterpret_cast<LooseVec*>(to) = value;
    else std::memcpy(to, &value, count * 4);
  } else {
    const Loose16 small = narrowed(value);
    if (count == kLanes) *reinterpret_cast<Loose16*>(to) = small;
    else std::memcpy(to, &small, count * 2);
  }
}

// e^x to 2 units in the last place; arguments outside float32's range end at its limits.
inline Vec exponential(Vec x) {
  x = x > 88.f ? spread(88.f) : x;
  x = x < -87.f ? spread(-87.f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum's low bits are round(x)
  const Vec whole = shifted - 12582912.f;
  Vec r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const BitVec power = ((BitVec)shifted + 127u) << 23;
  return p * (Vec)power;
}

inline Vec root(Vec x) {
  for (int i = 0; i < kLanes; i++) x[i] = std::sqrt(x[i]);
  return x;
}

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exponential(-x)); }

inline float sum(Vec value) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += value[i];
  return total;
}

}  // namespace ds
