// Products of bfloat16 by the instructions that newer x86 processors have for them, which multiply
// pairs of neighbours of the inner size and sum in float32. On a matrix unit (AMX) one instruction
// does 16 rows by 16 columns over 32 numbers, elsewhere (AVX-512 BF16) one row over 2.
//
// Both sides are packed into tiles of a kilobyte, zeros beyond their edges. On the right, the two
// of a pair lie side by side, as either instruction wants them.

#pragma once

#include "tiles.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#define DS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ds {

constexpr int64_t kTileInner = 32;                  // numbers of the inner size in a tile
constexpr int64_t kTile = kLanes * kTileInner;      // and in all of it
constexpr int64_t kRightTiles = 512;                // packed together, to stay in the cache

int64_t tiles_of(int64_t inner) { return (inner + kTileInner - 1) / kTileInner; }

#ifdef DS_AMX

// Linux gives a process the tiles when it asks for them.
bool has_matrix_unit() {
  static const bool has = [] {
    constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  }();
  return has;
}

// All eight tiles at their full size, for as long as this lives.
class TilesInUse {
 public:
  TilesInUse() {
    if (!has_matrix_unit()) return;
    struct { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {};
             uint8_t rows[16] = {}; } shape;
    for (int i = 0; i < 8; i++) {
      shape.bytes[i] = 64;
      shape.rows[i] = 16;
    }
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() {
    if (has_matrix_unit()) _tile_release();
  }
};

// Row tiles x 2 tiles of sums into `sums [16 * row_tiles, 32]`. `step` numbers lie between the
// left side's row tiles.
template <int row_tiles>
void multiply_in_unit(const uint16_t* a, int64_t step, const uint16_t* b, int64_t blocks,
                      float* sums) {
  asm volatile("" ::: "memory");  // loading a tile does not tell the compiler that it reads
  _tile_zero(0);
  _tile_zero(1);
  if (row_tiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < blocks; k++) {
    _tile_loadd(6, b + 2 * k * kTile, 64);
    _tile_loadd(4, a + k * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + (2 * k + 1) * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (row_tiles == 2) {
      _tile_loadd(5, a + step + k * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kLanes, 128);
  if (row_tiles == 2) {
    _tile_stored(2, sums + 2 * kLanes * kLanes, 128);
    _tile_stored(3, sums + 2 * kLanes * kLanes + kLanes, 128);
  }
}

#else

bool has_matrix_unit() { return false; }
struct TilesInUse {};
template <int row_tiles>
void multiply_in_unit(const uint16_t*, int64_t, const uint16_t*, int64_t, float*) {}

#endif

#ifdef __AVX512BF16__

// Intel's processors do half as much a second by these as in float32, AMD's twice as much.
bool has_vector_pairs() { return __builtin_cpu_is("amd"); }

// The same in vector registers, `rows` of a row tile at a time.
template <int row_tiles>
void multiply_in_vectors(const uint16_t* a, int64_t step, const uint16_t* b, int64_t blocks,
                         float* sums) {
  constexpr int rows = kLanes / 2;  // 16 sums and a pair of right sides in 32 registers
  for (int part = 0; part < 2 * row_tiles; part++) {
    const uint16_t* from = a + part / 2 * step + part % 2 * rows * kTileInner;
    __m512 total[rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) total[i][0] = total[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < blocks; k++) {
      const uint16_t *left = from + k * kTile, *right = b + 2 * k * kTile;
      for (int pair = 0; pair < kLanes; pair++) {
        const auto b0 = (__m512bh)_mm512_loadu_si512(right + pair * kTileInner);
        const auto b1 = (__m512bh)_mm512_loadu_si512(right + kTile + pair * kTileInner);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
          int32_t both;
          std::memcpy(&both, left + i * kTileInner + 2 * pair, 4);
          const auto row = (__m512bh)_mm512_set1_epi32(both);
          total[i][0] = _mm512_dpbf16_ps(total[i][0], row, b0);
          total[i][1] = _mm512_dpbf16_ps(total[i][1], row, b1);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      _mm512_storeu_ps(sums + (part * rows + i) * kPanel, total[i][0]);
      _mm512_storeu_ps(sums + (part * rows + i) * kPanel + kLanes, total[i][1]);
    }
  }
}

#else

bool has_vector_pairs() { return false; }
template <int row_tiles>
void multiply_in_vectors(const uint16_t*, int64_t, const uint16_t*, int64_t, float*) {}

#endif

template <int row_tiles>
void multiply_tiles(const uint16_t* a, int64_t step, const uint16_t* b, int64_t blocks,
                    float* sums) {
  if (has_matrix_unit()) multiply_in_unit<row_tiles>(a, step, b, blocks, sums);
  else multiply_in_vectors<row_tiles>(a, step, b, blocks, sums);
}

bool has_pairs() { return has_matrix_unit() || has_vector_pairs(); }

bool narrow(Type type) { return type == Type::kBfloat16 || type == Type::kRounded; }

// Whether such a product is done in pairs. Few rows are bound by reading the weights. Small weights
// are rounded to bfloat16 on their way, as a cast of them would.
bool in_pairs(const View& a, const View& b, int64_t rows) {
  return rows > kThinRows && narrow(a.type) && (narrow(b.type) || is_small(b.type)) &&
         has_pairs();
}

typedef uint16_t Halves __attribute__((vector_size(64), may_alias));  // 32 of bfloat16

// Two vectors as bfloat16, one after the other.
inline Halves rounded(Vec low, Vec high) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  return Halves{};  // never called: nothing is packed for instructions that aren't there
#endif
}

// Numbers 0, 16, 1, 17, ... of 32.
inline Vec paired(Halves numbers) {
  Halves order;
  for (int i = 0; i < kLanes; i++) {
    order[2 * i] = i;
    order[2 * i + 1] = i + kLanes;
  }
  return (Vec)__builtin_shuffle(numbers, order);
}

// Sixteen stored rows from `row` on, 32 numbers of each from `column` on.
template <Type type>
inline void load_pairs(const View& from, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       Vec (&pairs)[kLanes]) {
  for (int i = 0; i < kLanes; i++) {
    pairs[i] = Vec{};
    if (i >= rows || columns <= 0) continue;
    const char* at = from.at(row + i, column);
    if (type == Type::kBfloat16 && columns >= kTileInner) {
      std::memcpy(&pairs[i], at, 64);
    } else if (columns >= kTileInner) {
      pairs[i] = (Vec)rounded(load<Type::kFloat>(at), load<Type::kFloat>(at + kLanes * 4));
    } else {
      const Vec low = load(type, at, std::min<int64_t>(columns, kLanes));
      const Vec high = load(type, at + kLanes * size_of(type),
                            std::max<int64_t>(0, std::min<int64_t>(columns - kLanes, kLanes)));
      pairs[i] = (Vec)rounded(low, high);
    }
  }
}

inline void store_tile(const Vec (&rows)[kLanes], uint16_t* to) {
  for (int i = 0; i < kLanes; i++) *reinterpret_cast<Vec*>(to + i * kTileInner) = rows[i];
}

// Stored rows [row, row + 32) side by side in pairs, `count` columns from `column` on.
template <Type type>
inline void pair_rows(const View& from, int64_t row, int64_t rows, int64_t column, int64_t count,
                      Vec (&pairs)[kLanes]) {
  if (rows >= kTileInner && count >= kLanes) {
    Vec scale{};  // of all 32 rows
    if constexpr (is_small(type)) scale = scales<type>(from, row, column);
    for (int i = 0; i < kLanes; i++) {
      const char *even = from.at(row + 2 * i, column), *odd = from.at(row + 2 * i + 1, column);
      if (!from.index) {  // what is wanted after these rows
        __builtin_prefetch(even + kTileInner * from.stride * size_of(type), 0, 2);
        __builtin_prefetch(odd + kTileInner * from.stride * size_of(type), 0, 2);
      }
      Halves both;
      if constexpr (is_small(type)) {
        both = rounded(unscaled<type>(even, 0) * scale, unscaled<type>(odd, 1) * scale);
      } else if constexpr (type == Type::kBfloat16) {
        std::memcpy(&both, even, 32);
        std::memcpy(reinterpret_cast<char*>(&both) + 32, odd, 32);
      } else {
        both = rounded(load<Type::kFloat>(even), load<Type::kFloat>(odd));
      }
      pairs[i] = paired(both);
    }
    return;
  }
  for (int i = 0; i < kLanes; i++) {
    Vec two[2] = {};
    for (int n = 0; n < 2; n++) {
      if (2 * i + n >= rows || count <= 0) continue;
      two[n] = numbers(from, row + 2 * i + n, column, std::min<int64_t>(count, kLanes));
    }
    pairs[i] = paired(rounded(two[0], two[1]));
  }
}

// Tile `k` of a panel of a right side: two times 16 columns from `column` on,
// of which `left` are real.
template <Type type>
void pack_right(const View& b, const Shape& s, int64_t k, int64_t column, int64_t left,
                uint16_t* to) {
  for (int half = 0; half < 2; half++) {
    const int64_t first = column + half * s.gap();
    const int64_t count = s.pair || half == 0 ? left : left - kLanes;
    Vec tile[kLanes];
    if (!b.transposed) {
      pair_rows<type>(b, k * kTileInner, s.inner - k * kTileInner, first, count, tile);
    } else if constexpr (!is_small(type)) {
      load_pairs<type>(b, first, count, k * kTileInner, s.inner - k * kTileInner, tile);
      transpose(tile);
    }
    store_tile(tile, to + half * kTile);
  }
}

// Panels `[inner / 32][2][16, 16 pairs]` of columns [column, end), one after another. All of them
// row by row, so that memory is read in long runs.
void pack_right(const View& b, const Shape& s, int64_t column, int64_t end, uint16_t* to) {
  const int64_t blocks = tiles_of(s.inner);
  for (int64_t k = 0; k < blocks; k++) {
    uint16_t* at = to + 2 * k * kTile;
    for (int64_t c = column; c < end; c += s.width(), at += 2 * blocks * kTile) {
      with(b.type, [&](auto type) { pack_right<type.value>(b, s, k, c, end - c, at); });
    }
  }
}

// Rows [first, first + count) of a left side: `[count / 16][inner / 32][16, 32]`.
template <Type type>
void pack_left(const View& a, int64_t first, int64_t count, int64_t inner, uint16_t* to) {
  for (int64_t row = 0; row < count; row += kLanes) {
    for (int64_t k = 0; k < inner; k += kTileInner, to += kTile) {
      Vec tile[kLanes];
      if (a.transposed) {
        View stored = a;
        stored.transposed = false;
        pair_rows<type>(stored, k, inner - k, first + row, count - row, tile);
        transpose(tile);
      } else {
        load_pairs<type>(a, first + row, count - row, k, inner - k, tile);
      }
      store_tile(tile, to);
    }
  }
}

// A packed left side, and a matrix unit in use for as long as this lives.
class LeftTiles {
 public:
  LeftTiles(const View& a, int64_t first, int64_t rows, int64_t inner)
      : rows_(rows), blocks_(tiles_of(inner)) {
    auto* to = reinterpret_cast<uint16_t*>(scratch(0, (rows + kLanes - 1) / kLanes * step() / 2));
    if (a.type == Type::kBfloat16) pack_left<Type::kBfloat16>(a, first, rows, inner, to);
    else pack_left<Type::kRounded>(a, first, rows, inner, to);
    packed_ = to;
  }

  struct Place { int64_t column, end, row; };  // what the product's corner is called in `put`

  // All rows times one panel.
  void multiply(const uint16_t* panel, const Place& at, const Put& put) const {
    alignas(64) float sums[2 * kLanes * kPanel];
    for (int64_t row = 0; row < rows_; row += 2 * kLanes) {
      const uint16_t* from = packed_ + row / kLanes * step();
      if (rows_ - row > kLanes) multiply_tiles<2>(from, step(), panel, blocks_, sums);
      else multiply_tiles<1>(from, step(), panel, blocks_, sums);
      const auto* found = reinterpret_cast<const Vec*>(sums);
      put({at.row + row, std::min<int64_t>(2 * kLanes, rows_ - row), at.column, at.end - at.column,
           found, found + 1, 2});
    }
  }

 private:
  int64_t step() const { return blocks_ * kTile; }  // from one 16 rows to the next

  int64_t rows_, blocks_;
  const uint16_t* packed_;
  TilesInUse tiles_;
};

// Rows [first, first + s.rows) of `a` times columns [column, end) of `b`.
void product_of_tiles(const View& a, int64_t first, const View& b, const Shape& s, int64_t column,
                      int64_t end, const Put& put) {
  const LeftTiles left(a, first, s.rows, s.inner);
  const int64_t panel = 2 * std::max<int64_t>(1, tiles_of(s.inner)) * kTile;  // an expert may rest
  const int64_t together = std::max<int64_t>(1, std::min(kPanels, kRightTiles * kTile / panel));
  auto* right = reinterpret_cast<uint16_t*>(scratch(1, together * panel / 2));
  while (column < end) {
    const int64_t stop = std::min(end, column + together * s.width());
    pack_right(b, s, column, stop, right);
    for (const uint16_t* at = right; column < stop; column += s.width(), at += panel) {
      left.multiply(at, {column, end, s.first}, put);
    }
  }
}

// Rows [first, first + s.rows) of `a` times columns [column, end) of `b`, told to `put`. `next` may
// be a right side that is wanted soon.
void product(const View& a, int64_t first, const View& b, const Shape& s, int64_t column,
             int64_t end, const Put& put, const View* next = nullptr) {
  if (in_pairs(a, b, s.rows)) return product_of_tiles(a, first, b, s, column, end, put);
  product(left_side(a, first, s.rows, s.inner), b, s, column, end, put, next);
}

}  // namespace ds
