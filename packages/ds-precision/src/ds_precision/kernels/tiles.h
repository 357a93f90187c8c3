// Products by tiles, in float32 registers whatever the tensors hold (float32, bfloat16, or small
// weights with scales): a tile of up to 14 rows by 32 columns is accumulated over the whole
// inner size. Weights are first copied, 32 columns at a time, into a panel that stays in the
// cache; for a handful of rows that copy would cost more than it saves, and the weights are
// read where they lie. Products of bfloat16 are exact in float32, so nothing is lost.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "numbers.h"
#include "threads.h"

namespace ds {

// A matrix in memory. Element (r, c) lies at row `index ? index[r] / share : r`, column c; or at
// row c, column r if it is transposed.
struct View {
  const char* data;
  Type type;
  int64_t stride;  // elements from one stored row to the next
  bool transposed = false;
  const int32_t* index = nullptr;
  int32_t share = 1;
  int64_t matrix = 0;  // bytes from one matrix of a stack to the next
  // Of small weights: for every so many rows one bfloat16 a column; of E4M3 a float32 a block.
  const char* scales = nullptr;
  int64_t scale_rows = 1, scale_stride = 0, scale_matrix = 0;  // as `stride` and `matrix`

  const char* at(int64_t row, int64_t column) const {
    const int64_t stored = (index ? index[row] / share : row) >> (type == Type::kInt4);
    return data + (stored * stride + column) * size_of(type);
  }

  View of_stack(int64_t e) const {
    View found = *this;
    found.data += e * matrix;
    if (scales) found.scales += e * scale_matrix;
    return found;
  }
};

constexpr int64_t kScaleColumns = 128;  // of a block of E4M3

// Sixteen numbers as they are stored, in a row that is even or odd; see `scales`.
template <Type type>
inline Vec unscaled(const char* from, int64_t row) {
  if constexpr (!is_small(type)) {
    return load<type>(from);
  } else {
    const Loose8& codes = *reinterpret_cast<const Loose8*>(from);
    if constexpr (type == Type::kE4M3) return eighth_powers(codes);
    if constexpr (type == Type::kInt4) return from_four_bits(widened(codes) >> (row % 2 * 4));
    if constexpr (type == Type::kInt8) return __builtin_convertvector(widened(codes), Vec);
  }
}

// What to multiply them by.
template <Type type>
inline Vec scales(const View& from, int64_t row, int64_t column, int count = kLanes) {
  const int64_t first = row / from.scale_rows * from.scale_stride;
  if constexpr (type != Type::kE4M3) {
    return load(Type::kBfloat16, from.scales + (first + column) * 2, count);
  }
  const auto* blocks = reinterpret_cast<const float*>(from.scales) + first;
  const int64_t block = column / kScaleColumns;
  Vec found = spread(blocks[block] * kEighthPower);
  for (int i = 0; i < count && (column + count - 1) / kScaleColumns != block; i++) {
    found[i] = blocks[(column + i) / kScaleColumns] * kEighthPower;
  }
  return found;
}

// Up to sixteen numbers of any view that is not transposed; zeros beyond them.
inline Vec numbers(const View& from, int64_t row, int64_t column, int count) {
  if (count <= 0) return Vec{};
  if (!is_small(from.type)) return load(from.type, from.at(row, column), count);
  alignas(kLanes) char whole[kLanes] = {};
  std::memcpy(whole, from.at(row, column), count);
  Vec found = with(from.type, [&](auto type) {
    if constexpr (!is_small(type.value)) return Vec{};
    else return unscaled<type.value>(whole, row) * scales<type.value>(from, row, column, count);
  });
  for (int i = count; i < kLanes; i++) found[i] = 0;
  return found;
}

template <Type type>
void copy_columns(const View& from, int64_t rows, int64_t column, float* to, int step) {
  Vec scale{};
  for (int64_t r = 0; r < rows; r++) {
    Vec value = unscaled<type>(from.at(r, column), r);
    if constexpr (is_small(type)) {
      if (r % kRowsTogether == 0) scale = scales<type>(from, r, column);
      value *= scale;
    }
    *reinterpret_cast<LooseVec*>(to + r * step) = value;
  }
}

// Transposes 16 x 16 numbers in registers: four rounds of swapping halves.
inline void transpose(Vec (&v)[kLanes]) {
#define SWAP(width, ...)                                         \
  for (int i = 0; i < kLanes; i++) {                             \
    if (i & width) continue;                                     \
    const Vec low = v[i], high = v[i + width];                   \
    v[i] = __builtin_shuffle(low, high, IntVec{__VA_ARGS__});    \
    v[i + width] = __builtin_shuffle(low, high, IntVec{__VA_ARGS__} + width); \
  }
  SWAP(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
  SWAP(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
  SWAP(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
  SWAP(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#undef SWAP
}

// Copies `count` (at most 16) columns from `column` on into `to`, `step` numbers a row.
void copy(const View& from, int64_t rows, int64_t column, int count, float* to, int step) {
  if (!from.transposed) {
    if (count == kLanes) {
      return with(from.type, [&](auto type) {
        copy_columns<type.value>(from, rows, column, to, step);
      });
    }
    for (int64_t r = 0; r < rows; r++) {
      *reinterpret_cast<LooseVec*>(to + r * step) = numbers(from, r, column, count);
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int wide = std::min<int64_t>(kLanes, rows - r);
    Vec block[kLanes];
    for (int c = 0; c < kLanes; c++) {
      block[c] = c < count ? load(from.type, from.at(column + c, r), wide) : Vec{};
    }
    transpose(block);
    for (int i = 0; i < wide; i++) *reinterpret_cast<LooseVec*>(to + (r + i) * step) = block[i];
  }
}

View floats(const float* data, int64_t stride) {
  return {reinterpret_cast<const char*>(data), Type::kFloat, stride};
}

// The left side of a product in float32: row by row, wherever each lies; or packed by tiles, each
// `[inner, 16]` with its rows side by side.
struct Left {
  const float* const* rows;
  const float* packed = nullptr;
};

// Brings rows [first, first + count) of the left side into float32, in place if they are.
Left left_side(const View& a, int64_t first, int64_t count, int64_t inner) {
  if (a.transposed) {  // rows are columns of what is stored
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    float* to = scratch(0, tiles * inner * kLanes);
    View stored = a;
    stored.transposed = false;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t wide = std::min<int64_t>(kTileRows, count - t * kTileRows);
      copy(stored, inner, first + t * kTileRows, wide, to + t * inner * kLanes, kLanes);
    }
    return {nullptr, to};
  }
  thread_local std::vector<const float*> rows;
  rows.resize(count);
  if (a.type == Type::kFloat) {
    for (int64_t r = 0; r < count; r++) {
      rows[r] = reinterpret_cast<const float*>(a.at(first + r, 0));
    }
    return {rows.data()};
  }
  const int64_t step = (inner + kLanes - 1) / kLanes * kLanes;
  float* to = scratch(0, count * step);
  for (int64_t r = 0; r < count; r++) {
    rows[r] = to + r * step;
    for (int64_t k = 0; k < inner; k += kLanes) {
      const int wide = std::min<int64_t>(kLanes, inner - k);
      *reinterpret_cast<LooseVec*>(to + r * step + k) = load(a.type, a.at(first + r, k), wide);
    }
  }
  return {rows.data()};
}

// What to bring into the cache meanwhile: one line for each step along the inner size.
struct Ahead {
  const char* data;
  int64_t step;
};

// Rows x 32 sums from a packed panel `[inner, 32]`.
template <int rows, bool packed>
__attribute__((always_inline)) inline void tile(const Left& a, int64_t row, const float* panel,
                                                int64_t inner, const Ahead& ahead,
                                                Vec (&sums)[rows][2]) {
  const float* from[rows];
#pragma GCC unroll 14
  for (int i = 0; i < rows; i++) {
    from[i] = packed ? a.packed + row * inner / kTileRows * kLanes : a.rows[row + i];
    sums[i][0] = sums[i][1] = Vec{};
  }
  for (int64_t k = 0; k < inner; k++) {
    __builtin_prefetch(ahead.data + k * ahead.step, 0, 2);
    const Vec b0 = *reinterpret_cast<const Vec*>(panel + k * kPanel);
    const Vec b1 = *reinterpret_cast<const Vec*>(panel + k * kPanel + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++) {
      const float value = packed ? from[0][k * kLanes + i] : from[i][k];
      sums[i][0] += value * b0;
      sums[i][1] += value * b1;
    }
  }
}

// What a product does with its sums: `put(row, column, first, second, count)`, where `first` is
// 16 sums of the columns from `column` on, `second` of those `gap` further on.
//
// A plain product's tiles are 32 columns wide and its `pair` is 0. For SwiGLU a tile holds 16
// gates and their 16 up projections; `pair` is the distance between the two.
struct Shape {
  int64_t rows, inner, pair;
  int64_t first = 0;  // what the product's row 0 is called in `put`
  int64_t width() const { return pair ? kLanes : kPanel; }  // columns a tile advances
  int64_t gap() const { return pair ? pair : kLanes; }      // from its first half to its second
};

// The sums of some rows: row i's are at `first[i * step]` and `second[i * step]`; `count` columns
// from `column` on are real.
struct Sums {
  int64_t row, rows, column, count;
  const Vec *first, *second;
  int64_t step;
};

// A reference to a `put`. Not a template's parameter: every tile would be compiled for each one.
class Put {
 public:
  template <class Function>
  Put(const Function& function)
      : function_(&function), call_([](const void* erased, const Sums& s) {
          const Function& put = *static_cast<const Function*>(erased);
          for (int64_t i = 0; i < s.rows; i++) {
            put(s.row + i, s.column, s.first[i * s.step], s.second[i * s.step], s.count);
          }
        }) {}
  void operator()(const Sums& sums) const { call_(function_, sums); }

 private:
  const void* function_;
  void (*call_)(const void*, const Sums&);
};

template <int rows>
void put_tile(const Left& a, const float* panel, const Shape& s, int64_t row, int64_t column,
              int64_t end, const Ahead& ahead, const Put& put) {
  Vec sums[rows][2];
  if (a.packed) tile<rows, true>(a, row, panel, s.inner, ahead, sums);
  else tile<rows, false>(a, row, panel, s.inner, ahead, sums);
  Vec found[rows][2];  // `sums` stay in registers as long as nobody points to them
#pragma GCC unroll 14
  for (int i = 0; i < rows; i++) {
    found[i][0] = sums[i][0];
    found[i][1] = sums[i][1];
  }
  put({s.first + row, rows, column, end - column, &found[0][0], &found[0][1], 2});
}

template <size_t... n>
auto tiles(std::index_sequence<n...>) {
  using Call = void (*)(const Left&, const float*, const Shape&, int64_t, int64_t, int64_t,
                        const Ahead&, const Put&);
  static constexpr Call calls[] = {put_tile<n + 1>...};
  return calls;
}

// Copies up to `kPanels` panels, from `column` on. Row by row over all of them, so that memory is
// read in long runs.
template <Type type>
void copy_panels(const View& b, const Shape& s, int64_t column, int64_t panels, float* to) {
  Vec scale[2][kPanels] = {};
  for (int64_t r = 0; r < s.inner; r++) {
    for (int half = 0; half < 2; half++) {
      const int64_t first = column + half * s.gap();
      const char* from = b.at(r, first);
      for (int64_t p = 0; p < panels; p++) {
        Vec value = unscaled<type>(from + p * s.width() * size_of(type), r);
        if constexpr (is_small(type)) {
          Vec& by = scale[half][p];
          if (r % kRowsTogether == 0) by = scales<type>(b, r, first + p * s.width());
          value *= by;
        }
        *reinterpret_cast<Vec*>(to + (p * s.inner + r) * kPanel + half * kLanes) = value;
      }
    }
  }
}

// The same for one panel that is transposed or has fewer than 32 columns.
void copy_panel(const View& b, const Shape& s, int64_t column, int64_t left, float* to) {
  const int64_t second = s.pair ? left : left - kLanes;
  copy(b, s.inner, column, std::min<int64_t>(kLanes, left), to, kPanel);
  copy(b, s.inner, second > 0 ? column + s.gap() : column,
       std::max<int64_t>(0, std::min<int64_t>(kLanes, second)), to + kLanes, kPanel);
}

// How many panels are packed together from `column` on.
int64_t panels_together(const Shape& s, int64_t column, int64_t end) {
  const int64_t fit = std::max<int64_t>(1, kPacked / (s.inner * kPanel + 1));
  const int64_t left = (end - column) / s.width();
  return std::max<int64_t>(1, std::min({fit, kPanels, left}));
}

// Columns [column, end) through packed panels. While some are multiplied the next ones' memory is
// asked for, at last that of `next`, if there is one.
void packed(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end,
            const Put& put, const View* next = nullptr) {
  const auto calls = tiles(std::make_index_sequence<kTileRows>());
  float* panels = scratch(1, s.inner * kPanel * kPanels);
  const int64_t begin = column;
  while (column < end) {
    const int64_t count = panels_together(s, column, end);
    if (b.transposed || end - column < s.width()) {
      for (int64_t p = 0; p < count; p++) {
        const int64_t first = column + p * s.width();
        copy_panel(b, s, first, end - first, panels + p * s.inner * kPanel);
      }
    } else {
      with(b.type, [&](auto type) { copy_panels<type.value>(b, s, column, count, panels); });
    }
    const int64_t after = column + count * s.width();
    const View* source = b.transposed || b.index ? nullptr : after < end ? &b : next;
    const int64_t from = after < end ? after : begin;
    const int64_t run = count * s.width() * size_of(b.type), runs = s.pair ? 2 : 1;
    int64_t asked = 0;  // bytes of each row
    for (int64_t row = 0; row < s.rows; row += kTileRows) {
      const int64_t high = std::min<int64_t>(kTileRows, s.rows - row);
      for (int64_t p = 0; p < count; p++, asked += 64) {
        Ahead ahead{reinterpret_cast<const char*>(panels), 0};
        if (source && asked < runs * run) {
          const char* first = source->at(0, from + asked / run * s.pair) + asked % run;
          ahead = {first, source->stride * size_of(b.type)};
        }
        calls[high - 1](a, panels + p * s.inner * kPanel, s, row, column + p * s.width(), end,
                        ahead, put);
      }
    }
    column = after;
  }
}

// Adds products of weights where they lie, over numbers [k, k + count) of the inner size, to rows x
// (2 * width) vectors of `sums`: `width` vectors at each of two places.
template <int rows, int width, Type type>
void thin(const Left& a, const View& b, int64_t k, int64_t count, int64_t c0, int64_t c1,
          const View& next, Vec* sums) {
  const int64_t step = b.stride * size_of(type);
  const char *p0 = b.at(k, c0), *p1 = b.at(k, c1);
  const int64_t n0 = next.at(0, c0) - p0, n1 = next.at(0, c1) - p1;
  Vec part[rows][2 * width] = {};
  constexpr int64_t together = rows_a_byte(type);
  for (int64_t r = 0; r < count; r += together, p0 += step, p1 += step) {
    for (int64_t ahead = 0; ahead < width * kLanes * size_of(type); ahead += 64) {
      __builtin_prefetch(p0 + n0 + ahead, 0, 2);
      __builtin_prefetch(p1 + n1 + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int v = 0; v < 2 * width; v++) {
      const char* from = v < width ? p0 + v * kLanes * size_of(type)
                                   : p1 + (v - width) * kLanes * size_of(type);
#pragma GCC unroll 2
      for (int64_t odd = 0; odd < together; odd++) {
        const Vec value = unscaled<type>(from, odd);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) part[i][v] += a.rows[i][k + r + odd] * value;
      }
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < 2 * width; v++) {
    if constexpr (is_small(type)) {
      const int64_t column = v < width ? c0 + v * kLanes : c1 + (v - width) * kLanes;
      const Vec scale = scales<type>(b, k, column);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sums[i * 2 * width + v] += part[i][v] * scale;
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sums[i * 2 * width + v] += part[i][v];
    }
  }
}

// As many columns of [column, end) as whole tiles take; returns where they stop. Weights are read
// in the order of memory, 32 rows of all the columns at a time, the next 32 asked for meanwhile.
template <int rows, Type type>
int64_t thin_rows(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end,
                  const Put& put, const View* next) {
  constexpr int width = rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
  const bool plain = s.pair == 0;
  const int64_t narrow = plain ? 2 * kLanes : kLanes, wide = width * narrow;
  const int64_t gap = plain ? kLanes : s.pair;
  const int64_t turn = column + (end - column) / wide * wide;  // from here on tiles are narrow
  const int64_t stop = turn + (end - turn) / narrow * narrow;
  const int64_t vectors = (stop - column) / narrow * 2;  // of each row
  auto* sums = reinterpret_cast<Vec*>(scratch(1, rows * vectors * kLanes));
  std::memset(sums, 0, rows * vectors * sizeof(Vec));
  for (int64_t k = 0; k < s.inner; k += kRowsTogether) {
    const int64_t count = std::min<int64_t>(kRowsTogether, s.inner - k);
    View soon = b;
    if (k + count < s.inner) soon.data = b.at(k + count, 0);
    else if (next) soon = *next;
    Vec* to = sums;
    for (int64_t c = column; c < turn; c += wide, to += rows * 2 * width) {
      thin<rows, width, type>(a, b, k, count, c, plain ? c + width * kLanes : c + s.pair, soon, to);
    }
    for (int64_t c = turn; c < stop; c += narrow, to += rows * 2) {
      thin<rows, 1, type>(a, b, k, count, c, c + gap, soon, to);
    }
  }
  const Vec* found = sums;
  for (int64_t c = column; c < turn; c += wide, found += rows * 2 * width) {
    for (int v = 0; v < (plain ? 2 * width : width); v += plain ? 2 : 1) {
      put({s.first, rows, c + v * kLanes, kPanel, found + v, found + (plain ? v + 1 : v + width),
           2 * width});
    }
  }
  for (int64_t c = turn; c < stop; c += narrow, found += rows * 2) {
    put({s.first, rows, c, kPanel, found, found + 1, 2});
  }
  return stop;
}

template <Type type, size_t... n>
auto thin_calls(std::index_sequence<n...>) {
  using Call = int64_t (*)(const Left&, const View&, const Shape&, int64_t, int64_t, const Put&,
                           const View*);
  static constexpr Call calls[] = {thin_rows<n + 1, type>...};
  return calls;
}

// Columns [column, end) of one product, all rows.
void product(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end,
             const Put& put, const View* next = nullptr) {
  if (s.rows == 0) return;
  if (s.rows <= kThinRows && !b.transposed && !b.index && !a.packed) {
    constexpr auto rows = std::make_index_sequence<kThinRows>();
    column = with(b.type, [&](auto type) {
      return thin_calls<type.value>(rows)[s.rows - 1](a, b, s, column, end, put, next);
    });
  }
  packed(a, b, s, column, end, put, next);
}

}  // namespace ds
