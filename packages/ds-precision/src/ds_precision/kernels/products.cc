// Matrix products that stock TensorFlow has no fast kernel for: few rows against many weights,
// and groups of rows against stacked experts, forward and backward.
//
// One algorithm, in float32 registers whatever the tensors hold (float32, bfloat16, or 8-bit
// weights with scales): a tile of up to 14 rows by 32 columns is accumulated over the whole
// inner size. Weights are first copied, 32 columns at a time, into a panel that stays in the
// cache; for a handful of rows that copy would cost more than it saves, and the weights are
// read where they lie. Products of bfloat16 are exact in float32, so nothing is lost.
//
// Results do not depend on the number of threads: each output is summed by one thread, in the
// order of the experts.
//
// Letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
// A = T*K assignments.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"

namespace {

// ---------------------------------------------------------------- sixteen numbers at a time

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
constexpr int kScaleRows = 32;      // rows of an 8-bit weight under one scale

// `kRounded` is float32 in memory and bfloat16 in the product.
enum class Type { kFloat, kBfloat16, kInt8, kRounded };

constexpr int64_t size_of(Type type) {
  return type == Type::kBfloat16 ? 2 : type == Type::kInt8 ? 1 : 4;
}

// The bits of the nearest bfloat16, ties to even, in the upper halves; NaN stays NaN.
inline auto nearest_bfloat16(Vec value) {
  const BitVec bits = (BitVec)value;
  const BitVec nan = (BitVec)(value != value);
  const BitVec near = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return (near & ~nan) | (nan & 0x7fc00000);
}

template <Type type>
inline Vec load(const char* from) {
  if constexpr (type == Type::kFloat) return *reinterpret_cast<const LooseVec*>(from);
  if constexpr (type == Type::kRounded) {
    return (Vec)nearest_bfloat16(*reinterpret_cast<const LooseVec*>(from));
  }
  if constexpr (type == Type::kBfloat16) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const Loose16*>(from), BitVec) << 16);
  }
  if constexpr (type == Type::kInt8) {
    return __builtin_convertvector(
        __builtin_convertvector(*reinterpret_cast<const Loose8*>(from), IntVec), Vec);
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
    case Type::kRounded: return load<Type::kRounded>(from);
    default: return load<Type::kInt8>(from);
  }
}

inline void store(Type type, char* to, Vec value, int count = kLanes) {
  if (type == Type::kFloat) {
    if (count == kLanes) *reinterpret_cast<LooseVec*>(to) = value;
    else std::memcpy(to, &value, count * 4);
  } else {
    const Loose16 small = __builtin_convertvector(nearest_bfloat16(value) >> 16, Loose16);
    std::memcpy(to, &small, count * 2);
  }
}

inline Vec spread(float value) { return value - Vec{}; }

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

// ---------------------------------------------------------------- threads

// TensorFlow's own pool takes as long to wake as a small product to compute. These threads
// watch for work for some microseconds before they sleep.
class Threads {
 public:
  static Threads& shared() {
    static Threads* threads = new Threads;  // lives as long as the process
    return *threads;
  }

  void resize(int count) {
    std::lock_guard<std::mutex> busy(running_);
    for (; started_ < count - 1; started_++) std::thread([this] { work(); }).detach();
    allowed_ = count;
  }

  int count() const { return allowed_; }

  // Calls `task(0)` to `task(count - 1)`, in any order, on all threads.
  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> busy(running_, std::try_to_lock);
    if (count < 2 || allowed_ < 2 || !busy.owns_lock()) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    task_ = &task;
    count_ = count;
    next_ = 0;
    open_ = true;
    round_++;
    if (sleeping_) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take();
    open_ = false;
    while (active_) pause();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void take() {
    for (int64_t i = next_++; i < count_; i = next_++) (*task_)(i);
  }

  void work() {
    uint64_t seen = 0;
    while (true) {
      for (int spin = 0; spin < kSpins && round_ == seen; spin++) pause();
      if (round_ == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_++;
        wake_.wait(lock, [&] { return round_ != seen; });
        sleeping_--;
      }
      seen = round_;
      active_++;
      if (open_) take();  // checked after `active_` is up, so `run` can't return meanwhile
      active_--;
    }
  }

  static constexpr int kSpins = 2000;  // some 100 microseconds
  std::mutex running_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0}, sleeping_{0};
  std::atomic<bool> open_{false};
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  int started_ = 0, allowed_ = 1;
};

// A thread's own buffers; they grow to the largest size asked for. 0: the left side of a product,
// 1: its panels, 2 and on: what an operation keeps between its products.
float* scratch(int which, int64_t count) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  thread_local std::unique_ptr<float, Free> buffers[5];
  thread_local int64_t sizes[5] = {};
  if (sizes[which] < count) {
    const int64_t bytes = (count * 4 + 63) / 64 * 64;
    buffers[which].reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    sizes[which] = count;
  }
  return buffers[which].get();
}

// ---------------------------------------------------------------- where numbers lie

// A matrix in memory. Element (r, c) lies at row `index ? index[r] / share : r`, column c; or at
// row c, column r if it is transposed.
struct View {
  const char* data;
  Type type;
  int64_t stride;  // elements from one stored row to the next
  bool transposed = false;
  const int32_t* index = nullptr;
  int32_t share = 1;
  const float* scales = nullptr;  // [rows / 32, stride], of 8-bit weights

  const char* at(int64_t row, int64_t column) const {
    const int64_t stored = index ? index[row] / share : row;
    return data + (stored * stride + column) * size_of(type);
  }
};

template <Type type>
void copy_columns(const View& from, int64_t rows, int64_t column, float* to, int step) {
  for (int64_t r = 0; r < rows; r++) {
    Vec value = load<type>(from.at(r, column));
    if constexpr (type == Type::kInt8) {
      value *= *reinterpret_cast<const LooseVec*>(
          from.scales + r / kScaleRows * from.stride + column);
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
      switch (from.type) {
        case Type::kFloat: return copy_columns<Type::kFloat>(from, rows, column, to, step);
        case Type::kBfloat16: return copy_columns<Type::kBfloat16>(from, rows, column, to, step);
        case Type::kRounded: return copy_columns<Type::kRounded>(from, rows, column, to, step);
        default: return copy_columns<Type::kInt8>(from, rows, column, to, step);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      Vec value = load(from.type, from.at(r, column), std::max(count, 0));
      if (from.scales && count > 0) {
        const float* scale = from.scales + r / kScaleRows * from.stride + column;
        value *= load(Type::kFloat, reinterpret_cast<const char*>(scale), count);
      }
      *reinterpret_cast<LooseVec*>(to + r * step) = value;
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

// ---------------------------------------------------------------- tiles

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

// Rows x (2 * width * 16) sums from weights where they lie: `width` vectors at each of two places.
template <int rows, int width, Type type>
__attribute__((always_inline)) inline void thin(
    const Left& a, const View& b, int64_t inner, int64_t c0, int64_t c1,
    Vec (&sums)[rows][2 * width]) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 16
    for (int v = 0; v < 2 * width; v++) sums[i][v] = Vec{};
  }
  const int64_t step = b.stride * size_of(type);
  const char* p0 = b.at(0, c0);
  const char* p1 = b.at(0, c1);
  Vec scale[2 * width] = {};
  for (int64_t k = 0; k < inner; k++, p0 += step, p1 += step) {
    if (rows <= 2) {  // so few sums that reading is all there is
#pragma GCC unroll 16
      for (int64_t ahead = 0; ahead < width * kLanes * size_of(type); ahead += 64) {
        __builtin_prefetch(p0 + 8 * step + ahead);
        __builtin_prefetch(p1 + 8 * step + ahead);
      }
    }
    if constexpr (type == Type::kInt8) {
      if (k % kScaleRows == 0) {
        const float* s = b.scales + k / kScaleRows * b.stride;
#pragma GCC unroll 16
        for (int v = 0; v < 2 * width; v++) {
          const int64_t column = v < width ? c0 + v * kLanes : c1 + (v - width) * kLanes;
          scale[v] = *reinterpret_cast<const LooseVec*>(s + column);
        }
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < 2 * width; v++) {
      const char* from = (v < width ? p0 + v * kLanes * size_of(type)
                                    : p1 + (v - width) * kLanes * size_of(type));
      Vec value = load<type>(from);
      if constexpr (type == Type::kInt8) value *= scale[v];
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sums[i][v] += a.rows[i][k] * value;
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
  int64_t width() const { return pair ? kLanes : kPanel; }  // columns a tile advances
  int64_t gap() const { return pair ? pair : kLanes; }      // from its first half to its second
};

template <int rows, class Put>
void put_tile(const Left& a, const float* panel, const Shape& s, int64_t row, int64_t column,
              int64_t end, const Ahead& ahead, Put& put) {
  Vec sums[rows][2];
  if (a.packed) tile<rows, true>(a, row, panel, s.inner, ahead, sums);
  else tile<rows, false>(a, row, panel, s.inner, ahead, sums);
  for (int i = 0; i < rows; i++) put(row + i, column, sums[i][0], sums[i][1], end - column);
}

template <class Put, size_t... n>
auto tiles(std::index_sequence<n...>) {
  using Call = void (*)(const Left&, const float*, const Shape&, int64_t, int64_t, int64_t,
                        const Ahead&, Put&);
  static constexpr Call calls[] = {put_tile<n + 1, Put>...};
  return calls;
}

// Copies up to `kPanels` panels, from `column` on. Row by row over all of them, so that memory is
// read in long runs.
template <Type type>
void copy_panels(const View& b, const Shape& s, int64_t column, int64_t panels, float* to) {
  for (int64_t r = 0; r < s.inner; r++) {
    for (int half = 0; half < 2; half++) {
      const int64_t first = column + half * s.gap();
      const char* from = b.at(r, first);
      const float* scale = b.scales + r / kScaleRows * b.stride + first;
      for (int64_t p = 0; p < panels; p++) {
        Vec value = load<type>(from + p * s.width() * size_of(type));
        if constexpr (type == Type::kInt8) {
          value *= *reinterpret_cast<const LooseVec*>(scale + p * s.width());
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
template <class Put>
void packed(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end, Put& put,
            const View* next = nullptr) {
  const auto calls = tiles<Put>(std::make_index_sequence<kTileRows>());
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
      switch (b.type) {
        case Type::kFloat: copy_panels<Type::kFloat>(b, s, column, count, panels); break;
        case Type::kBfloat16: copy_panels<Type::kBfloat16>(b, s, column, count, panels); break;
        case Type::kRounded: copy_panels<Type::kRounded>(b, s, column, count, panels); break;
        default: copy_panels<Type::kInt8>(b, s, column, count, panels);
      }
    }
    const int64_t after = column + count * s.width();
    const View* source = b.transposed ? nullptr : after < end ? &b : next;
    const int64_t from = after < end ? after : begin;
    const int64_t run = count * s.width() * size_of(b.type), runs = s.pair ? 2 : 1;
    int64_t asked = 0;  // bytes of each row
    for (int64_t row = 0; row < s.rows; row += kTileRows) {
      const int64_t high = std::min<int64_t>(kTileRows, s.rows - row);
      for (int64_t p = 0; p < count; p++, asked += 64) {
        Ahead ahead{reinterpret_cast<const char*>(panels), 0};
        if (source && asked < runs * run) {
          const char* first = source->at(0, from + asked / run * s.pair) + asked % run;
          ahead = {first, source->index ? 0 : source->stride * size_of(b.type)};
        }
        calls[high - 1](a, panels + p * s.inner * kPanel, s, row, column + p * s.width(), end,
                        ahead, put);
      }
    }
    column = after;
  }
}

// As many whole wide tiles as fit into [column, end); returns where they stop.
template <int rows, int width, Type type, class Put>
int64_t thin_columns(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end,
                     Put& put) {
  const bool plain = s.pair == 0;
  const int64_t advance = (plain ? 2 : 1) * width * kLanes;
  for (; column + advance <= end; column += advance) {
    const int64_t second = plain ? column + width * kLanes : column + s.pair;
    Vec sums[rows][2 * width];
    thin<rows, width, type>(a, b, s.inner, column, second, sums);
    for (int i = 0; i < rows; i++) {
      for (int v = 0; v < (plain ? 2 * width : width); v += plain ? 2 : 1) {
        put(i, column + v * kLanes, sums[i][v], sums[i][plain ? v + 1 : v + width], kPanel);
      }
    }
  }
  return column;
}

template <int rows, Type type, class Put>
int64_t thin_rows(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end,
                  Put& put) {
  constexpr int width = rows == 1 ? 8 : rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
  constexpr int fits = type == Type::kInt8 && width > 4 ? 4 : width;  // scales take registers
  column = thin_columns<rows, fits, type>(a, b, s, column, end, put);
  if constexpr (fits > 2) column = thin_columns<rows, 2, type>(a, b, s, column, end, put);
  if constexpr (fits > 1) column = thin_columns<rows, 1, type>(a, b, s, column, end, put);
  return column;
}

template <class Put, Type type, size_t... n>
auto thin_calls(std::index_sequence<n...>) {
  using Call = int64_t (*)(const Left&, const View&, const Shape&, int64_t, int64_t, Put&);
  static constexpr Call calls[] = {thin_rows<n + 1, type, Put>...};
  return calls;
}

// Columns [column, end) of one product, all rows.
template <class Put>
void product(const Left& a, const View& b, const Shape& s, int64_t column, int64_t end, Put& put,
             const View* next = nullptr) {
  if (s.rows == 0) return;
  if (s.rows <= kThinRows && !b.transposed && !b.index && !a.packed) {
    constexpr auto rows = std::make_index_sequence<kThinRows>();
    switch (b.type) {
      case Type::kFloat:
        column = thin_calls<Put, Type::kFloat>(rows)[s.rows - 1](a, b, s, column, end, put);
        break;
      case Type::kBfloat16:
        column = thin_calls<Put, Type::kBfloat16>(rows)[s.rows - 1](a, b, s, column, end, put);
        break;
      case Type::kRounded:
        column = thin_calls<Put, Type::kRounded>(rows)[s.rows - 1](a, b, s, column, end, put);
        break;
      default:
        column = thin_calls<Put, Type::kInt8>(rows)[s.rows - 1](a, b, s, column, end, put);
    }
  }
  packed(a, b, s, column, end, put, next);
}

// ---------------------------------------------------------------- products of groups

// Rows offsets[e] to offsets[e + 1] of `a` times matrix e of `b`, for all e.
struct Groups {
  View a, b;
  int64_t inner, columns, pair;  // see `Shape`
  int64_t count;                 // of groups
  const int32_t* offsets;        // [count + 1]
  int64_t matrix;                // elements from one matrix of `b` to the next
  int64_t matrix_scales = 0;     // and of its scales

  View group(int64_t e) const {
    View found = b;
    found.data += e * matrix * size_of(b.type);
    if (found.scales) found.scales += e * matrix_scales;
    return found;
  }
};

// Splits `rows` evenly into blocks of at most `kRowBlock`, whole tiles each.
int64_t block_of(int64_t rows) {
  const int64_t blocks = std::max<int64_t>(1, (rows + kRowBlock - 1) / kRowBlock);
  return std::max<int64_t>(1, ((rows + blocks - 1) / blocks + kTileRows - 1) / kTileRows) *
         kTileRows;
}

// Columns a task takes: all, unless there are too few tasks to share out.
int64_t column_share(const Groups& g) {
  const int64_t wanted = 3 * Threads::shared().count();
  int64_t tasks = 0;
  for (int64_t e = 0; e < g.count && tasks < wanted; e++) {
    tasks += (g.offsets[e + 1] - g.offsets[e] + kRowBlock - 1) / kRowBlock;
  }
  const bool few = g.offsets[g.count] <= kThinRows;
  const int64_t width = (few ? kPanels / 2 : kPanels) * (g.pair ? kLanes : kPanel);
  const int64_t parts = (wanted + tasks - 1) / std::max<int64_t>(1, tasks);
  return std::max<int64_t>(width, (g.columns / parts + width - 1) / width * width);
}

// Any order: `put` gets rows of the whole `a`, and no two tasks the same numbers.
template <class Put>
void grouped(const Groups& g, const Put& put) {
  struct Task { int64_t group, row, rows, column; };
  std::vector<Task> tasks;
  const int64_t share = column_share(g);
  // Columns outermost: neighbours in time then read different matrices, not the same pages.
  for (int64_t c = 0; c < g.columns; c += share) {
    for (int64_t e = 0; e < g.count; e++) {
      const int64_t block = block_of(g.offsets[e + 1] - g.offsets[e]);
      for (int64_t row = g.offsets[e]; row < g.offsets[e + 1]; row += block) {
        tasks.push_back({e, row, std::min<int64_t>(block, g.offsets[e + 1] - row), c});
      }
    }
  }
  Threads::shared().run(tasks.size(), [&](int64_t i) {
    const Task& t = tasks[i];
    auto place = [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
      put(t.row + row, column, first, second, count);
    };
    const Left a = left_side(g.a, t.row, t.rows, g.inner);
    const Shape s{t.rows, g.inner, g.pair};
    // What this thread will most likely do after this.
    const int64_t later = std::min<int64_t>(tasks.size() - 1, i + Threads::shared().count());
    const View next = g.group(tasks[later].group);
    product(a, g.group(t.group), s, t.column, std::min(g.columns, t.column + share), place, &next);
  });
}

// Group by group within a share of the columns, so that `put` may add to what other groups wrote.
template <class Put>
void grouped_in_order(const Groups& g, const Put& put) {
  const int64_t parts = 2 * Threads::shared().count();
  const int64_t share = std::max<int64_t>(1, (g.columns / parts + kPanel - 1) / kPanel) * kPanel;
  Threads::shared().run((g.columns + share - 1) / share, [&](int64_t i) {
    for (int64_t e = 0; e < g.count; e++) {
      const int64_t block = block_of(g.offsets[e + 1] - g.offsets[e]);
      for (int64_t row = g.offsets[e]; row < g.offsets[e + 1]; row += block) {
        const int64_t rows = std::min<int64_t>(block, g.offsets[e + 1] - row);
        auto place = [&](int64_t r, int64_t column, Vec first, Vec second, int64_t count) {
          put(row + r, column, first, second, count);
        };
        const Left a = left_side(g.a, row, rows, g.inner);
        const View next = g.group(std::min(e + 1, g.count - 1));
        product(a, g.group(e), Shape{rows, g.inner, g.pair}, i * share,
                std::min(g.columns, (i + 1) * share), place, &next);
      }
    }
  });
}

// Calls `visit(column, value, count)` for the one or two vectors of a plain tile that are real.
template <class Visit>
inline void each(int64_t column, Vec first, Vec second, int64_t count, const Visit& visit) {
  visit(column, first, std::min<int64_t>(kLanes, count));
  if (count > kLanes) {
    visit(column + kLanes, second, std::min<int64_t>(kLanes, count - kLanes));
  }
}

// One matrix `[E, M, N]` for each group of rows: a_e^T b_e, where a_e is `[rows, M]`.
void grouped_outer(const View& a, const View& b, int64_t m, int64_t n, int64_t count,
                   const int32_t* offsets, Type type, char* out) {
  const int64_t share = 8 * kPanel, block = block_of(m);
  const int64_t across = (n + share - 1) / share, down = (m + block - 1) / block;
  Threads::shared().run(count * across * down, [&](int64_t i) {
    const int64_t e = i / (across * down), column = i % across * share;
    const int64_t row = i / across % down * block, rows = std::min(m - row, block);
    const int64_t first = offsets[e], inner = offsets[e + 1] - first;
    View left = a, right = b;
    if (a.index) left.index += first; else left.data += first * a.stride * size_of(a.type);
    if (b.index) right.index += first; else right.data += first * b.stride * size_of(b.type);
    left.transposed = true;
    auto put = [&](int64_t r, int64_t c, Vec v0, Vec v1, int64_t wide) {
      each(c, v0, v1, wide, [&](int64_t at, Vec value, int real) {
        store(type, out + ((e * m + row + r) * n + at) * size_of(type), value, real);
      });
    };
    const Left side = left_side(left, row, rows, inner);
    packed(side, right, Shape{rows, inner, 0}, column, std::min(n, column + share), put);
  });
}

// ---------------------------------------------------------------- experts

// The weights of all experts: `up [E, D, 2I]`, gate first, and `down [E, I, D]`.
struct Experts {
  View up, down;
  int64_t count, hidden, inner;

  Groups through_up(const View& x, const int32_t* offsets) const {
    return {x, up, hidden, inner, inner, count, offsets, hidden * 2 * inner,
            hidden / kScaleRows * 2 * inner};
  }
  Groups through_down(const View& x, const int32_t* offsets) const {
    return {x, down, inner, hidden, 0, count, offsets, inner * hidden,
            inner / kScaleRows * hidden};
  }
};

// Sorts assignments by expert, in order of tokens within one: `order [A]`, `offsets [E + 1]`.
void sort_by_expert(const int32_t* indices, int64_t assignments, int64_t experts, int32_t* order,
                    int32_t* offsets) {
  std::fill(offsets, offsets + experts + 1, 0);
  for (int64_t i = 0; i < assignments; i++) offsets[indices[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  std::vector<int32_t> next(offsets, offsets + experts);
  for (int64_t i = 0; i < assignments; i++) order[next[indices[i]]++] = i;
}

// Runs `visit(first, end)` on shares of `count` rows.
void shared_rows(int64_t count, const std::function<void(int64_t, int64_t)>& visit) {
  const int64_t share = std::max<int64_t>(64, count / (8 * Threads::shared().count()));
  Threads::shared().run((count + share - 1) / share, [&](int64_t i) {
    visit(i * share, std::min(count, (i + 1) * share));
  });
}

View floats(const float* data, int64_t stride) {
  return {reinterpret_cast<const char*>(data), Type::kFloat, stride};
}

constexpr int64_t kFewAssignments = 256;

// The sum over a token's experts where tokens are few: threads take experts, each its own, and
// what they give is summed afterwards.
void sum_few(const Groups& down, int64_t tokens, const float* gates, int32_t per_token,
             const int32_t* order, Type type, char* y) {
  const int64_t hidden = down.columns, assignments = tokens * per_token;
  float* parts = scratch(3, assignments * hidden);
  grouped(down, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    const float gate = gates[order[row]];
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      char* to = reinterpret_cast<char*>(parts + order[row] * hidden + at);
      store(Type::kFloat, to, gate * value, real);
    });
  });
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t c = 0; c < hidden; c += kLanes) {
      const int real = std::min<int64_t>(kLanes, hidden - c);
      Vec total{};
      for (int64_t k = 0; k < per_token; k++) {
        const float* part = parts + (t * per_token + k) * hidden + c;
        total += load(Type::kFloat, reinterpret_cast<const char*>(part), real);
      }
      store(type, y + (t * hidden + c) * size_of(type), total, real);
    }
  }
}

// y [T, D] = sum over a token's experts of gate * down(silu(gate_up's gate) * its up).
// `kept [A, 2I]`, if given, receives what SwiGLU was applied to, for the backward pass.
void run_experts(const View& x, int64_t tokens, const Experts& experts, const float* gates,
                 int32_t per_token, const int32_t* order, const int32_t* offsets, char* kept,
                 char* y) {
  const int64_t inner = experts.inner, hidden = experts.hidden;
  const int64_t assignments = tokens * per_token;
  float* middle = scratch(2, assignments * inner);
  View rows = x;
  rows.index = order;
  rows.share = per_token;
  grouped(experts.through_up(rows, offsets),
          [&](int64_t row, int64_t column, Vec gate, Vec up, int64_t count) {
            const int real = std::min<int64_t>(kLanes, count);
            const Vec value = gate * sigmoid(gate) * up;
            store(Type::kFloat, reinterpret_cast<char*>(&middle[row * inner + column]), value, real);
            if (!kept) return;
            const int64_t size = size_of(x.type);
            char* at = kept + (row * 2 * inner + column) * size;
            store(x.type, at, gate, real);
            store(x.type, at + inner * size, up, real);
          });
  const Groups down = experts.through_down(floats(middle, inner), offsets);
  if (assignments <= kFewAssignments) {
    sum_few(down, tokens, gates, per_token, order, x.type, y);
    return;
  }
  const bool narrow = x.type != Type::kFloat;
  float* sums = narrow ? scratch(3, tokens * hidden) : reinterpret_cast<float*>(y);
  std::memset(sums, 0, tokens * hidden * 4);
  grouped_in_order(down, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    const float gate = gates[order[row]];
    float* to = sums + order[row] / per_token * hidden;
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      char* p = reinterpret_cast<char*>(to + at);
      store(Type::kFloat, p, load(Type::kFloat, p, real) + gate * value, real);
    });
  });
  if (!narrow) return;
  shared_rows(tokens, [&](int64_t first, int64_t end) {
    for (int64_t i = first * hidden; i < end * hidden; i += kLanes) {
      const int real = std::min<int64_t>(kLanes, end * hidden - i);
      store(x.type, y + i * size_of(x.type),
            load(Type::kFloat, reinterpret_cast<char*>(sums + i), real), real);
    }
  });
}

// The gradients of `run_experts`, given dy. What SwiGLU gave is computed again, not kept.
void run_experts_backward(const View& x, int64_t tokens, const Experts& experts,
                          const float* gates, int32_t per_token, const int32_t* order,
                          const int32_t* offsets, const char* kept, const View& dy, float* dx,
                          float* dgates, Type weight, char* dup, char* ddown) {
  const int64_t inner = experts.inner, hidden = experts.hidden;
  const int64_t assignments = tokens * per_token;
  float* middle = scratch(2, assignments * inner);
  float* wide = scratch(3, assignments * 2 * inner);
  View rows = x, above = dy;
  rows.index = above.index = order;
  rows.share = above.share = per_token;

  Groups back = experts.through_down(above, offsets);  // dy W_down^T: [A, I]
  back.b.transposed = true;
  std::swap(back.inner, back.columns);
  grouped(back, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      store(Type::kFloat, reinterpret_cast<char*>(&middle[row * inner + at]), value, real);
    });
  });
  // Through SwiGLU: `middle` becomes gate * activation, `wide` the gradient before it.
  shared_rows(assignments, [&](int64_t first, int64_t end) {
    const int64_t size = size_of(x.type);
    for (int64_t row = first; row < end; row++) {
      const float gate = gates[order[row]];
      Vec dgate{};
      for (int64_t c = 0; c < inner; c += kLanes) {
        const int real = std::min<int64_t>(kLanes, inner - c);
        const char* at = kept + (row * 2 * inner + c) * size;
        char* mid = reinterpret_cast<char*>(&middle[row * inner + c]);
        char* out = reinterpret_cast<char*>(&wide[row * 2 * inner + c]);
        const Vec g = load(x.type, at, real), u = load(x.type, at + inner * size, real);
        const Vec above = load(Type::kFloat, mid, real), s = sigmoid(g), act = g * s;
        dgate += act * u * above;
        const Vec scaled = gate * above;
        store(Type::kFloat, out, scaled * u * (s + act * (1.f - s)), real);
        store(Type::kFloat, out + inner * 4, scaled * act, real);
        store(Type::kFloat, mid, gate * act * u, real);
      }
      dgates[order[row]] = sum(dgate);
    }
  });
  std::memset(dx, 0, tokens * hidden * 4);
  Groups down = experts.through_up(floats(wide, 2 * inner), offsets);  // [A, 2I] W_up^T
  down.b.transposed = true;
  down.inner = 2 * inner;
  down.columns = hidden;
  down.pair = 0;
  grouped_in_order(down, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    float* to = dx + order[row] / per_token * hidden;
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      char* p = reinterpret_cast<char*>(to + at);
      store(Type::kFloat, p, load(Type::kFloat, p, real) + value, real);
    });
  });
  grouped_outer(rows, floats(wide, 2 * inner), hidden, 2 * inner, experts.count, offsets,
                weight, dup);
  grouped_outer(floats(middle, inner), above, inner, hidden, experts.count, offsets, weight,
                ddown);
}

// ---------------------------------------------------------------- attention

// Multi-head attention over keys of two parts, one of them shared by all heads, a block of queries
// against a block of keys at a time: weights of all pairs are never held (arXiv 2205.14135).
//
// Letters: B batch, S queries, L keys, H heads, N and R the parts of a key, V a value, Q = N + R.
struct Attention {
  const char *q, *kv, *k_rope;  // [B, S, H, Q] before rotation, [B, L, H, N + V], [B, L, R]
  Type type;
  const float *cosines, *sines;  // [B or 1, S, R / 2]
  const int32_t* slots;          // [B or 1, S]: a query sees keys up to its slot
  const unsigned char* valid;    // [B, L] or null: and of those the valid ones
  bool one_row;                  // of cosines, sines and slots
  bool interleave;
  float scale;
  int64_t batch, queries, keys, heads, nope, rope, value;

  int64_t wide() const { return nope + rope; }
  int64_t place(int64_t b, int64_t s) const { return (one_row ? 0 : b) * queries + s; }
  View key_rows(int64_t b, int64_t h) const { return rows(kv, b, h, keys, nope + value, 0); }
  View value_rows(int64_t b, int64_t h) const { return rows(kv, b, h, keys, nope + value, nope); }
  View rope_rows(int64_t b) const { return {k_rope + b * keys * rope * size_of(type), type, rope}; }
  // Head h's part of `[B, count, H, width]`, from column `first` on.
  View rows(const char* data, int64_t b, int64_t h, int64_t count, int64_t width,
            int64_t first) const {
    return {data + ((b * count * heads + h) * width + first) * size_of(type), type, heads * width};
  }
};

constexpr int64_t kQueryBlock = 10 * kTileRows;
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kMostRope = 512;

// Packs columns [0, columns) of `rows` rows of `from` into panels `[rows, 32]`, one after another.
void pack(const View& from, int64_t rows, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += kPanel, to += rows * kPanel) {
    copy_panel(from, Shape{0, rows, 0}, c, columns - c, to);
  }
}

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Calls `put(row, column, first, second, count)` with the product of `rows` rows and `count` panels
// `[inner, 32]`, which lie `step` numbers apart.
template <class Put>
void multiply(const Left& a, int64_t rows, const float* panels, int64_t step, int64_t count,
              int64_t inner, Put put) {
  const auto calls = tiles<Put>(std::make_index_sequence<kTileRows>());
  const Shape shape{rows, inner, 0};
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t high = std::min<int64_t>(kTileRows, rows - row);
    for (int64_t p = 0; p < count; p++) {
      calls[high - 1](a, panels + p * step, shape, row, p * kPanel, (p + 1) * kPanel,
                      {reinterpret_cast<const char*>(panels), 0}, put);
    }
  }
}

// A matrix of whole vectors in float32, with the pointers to its rows that products want.
struct Rows {
  float* data;
  int64_t step;
  std::vector<const float*> starts;

  Rows(float* data, int64_t rows, int64_t columns)
      : data(data), step((columns + kPanel - 1) / kPanel * kPanel), starts(rows) {
    for (int64_t r = 0; r < rows; r++) starts[r] = row(r);
  }
  static int64_t size(int64_t rows, int64_t columns) { return rows * panels_of(columns) * kPanel; }
  float* row(int64_t r) const { return data + r * step; }
  Vec& at(int64_t r, int64_t column) const { return *reinterpret_cast<Vec*>(row(r) + column); }
  Left left() const { return {starts.data()}; }
};

// Turns the last R numbers of a query, first members of pairs before second ones (see rope.py); or
// turns a gradient back.
void rotate(const Attention& a, int64_t b, int64_t s, bool back, float* q) {
  const int64_t half = a.rope / 2, place = a.place(b, s) * half;
  float was[kMostRope];
  std::memcpy(was, q + a.nope, a.rope * 4);
  float* now = q + a.nope;
  for (int64_t i = 0; i < half; i++) {
    const float c = a.cosines[place + i], n = a.sines[place + i];
    const int64_t one = a.interleave ? 2 * i : i, two = a.interleave ? 2 * i + 1 : half + i;
    if (back) {
      now[one] = was[i] * c + was[half + i] * n;
      now[two] = was[half + i] * c - was[i] * n;
    } else {
      now[i] = was[one] * c - was[two] * n;
      now[half + i] = was[two] * c + was[one] * n;
    }
  }
}

// One row of a matrix to float32, and back; `to` has room for whole vectors.
void widen(const View& from, int64_t row, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int real = std::min<int64_t>(kLanes, columns - c);
    *reinterpret_cast<LooseVec*>(to + c) = load(from.type, from.at(row, c), real);
  }
}

void narrow(Type type, const float* from, int64_t columns, char* to) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int real = std::min<int64_t>(kLanes, columns - c);
    store(type, to + c * size_of(type), *reinterpret_cast<const LooseVec*>(from + c), real);
  }
}

// One head of one row of the batch: its keys and values, packed, and blocks of its queries.
class Head {
 public:
  Head(const Attention& a, int64_t b, int64_t h, float* space)
      : a_(a), b_(b), h_(h), key_panels_(space) {
    // Keys side by side: [Q, 32] for every 32 keys. The two parts come from two places.
    View nope = a.key_rows(b, h), rope = a.rope_rows(b);
    nope.transposed = rope.transposed = true;
    for (int64_t k = 0; k < a.keys; k += kPanel) {
      float* panel = key_panels_ + k * a.wide();
      copy_panel(at_key(nope, k), Shape{0, a.nope, 0}, 0, a.keys - k, panel);
      copy_panel(at_key(rope, k), Shape{0, a.rope, 0}, 0, a.keys - k, panel + a.nope * kPanel);
    }
  }
  static int64_t key_size(const Attention& a) { return panels_of(a.keys) * kPanel * a.wide(); }

  // Brings queries [first, first + count) in, rotated and scaled.
  void take_queries(int64_t first, int64_t count, const Rows& q) const {
    const View from = a_.rows(a_.q, b_, h_, a_.queries, a_.wide(), 0);
    for (int64_t r = 0; r < count; r++) {
      widen(from, first + r, a_.wide(), q.row(r));
      rotate(a_, b_, first + r, false, q.row(r));
      for (int64_t c = 0; c < a_.wide(); c += kLanes) q.at(r, c) *= a_.scale;
    }
  }

  // How many keys the last of these queries sees.
  int64_t seen(int64_t first, int64_t count) const {
    int32_t most = -1;
    for (int64_t r = 0; r < count; r++) most = std::max(most, a_.slots[a_.place(b_, first + r)]);
    return std::min<int64_t>(a_.keys, most + 1);
  }

  // Scores of a block of queries against keys [key, key + count); -1e30 where a key is not seen.
  void score(const Rows& q, int64_t first, int64_t rows, int64_t key, int64_t count,
             const Rows& scores) const {
    multiply(q.left(), rows, key_panels_ + key * a_.wide(), a_.wide() * kPanel, panels_of(count),
             a_.wide(), [&](int64_t r, int64_t column, Vec low, Vec high, int64_t) {
               scores.at(r, column) = low;
               scores.at(r, column + kLanes) = high;
             });
    for (int64_t r = 0; r < rows; r++) {
      const int64_t own = a_.slots[a_.place(b_, first + r)] + 1 - key;
      const int64_t width = panels_of(count) * kPanel;
      for (int64_t c = std::max<int64_t>(0, std::min(own, count)); c < width; c++) {
        scores.row(r)[c] = kForbidden;
      }
      if (!a_.valid) continue;
      const unsigned char* valid = a_.valid + b_ * a_.keys + key;
      for (int64_t c = 0; c < std::min(own, count); c++) {
        if (!valid[c]) scores.row(r)[c] = kForbidden;
      }
    }
  }

  static constexpr float kForbidden = -1e30f;

 private:
  View at_key(View view, int64_t key) const {
    view.data += key * view.stride * size_of(view.type);
    return view;
  }

  const Attention& a_;
  int64_t b_, h_;
  float* key_panels_;
};

// y [B, S, H, V] and, for the backward pass, `sums [B, H, S]`: the logarithm of each softmax's sum.
void attend(const Attention& a, char* y, float* sums) {
  Threads::shared().run(a.batch * a.heads, [&](int64_t task) {
    const int64_t b = task / a.heads, h = task % a.heads;
    const int64_t keys = panels_of(a.keys) * kPanel;
    const int64_t q_size = Rows::size(kQueryBlock, a.wide());
    const int64_t s_size = Rows::size(kQueryBlock, kKeyBlock);
    float* space = scratch(2, Head::key_size(a) + keys * panels_of(a.value) * kPanel + q_size +
                                  s_size + Rows::size(kQueryBlock, a.value));
    const Head head(a, b, h, space);
    float* values = space + Head::key_size(a);
    pack(a.value_rows(b, h), a.keys, a.value, values);
    const Rows q(values + keys * panels_of(a.value) * kPanel, kQueryBlock, a.wide());
    const Rows scores(q.data + q_size, kQueryBlock, kKeyBlock);
    const Rows out(scores.data + s_size, kQueryBlock, a.value);
    float largest[kQueryBlock], total[kQueryBlock];
    for (int64_t first = 0; first < a.queries; first += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, a.queries - first), seen = head.seen(first, rows);
      head.take_queries(first, rows, q);
      std::fill(largest, largest + rows, Head::kForbidden);
      std::fill(total, total + rows, 0.f);
      std::memset(out.data, 0, rows * out.step * 4);
      for (int64_t key = 0; key < seen; key += kKeyBlock) {
        const int64_t count = std::min(kKeyBlock, seen - key);
        head.score(q, first, rows, key, count, scores);
        for (int64_t r = 0; r < rows; r++) {
          const int64_t width = panels_of(count) * kPanel;
          Vec high = spread(largest[r]);
          for (int64_t c = 0; c < width; c += kLanes) {
            const Vec s = scores.at(r, c);
            high = s > high ? s : high;
          }
          float top = high[0];
          for (int i = 1; i < kLanes; i++) top = std::max(top, high[i]);
          const float shrink = std::exp(largest[r] - top);
          Vec added{};
          for (int64_t c = 0; c < width; c += kLanes) {
            const Vec s = scores.at(r, c);
            const Vec weight = s > Head::kForbidden ? exponential(s - top) : Vec{};
            scores.at(r, c) = weight;
            added += weight;
          }
          total[r] = total[r] * shrink + sum(added);
          largest[r] = top;
          if (shrink == 1.f) continue;
          for (int64_t c = 0; c < a.value; c += kLanes) out.at(r, c) *= shrink;
        }
        multiply(scores.left(), rows, values + key * kPanel, a.keys * kPanel, panels_of(a.value),
                 count, [&](int64_t r, int64_t column, Vec low, Vec high, int64_t) {
                   out.at(r, column) += low;
                   out.at(r, column + kLanes) += high;
                 });
      }
      for (int64_t r = 0; r < rows; r++) {
        const float share = total[r] > 0 ? 1 / total[r] : 0;  // a padded query sees nothing
        char* to = y + (((b * a.queries + first + r) * a.heads + h) * a.value) * size_of(a.type);
        for (int64_t c = 0; c < a.value; c += kLanes) {
          const int real = std::min<int64_t>(kLanes, a.value - c);
          store(a.type, to + c * size_of(a.type), out.at(r, c) * share, real);
        }
        sums[(b * a.heads + h) * a.queries + first + r] = largest[r] + std::log(total[r]);
      }
    }
  });
}

// Adds the product to `to`, whose rows are `step` apart.
auto adding(float* to, int64_t step) {
  return [=](int64_t r, int64_t column, Vec low, Vec high, int64_t) {
    Vec* at = reinterpret_cast<Vec*>(to + r * step + column);
    at[0] += low;
    at[1] += high;
  };
}

// The gradients of `attend`: dq [B, S, H, Q] and dkv [B, L, H, N + V] in the tensors' type,
// dk_rope [B, H, L, R] float32, one for each head. Weights are computed again, block by block.
void attend_backward(const Attention& a, const char* y, const float* sums, const char* dy, char* dq,
                     char* dkv, float* dk_rope) {
  Threads::shared().run(a.batch * a.heads, [&](int64_t task) {
    const int64_t b = task / a.heads, h = task % a.heads;
    const int64_t keys = panels_of(a.keys) * kPanel;
    const int64_t q_size = Rows::size(kQueryBlock, a.wide());
    const int64_t v_size = Rows::size(kQueryBlock, a.value);
    const int64_t s_size = Rows::size(kQueryBlock, kKeyBlock);
    float* space = scratch(2, Head::key_size(a) + keys * a.value +
                                  keys * panels_of(a.wide()) * kPanel + 3 * q_size + 2 * v_size +
                                  2 * s_size + Rows::size(a.keys, a.wide()) +
                                  Rows::size(a.keys, a.value));
    auto take = [&](int64_t size) { return std::exchange(space, space + size); };
    const Head head(a, b, h, take(Head::key_size(a)));
    // For dP = dy V^T: values side by side. For dq = dS K: keys as they are.
    float* value_panels = take(keys * a.value);
    View values = a.value_rows(b, h);
    values.transposed = true;
    for (int64_t k = 0; k < a.keys; k += kPanel) {
      View at = values;
      at.data += k * values.stride * size_of(values.type);
      copy_panel(at, Shape{0, a.value, 0}, 0, a.keys - k, value_panels + k * a.value);
    }
    float* key_rows = take(keys * panels_of(a.wide()) * kPanel);
    std::unique_ptr<float[]> whole(new float[a.keys * a.wide() + kLanes]);
    for (int64_t k = 0; k < a.keys; k++) {
      widen(a.key_rows(b, h), k, a.nope, &whole[k * a.wide()]);
      widen(a.rope_rows(b), k, a.rope, &whole[k * a.wide() + a.nope]);
    }
    pack(floats(whole.get(), a.wide()), a.keys, a.wide(), key_rows);

    const Rows q(take(q_size), kQueryBlock, a.wide()), dq_rows(take(q_size), kQueryBlock, a.wide());
    float* q_panels = take(q_size);
    const Rows above(take(v_size), kQueryBlock, a.value);
    float* above_panels = take(v_size);
    const Rows p(take(s_size), kQueryBlock, kKeyBlock), dp(take(s_size), kQueryBlock, kKeyBlock);
    const Rows dk(take(Rows::size(a.keys, a.wide())), 0, a.wide());
    const Rows dv(take(Rows::size(a.keys, a.value)), 0, a.value);
    std::memset(dk.data, 0, Rows::size(a.keys, a.wide()) * 4);
    std::memset(dv.data, 0, Rows::size(a.keys, a.value) * 4);
    const View dy_rows = a.rows(dy, b, h, a.queries, a.value, 0);
    const View y_rows = a.rows(y, b, h, a.queries, a.value, 0);

    for (int64_t first = 0; first < a.queries; first += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, a.queries - first), seen = head.seen(first, rows);
      head.take_queries(first, rows, q);
      float inner[kQueryBlock];  // dy . y, which the softmax's gradient subtracts
      for (int64_t r = 0; r < rows; r++) {
        widen(dy_rows, first + r, a.value, above.row(r));
        Vec dot{};
        for (int64_t c = 0; c < a.value; c += kLanes) {
          const int real = std::min<int64_t>(kLanes, a.value - c);
          dot += above.at(r, c) * load(a.type, y_rows.at(first + r, c), real);
        }
        inner[r] = sum(dot);
      }
      pack(floats(q.data, q.step), rows, a.wide(), q_panels);
      pack(floats(above.data, above.step), rows, a.value, above_panels);
      std::memset(dq_rows.data, 0, rows * dq_rows.step * 4);
      for (int64_t key = 0; key < seen; key += kKeyBlock) {
        const int64_t count = std::min(kKeyBlock, seen - key);
        head.score(q, first, rows, key, count, p);
        multiply(above.left(), rows, value_panels + key * a.value, a.value * kPanel,
                 panels_of(count), a.value,
                 [&](int64_t r, int64_t column, Vec low, Vec high, int64_t) {
                   dp.at(r, column) = low;
                   dp.at(r, column + kLanes) = high;
                 });
        for (int64_t r = 0; r < rows; r++) {
          const float log_sum = sums[(b * a.heads + h) * a.queries + first + r];
          for (int64_t c = 0; c < panels_of(count) * kPanel; c += kLanes) {
            const Vec s = p.at(r, c);
            const Vec weight = s > Head::kForbidden ? exponential(s - log_sum) : Vec{};
            p.at(r, c) = weight;
            dp.at(r, c) = weight * (dp.at(r, c) - inner[r]);
          }
        }
        multiply(dp.left(), rows, key_rows + key * kPanel, a.keys * kPanel, panels_of(a.wide()),
                 count, adding(dq_rows.data, dq_rows.step));
        View turned = floats(p.data, p.step);
        turned.transposed = true;
        multiply(left_side(turned, 0, count, rows), count, above_panels, rows * kPanel,
                 panels_of(a.value), rows, adding(dv.row(key), dv.step));
        turned = floats(dp.data, dp.step);
        turned.transposed = true;
        multiply(left_side(turned, 0, count, rows), count, q_panels, rows * kPanel,
                 panels_of(a.wide()), rows, adding(dk.row(key), dk.step));
      }
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < a.wide(); c += kLanes) dq_rows.at(r, c) *= a.scale;
        rotate(a, b, first + r, true, dq_rows.row(r));
        narrow(a.type, dq_rows.row(r), a.wide(),
               dq + ((b * a.queries + first + r) * a.heads + h) * a.wide() * size_of(a.type));
      }
    }
    // `q` was scaled already, so dk is complete.
    for (int64_t k = 0; k < a.keys; k++) {
      char* to = dkv + ((b * a.keys + k) * a.heads + h) * (a.nope + a.value) * size_of(a.type);
      narrow(a.type, dk.row(k), a.nope, to);
      narrow(a.type, dv.row(k), a.value, to + a.nope * size_of(a.type));
      std::memcpy(dk_rope + ((b * a.heads + h) * a.keys + k) * a.rope, dk.row(k) + a.nope,
                  a.rope * 4);
    }
  });
}

// ---------------------------------------------------------------- latent attention

// Decoding in the latent space (arXiv 2405.04434, section 2.1): `W_uk` goes into the query and
// `W_uv` into the output, so a new token reads nothing of the past but latents and rotated keys.
//
// Letters: B rows, S new tokens of each, L slots, H heads, N and R the parts of a query, C latent,
// V a head's value, W = C + R.
struct LatentAttention {
  View q;                        // [B S, H (N + R)] before rotation
  View compressed;               // [B S, W]: the latent before its norm, the key before rotation
  View norm, up;                 // [C], [C, H (N + V)]
  const float *cosines, *sines;  // [B or 1, S, R / 2]
  const int32_t* slots;          // [B or 1, S]: where a token goes; it sees slots up to its own
  const char* valid;             // [B, L] or null: and of those the valid ones
  bool one_angle, one_slot, interleave;
  float scale, epsilon;
  int64_t batch, count, length, heads, nope, rope, latent, value;
  char* entries;  // [B, L, W]

  int64_t width() const { return latent + rope; }
  int64_t tokens() const { return batch * count; }
  int64_t rows() const { return count * heads; }  // queries of one row of the batch
  int64_t slot(int64_t token) const { return slots[one_slot ? token % count : token]; }
  View cached(int64_t b, int64_t slot) const {
    return {entries + (b * length + slot) * width() * size_of(q.type), q.type, width()};
  }

  // Turns R numbers by their token's position.
  void turn(int64_t token, const float* from, float factor, float* to) const {
    const int64_t half = rope / 2, at = (one_angle ? token % count : token) * half;
    for (int64_t i = 0; i < half; i++) {
      const float one = from[interleave ? 2 * i : i], two = from[interleave ? 2 * i + 1 : half + i];
      to[i] = factor * (one * cosines[at + i] - two * sines[at + i]);
      to[half + i] = factor * (two * cosines[at + i] + one * sines[at + i]);
    }
  }

  // Writes one token's normed latent and rotated key to the cache.
  void remember(int64_t token) const {
    float* own = scratch(0, 2 * width() + 4 * kLanes);
    float* key = own + width() + 2 * kLanes;
    widen(compressed, token, width(), own);
    float squares = 0;
    for (int64_t c = 0; c < latent; c++) squares += own[c] * own[c];
    const float root = 1.f / std::sqrt(squares / latent + epsilon);
    turn(token, own + latent, 1, key);
    for (int64_t c = 0; c < latent; c += kLanes) {
      auto* at = reinterpret_cast<LooseVec*>(own + c);
      *at *= root * load(norm.type, norm.at(0, c), std::min<int64_t>(kLanes, latent - c));
    }
    const View entry = cached(token / count, slot(token));
    narrow(q.type, own, latent, const_cast<char*>(entry.at(0, 0)));
    narrow(q.type, key, rope, const_cast<char*>(entry.at(0, latent)));
  }

  // One head's queries of all tokens in the latent space, scaled, into `to [B S, H, W]`.
  void ask(int64_t head, float* to) const {
    View mine = q, keys = up;
    mine.data += head * (nope + rope) * size_of(q.type);
    keys.data += head * (nope + value) * size_of(up.type);
    keys.transposed = true;  // [N, C]
    to += head * width();
    auto put = [&](int64_t token, int64_t column, Vec first, Vec second, int64_t wide) {
      each(column, first, second, wide, [&](int64_t c, Vec sums, int real) {
        char* at = reinterpret_cast<char*>(to + token * heads * width() + c);
        store(Type::kFloat, at, sums * scale, real);
      });
    };
    product(left_side(mine, 0, tokens(), nope), keys, Shape{tokens(), nope, 0}, 0, latent, put);
    float* own = scratch(0, rope + kLanes);
    mine.data += nope * size_of(q.type);
    for (int64_t token = 0; token < tokens(); token++) {
      widen(mine, token, rope, own);
      turn(token, own, scale, to + token * heads * width() + latent);
    }
  }

  // What the queries of one row of the batch found in some of the slots: sums of latents, weighed
  // by e to the score less the highest so far; and the sums of those weights.
  struct Found {
    float *latents, *highest, *total;  // [S, H, C], [S, H], [S, H]
  };

  // Looks at slots [first, end) of row `b`, a few at a time, so that no score is kept.
  void look(int64_t b, int64_t first, int64_t end, const float* queries, const Found& found) const {
    std::fill(found.highest, found.highest + rows(), kLowest);
    std::fill(found.total, found.total + rows(), 0.f);
    std::fill(found.latents, found.latents + rows() * latent, 0.f);
    float* scores = scratch(2, rows() * kLook);
    for (int64_t at = first; at < end; at += kLook) {
      const int64_t seen = std::min<int64_t>(kLook, end - at);
      View keys = cached(b, at);
      keys.transposed = true;
      auto keep = [&](int64_t row, int64_t column, Vec one, Vec two, int64_t) {
        auto* to = reinterpret_cast<Vec*>(scores + row * kLook + column);
        to[0] = one;
        to[1] = two;
      };
      const Left asked = left_side(floats(queries, width()), 0, rows(), width());
      product(asked, keys, Shape{rows(), width(), 0}, 0, seen, keep);
      weigh(b, at, seen, scores, found);
      auto add = [&](int64_t row, int64_t column, Vec one, Vec two, int64_t wide) {
        each(column, one, two, wide, [&](int64_t c, Vec sums, int real) {
          char* to = reinterpret_cast<char*>(found.latents + row * latent + c);
          store(Type::kFloat, to, load(Type::kFloat, to, real) + sums, real);
        });
      };
      const Left weights = left_side(floats(scores, kLook), 0, rows(), seen);
      product(weights, cached(b, at), Shape{rows(), seen, 0}, 0, latent, add);
    }
  }

  // Turns scores into weights, and brings what was found before to the new highest score.
  void weigh(int64_t b, int64_t first, int64_t seen, float* scores, const Found& found) const {
    constexpr int vectors = kLook / kLanes;
    for (int64_t s = 0; s < count; s++) {
      const int64_t own = std::min(slot(b * count + s) + 1 - first, seen);
      if (own <= 0) std::fill(scores + s * heads * kLook, scores + (s + 1) * heads * kLook, 0.f);
      if (own <= 0) continue;
      alignas(64) int32_t may[kLook] = {};
      for (int64_t i = 0; i < own; i++) may[i] = !valid || valid[b * length + first + i] ? -1 : 0;
      const auto* open = reinterpret_cast<const IntVec*>(may);
      for (int64_t row = s * heads; row < (s + 1) * heads; row++) {
        auto* mine = reinterpret_cast<Vec*>(scores + row * kLook);
        Vec top = spread(found.highest[row]);
        for (int v = 0; v < vectors; v++) {
          mine[v] = open[v] ? mine[v] : spread(kLowest);
          top = mine[v] > top ? mine[v] : top;
        }
        float highest = top[0];
        for (int i = 1; i < kLanes; i++) highest = std::max(highest, top[i]);
        Vec total{};
        for (int v = 0; v < vectors; v++) {
          mine[v] = open[v] ? exponential(mine[v] - highest) : Vec{};
          total += mine[v];
        }
        const float fade = std::exp(found.highest[row] - highest);
        found.highest[row] = highest;
        found.total[row] = found.total[row] * fade + sum(total);
        if (fade == 1.f) continue;
        for (int64_t c = 0; c < latent; c++) found.latents[row * latent + c] *= fade;
      }
    }
  }

  // One head's output: what all `parts` found, joined in `to [B S, H, C]`, through `W_uv` into
  // `y [B S, H V]`. A query that sees nothing gets zeros.
  template <class Part>
  void answer(int64_t head, int64_t parts, const Part& found, float* to, char* y) const {
    to += head * latent;
    for (int64_t token = 0; token < tokens(); token++) {
      const int64_t row = token % count * heads + head;
      float highest = kLowest, total = 0;
      for (int64_t p = 0; p < parts; p++) {
        highest = std::max(highest, found(token / count, p).highest[row]);
      }
      float* own = to + token * heads * latent;
      std::fill(own, own + latent, 0.f);
      for (int64_t p = 0; p < parts; p++) {
        const Found part = found(token / count, p);
        const float share = std::exp(part.highest[row] - highest);
        total += part.total[row] * share;
        for (int64_t c = 0; c < latent; c++) own[c] += share * part.latents[row * latent + c];
      }
      const float whole = total > 0 ? 1 / total : 0;
      for (int64_t c = 0; c < latent; c++) own[c] *= whole;
    }
    View values = up;
    values.data += (head * (nope + value) + nope) * size_of(up.type);
    auto put = [&](int64_t token, int64_t column, Vec first, Vec second, int64_t wide) {
      each(column, first, second, wide, [&](int64_t c, Vec sums, int real) {
        store(q.type, y + ((token * heads + head) * value + c) * size_of(q.type), sums, real);
      });
    };
    const Left joined = left_side(floats(to, heads * latent), 0, tokens(), latent);
    product(joined, values, Shape{tokens(), latent, 0}, 0, value, put);
  }

  void run(char* y) const {
    std::unique_ptr<float[]> queries(new float[tokens() * heads * width()]);
    Threads::shared().run(heads + 1, [&](int64_t i) {
      if (i) return ask(i - 1, queries.get());
      for (int64_t token = 0; token < tokens(); token++) remember(token);
    });
    int64_t end = 0;  // of the slots that anybody sees
    for (int64_t token = 0; token < tokens(); token++) end = std::max(end, slot(token) + 1);
    const int64_t looks = (end + kLook - 1) / kLook;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(looks, kParts / batch));
    const int64_t share = (looks + parts - 1) / parts * kLook;
    std::unique_ptr<float[]> space(new float[batch * parts * rows() * (latent + 2)]);
    const auto found = [&](int64_t b, int64_t part) {
      float* to = space.get() + (b * parts + part) * rows() * (latent + 2);
      return Found{to, to + rows() * latent, to + rows() * (latent + 1)};
    };
    Threads::shared().run(batch * parts, [&](int64_t i) {
      const int64_t b = i / parts, first = i % parts * share;
      look(b, first, std::min(end, first + share), queries.get() + b * rows() * width(),
           found(b, i % parts));
    });
    std::unique_ptr<float[]> joined(new float[tokens() * heads * latent]);
    Threads::shared().run(heads, [&](int64_t i) { answer(i, parts, found, joined.get(), y); });
  }

  static constexpr float kLowest = -1e30f;
  static constexpr int64_t kLook = 64;   // slots whose scores are in the making
  static constexpr int64_t kParts = 32;  // shares of the slots, at batch 1
};

// ---------------------------------------------------------------- routing

// Which experts a token goes to, and with what weight (arXiv 2412.19437, eq. 13-16).
struct Route {
  const float *scores, *bias;  // [T, E]; [E] or null, part of the choice alone
  int64_t experts, chosen;
  int64_t groups, best_groups;  // experts outside the best groups can't be chosen
  bool two;                     // a group is worth the sum of its two best, else its best
  bool normalize;
  float factor;

  // The highest of `count` numbers, the first of equals, among those not yet `taken`.
  static int64_t best(const float* values, const std::vector<char>& taken, int64_t first,
                      int64_t count) {
    int64_t found = -1;
    for (int64_t i = first; i < first + count; i++) {
      if (!taken[i] && (found < 0 || values[i] > values[found])) found = i;
    }
    return found;
  }

  void run(int64_t token, int32_t* indices, float* gates) const {
    const float* own = scores + token * experts;
    std::vector<float> choice(own, own + experts);
    for (int64_t e = 0; bias && e < experts; e++) choice[e] += bias[e];
    if (best_groups < groups) limit(&choice);
    std::vector<char> taken(experts);
    float total = 0;
    for (int64_t k = 0; k < chosen; k++) {
      indices[k] = best(choice.data(), taken, 0, experts);
      taken[indices[k]] = 1;
      gates[k] = own[indices[k]];
      total += gates[k];
    }
    const float share = normalize ? factor / (total + 1e-20f) : factor;
    for (int64_t k = 0; k < chosen; k++) gates[k] *= share;
  }

  void limit(std::vector<float>* choice) const {
    const int64_t size = experts / groups;
    std::vector<float> worth(groups);
    for (int64_t g = 0; g < groups; g++) {
      std::vector<char> taken(experts);
      for (int i = 0; i < (two ? 2 : 1); i++) {
        const int64_t e = best(choice->data(), taken, g * size, size);
        taken[e] = 1;
        worth[g] = i ? worth[g] + (*choice)[e] : (*choice)[e];
      }
    }
    std::vector<char> kept(groups);
    for (int64_t i = 0; i < best_groups; i++) kept[best(worth.data(), kept, 0, groups)] = 1;
    for (int64_t e = 0; e < experts; e++) {
      if (!kept[e / size]) (*choice)[e] = -INFINITY;
    }
  }
};

// ---------------------------------------------------------------- TensorFlow

class Failure {
 public:
  explicit Failure(std::string message) : message(std::move(message)) {}
  std::string message;
};

void require(bool fine, const std::string& message) {
  if (!fine) throw Failure(message);
}

Type type_of(TF_DataType type) {
  if (type == TF_BFLOAT16) return Type::kBfloat16;
  return type == TF_INT8 ? Type::kInt8 : Type::kFloat;
}

class Context {
 public:
  explicit Context(TF_OpKernelContext* context) : context_(context), status_(TF_NewStatus()) {}
  ~Context() {
    for (TF_Tensor* tensor : held_) TF_DeleteTensor(tensor);
    TF_DeleteStatus(status_);
  }

  TF_Tensor* input(int i) {
    TF_Tensor* tensor = nullptr;
    TF_GetInput(context_, i, &tensor, status_);
    check();
    held_.push_back(tensor);
    return tensor;
  }

  char* output(int i, TF_DataType type, const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    TF_Tensor* tensor = TF_AllocateOutput(context_, i, type, shape.data(), shape.size(),
                                          count * TF_DataTypeSize(type), status_);
    check();
    held_.push_back(tensor);
    return static_cast<char*>(TF_TensorData(tensor));
  }

  // Axis `axis` of input `i`, of which no hold is kept.
  int64_t size(int i, int axis) {
    TF_Tensor* tensor = nullptr;
    TF_GetInput(context_, i, &tensor, status_);
    check();
    const int64_t size = TF_NumDims(tensor) > axis ? TF_Dim(tensor, axis) : -1;
    TF_DeleteTensor(tensor);
    return size;
  }

  // Input `from` to be changed as output `i`: in its memory if nobody else holds that, else a copy.
  char* changed(int from, int i, const std::vector<int64_t>& shape) {
    for (size_t axis = 0; axis < shape.size(); axis++) {
      require(size(from, axis) == shape[axis], "a tensor to be changed has another shape");
    }
    int taken = -1;
    TF_Tensor* after = TF_ForwardInputOrAllocateOutput(context_, &from, 1, i, shape.data(),
                                                       shape.size(), &taken, status_);
    check();
    held_.push_back(after);
    if (taken < 0) {
      std::memcpy(TF_TensorData(after), TF_TensorData(input(from)), TF_TensorByteSize(after));
    }
    return static_cast<char*>(TF_TensorData(after));
  }

  int inputs() { return TF_NumInputs(context_); }

  // A float32 output in the memory of input `from`, if nobody else needs that. To be asked for
  // before the input is read.
  char* output_on_input(int i, int from, const std::vector<int64_t>& shape) {
    int taken = -1;
    TF_Tensor* tensor = TF_ForwardInputOrAllocateOutput(context_, &from, 1, i, shape.data(),
                                                        shape.size(), &taken, status_);
    check();
    held_.push_back(tensor);
    return static_cast<char*>(TF_TensorData(tensor));
  }

  void fail(const std::string& message) {
    TF_SetStatus(status_, TF_INVALID_ARGUMENT, message.c_str());
    TF_OpKernelContext_Failure(context_, status_);
  }

 private:
  void check() { require(TF_GetCode(status_) == TF_OK, TF_Message(status_)); }

  TF_OpKernelContext* context_;
  TF_Status* status_;
  std::vector<TF_Tensor*> held_;
};

template <class T>
T* data(TF_Tensor* tensor) { return static_cast<T*>(TF_TensorData(tensor)); }

// All axes but the last count as rows.
int64_t last(TF_Tensor* tensor) { return TF_Dim(tensor, TF_NumDims(tensor) - 1); }

int64_t rows_of(TF_Tensor* tensor) {
  int64_t rows = 1;
  for (int axis = 0; axis + 1 < TF_NumDims(tensor); axis++) rows *= TF_Dim(tensor, axis);
  return rows;
}

std::vector<int64_t> shape_with_last(TF_Tensor* tensor, int64_t size) {
  std::vector<int64_t> shape;
  for (int axis = 0; axis + 1 < TF_NumDims(tensor); axis++) shape.push_back(TF_Dim(tensor, axis));
  shape.push_back(size);
  return shape;
}

// Weights, whose float32 is rounded where `x` is bfloat16, as a cast of them would.
View matrix(TF_Tensor* tensor, TF_Tensor* x = nullptr, TF_Tensor* scales = nullptr) {
  const int rank = TF_NumDims(tensor);
  require(rank >= 1, "a product's sides must have rank 1 or more");
  View view{data<char>(tensor), type_of(TF_TensorType(tensor)), last(tensor)};
  const bool wider = x && TF_TensorType(x) == TF_BFLOAT16 && view.type == Type::kFloat;
  if (wider) view.type = Type::kRounded;
  if (view.type != Type::kInt8) return view;
  const int64_t rows = rank < 2 ? 1 : TF_Dim(tensor, rank - 2);
  require(rows % kScaleRows == 0, "8-bit weights have " + std::to_string(rows) +
                                      " rows; they must be a multiple of 32");
  require(scales && TF_TensorElementCount(scales) * kScaleRows == TF_TensorElementCount(tensor),
          "8-bit weights need one scale for 32 rows of each column");
  view.scales = data<float>(scales);
  return view;
}

struct Attributes {
  bool transpose, keep, interleave;
  float scale, epsilon;
  int32_t chosen = 1, groups = 1, best_groups = 1;  // of a route, as are the next two
  bool two = false, normalize = false;
};

bool flag(TF_OpKernelConstruction* context, const char* name) {
  TF_Status* status = TF_NewStatus();
  unsigned char value = 0;
  TF_OpKernelConstruction_GetAttrBool(context, name, &value, status);
  TF_DeleteStatus(status);
  return value;
}

// x [..., K], w [K, N] (or [N, K] to transpose), scales -> y [..., N]
void matmul_op(Context& c, const Attributes& attributes) {
  TF_Tensor *x = c.input(0), *w = c.input(1), *scales = c.input(2);
  View right = matrix(w, x, scales);
  right.transposed = attributes.transpose;
  require(TF_NumDims(w) == 2, "w has rank " + std::to_string(TF_NumDims(w)) + "; it must be 2");
  const int64_t m = rows_of(x), k = last(x);
  const int64_t n = TF_Dim(w, attributes.transpose ? 0 : 1);
  require(TF_Dim(w, attributes.transpose ? 1 : 0) == k,
          "x has " + std::to_string(k) + " columns, w another number of rows");
  require(!attributes.transpose || right.type != Type::kInt8, "8-bit weights can't be transposed");
  const Type type = type_of(TF_TensorType(x));
  char* y = c.output(0, TF_TensorType(x), shape_with_last(x, n));
  const int32_t offsets[] = {0, static_cast<int32_t>(m)};
  const Groups one{matrix(x), right, k, n, 0, 1, offsets, 0};
  grouped(one, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      store(type, y + (row * n + at) * size_of(type), value, real);
    });
  });
}

// x [..., M], dy [..., N] -> x^T dy [M, N], in the weights' type
void outer_op(Context& c, const Attributes&, TF_DataType weight) {
  TF_Tensor *x = c.input(0), *dy = c.input(1);
  const int64_t m = last(x), n = last(dy);
  require(rows_of(x) == rows_of(dy), "x and dy have different numbers of rows");
  const int32_t offsets[] = {0, static_cast<int32_t>(rows_of(x))};
  grouped_outer(matrix(x), matrix(dy), m, n, 1, offsets, type_of(weight),
                c.output(0, weight, {m, n}));
}

Experts experts_of(TF_Tensor* x, TF_Tensor* up, TF_Tensor* up_scales, TF_Tensor* down,
                   TF_Tensor* down_scales) {
  require(TF_NumDims(up) == 3 && TF_NumDims(down) == 3, "stacked experts must have rank 3");
  const Experts found{matrix(up, x, up_scales), matrix(down, x, down_scales), TF_Dim(up, 0),
                      TF_Dim(up, 1), TF_Dim(up, 2) / 2};
  require(TF_Dim(down, 0) == found.count && TF_Dim(down, 1) == found.inner &&
              TF_Dim(down, 2) == found.hidden && TF_Dim(up, 2) % 2 == 0,
          "gate_up [E, D, 2I] and down [E, I, D] do not fit together");
  return found;
}

// x [..., D], indices [T, K], gates [T, K] (or both empty: expert 0 for all, with weight 1), up,
// up_scales, down, down_scales
// -> y [..., D], kept [A, 2I] (or [0, 2I]), order [A], offsets [E + 1]
void experts_op(Context& c, const Attributes& attributes) {
  TF_Tensor *x = c.input(0), *indices = c.input(1), *gates = c.input(2);
  TF_Tensor *up = c.input(3), *up_scales = c.input(4);
  TF_Tensor *down = c.input(5), *down_scales = c.input(6);
  const Experts experts = experts_of(x, up, up_scales, down, down_scales);
  const bool one = TF_TensorElementCount(indices) == 0;
  const int64_t tokens = rows_of(x), per_token = one ? 1 : last(indices);
  const int64_t assignments = tokens * per_token;
  require(last(x) == experts.hidden, "x and gate_up have different hidden sizes");
  require(one || (rows_of(indices) == tokens && TF_TensorElementCount(gates) == assignments),
          "indices, gates and x are of different numbers of tokens");
  const std::vector<int32_t> first(one ? tokens : 0);
  const int32_t* chosen = one ? first.data() : data<int32_t>(indices);
  for (int64_t i = 0; i < assignments; i++) {
    require(chosen[i] >= 0 && chosen[i] < experts.count,
            "indices hold " + std::to_string(chosen[i]) + "; experts run from 0 to " +
                std::to_string(experts.count - 1));
  }
  const TF_DataType type = TF_TensorType(x);
  char* y = c.output(0, type, shape_with_last(x, experts.hidden));
  char* kept = c.output(1, type, {attributes.keep ? assignments : 0, 2 * experts.inner});
  auto* order = reinterpret_cast<int32_t*>(c.output(2, TF_INT32, {assignments}));
  auto* offsets = reinterpret_cast<int32_t*>(c.output(3, TF_INT32, {experts.count + 1}));
  sort_by_expert(chosen, assignments, experts.count, order, offsets);
  const std::vector<float> ones(one ? tokens : 0, 1.f);
  run_experts(matrix(x), tokens, experts, one ? ones.data() : data<float>(gates), per_token, order,
              offsets, attributes.keep ? kept : nullptr, y);
}

// x, gates, up, down, kept, order, offsets, dy -> dx [..., D] float32, dgates [T, K], dup, ddown
void experts_grad_op(Context& c, const Attributes&) {
  TF_Tensor *x = c.input(0), *gates = c.input(1), *up = c.input(2), *down = c.input(3);
  TF_Tensor *kept = c.input(4), *order = c.input(5), *offsets = c.input(6), *dy = c.input(7);
  const Experts experts = experts_of(x, up, nullptr, down, nullptr);
  const bool one = TF_TensorElementCount(gates) == 0;
  const int64_t tokens = rows_of(x), per_token = one ? 1 : last(gates);
  const std::vector<float> ones(one ? tokens : 0, 1.f);
  require(TF_Dim(kept, 0) == tokens * per_token, "the forward pass did not keep what this needs");
  auto* dx = reinterpret_cast<float*>(c.output(0, TF_FLOAT, shape_with_last(x, experts.hidden)));
  auto* dgates =
      reinterpret_cast<float*>(c.output(1, TF_FLOAT, {one ? 0 : tokens, per_token}));
  std::vector<float> unread(ones.size());
  const TF_DataType weight = TF_TensorType(up);
  char* dup = c.output(2, weight, {experts.count, experts.hidden, 2 * experts.inner});
  char* ddown = c.output(3, weight, {experts.count, experts.inner, experts.hidden});
  run_experts_backward(matrix(x), tokens, experts, one ? ones.data() : data<float>(gates),
                       per_token, data<int32_t>(order), data<int32_t>(offsets), data<char>(kept),
                       matrix(dy), dx, one ? unread.data() : dgates, type_of(weight), dup, ddown);
}

// q [B, S, H, Q], kv [B, L, H, N + V], k_rope [B, L, R], cosines and sines [B or 1, S, R / 2],
// slots [B or 1, S], valid [B, L] or empty
Attention attention_of(Context& c, const Attributes& attributes) {
  TF_Tensor *q = c.input(0), *kv = c.input(1), *k_rope = c.input(2);
  TF_Tensor *cosines = c.input(3), *sines = c.input(4), *slots = c.input(5), *valid = c.input(6);
  Attention a;
  a.q = data<char>(q);
  a.kv = data<char>(kv);
  a.k_rope = data<char>(k_rope);
  a.type = type_of(TF_TensorType(q));
  a.cosines = data<float>(cosines);
  a.sines = data<float>(sines);
  a.slots = data<int32_t>(slots);
  a.valid = TF_TensorElementCount(valid) ? data<unsigned char>(valid) : nullptr;
  a.interleave = attributes.interleave;
  a.scale = attributes.scale;
  a.batch = TF_Dim(q, 0);
  a.queries = TF_Dim(q, 1);
  a.heads = TF_Dim(q, 2);
  a.keys = TF_Dim(kv, 1);
  a.rope = last(k_rope);
  a.nope = last(q) - a.rope;
  a.value = last(kv) - a.nope;
  const int64_t places = TF_TensorElementCount(slots);
  a.one_row = places == a.queries;
  require(a.nope > 0 && a.value > 0 && a.rope <= kMostRope, "q, kv and k_rope do not fit together");
  require(TF_Dim(kv, 0) == a.batch && TF_Dim(kv, 2) == a.heads && TF_Dim(k_rope, 1) == a.keys,
          "q, kv and k_rope are of different batches, heads or lengths");
  require(a.one_row || places == a.batch * a.queries, "slots must be [B, S] or [1, S]");
  require(TF_TensorElementCount(cosines) == places * (a.rope / 2) &&
              TF_TensorElementCount(sines) == places * (a.rope / 2),
          "cosines and sines must be [B, S, R / 2], with as many rows as slots");
  require(!a.valid || TF_TensorElementCount(valid) == a.batch * a.keys, "valid must be [B, L]");
  return a;
}

// -> y [B, S, H, V], sums [B, H, S]
void attention_op(Context& c, const Attributes& attributes) {
  const Attention a = attention_of(c, attributes);
  char* y = c.output(0, TF_TensorType(c.input(0)), {a.batch, a.queries, a.heads, a.value});
  attend(a, y, reinterpret_cast<float*>(c.output(1, TF_FLOAT, {a.batch, a.heads, a.queries})));
}

// and y, sums, dy -> dq, dkv, dk_rope [B, H, L, R]
void attention_grad_op(Context& c, const Attributes& attributes) {
  const Attention a = attention_of(c, attributes);
  const TF_DataType type = TF_TensorType(c.input(0));
  char* dq = c.output(0, type, {a.batch, a.queries, a.heads, a.wide()});
  char* dkv = c.output(1, type, {a.batch, a.keys, a.heads, a.nope + a.value});
  char* dk_rope = c.output(2, TF_FLOAT, {a.batch, a.heads, a.keys, a.rope});
  attend_backward(a, data<char>(c.input(7)), data<float>(c.input(8)), data<char>(c.input(9)), dq,
                  dkv, reinterpret_cast<float*>(dk_rope));
}

// q [B, S, H, N + R], compressed [B, S, C + R], norm [C], up [C, H (N + V)], cosines and sines
// [B or 1, S, R / 2], slots [B or 1, S], valid [B, L] or empty, entries [B, L, C + R]
// -> y [B, S, H V], entries with the new tokens, in place where nobody else holds them
void latent_attention_op(Context& c, const Attributes& attributes) {
  TF_Tensor *q = c.input(0), *compressed = c.input(1), *norm = c.input(2), *up = c.input(3);
  TF_Tensor *cosines = c.input(4), *sines = c.input(5), *slots = c.input(6), *valid = c.input(7);
  require(TF_NumDims(q) == 4, "q has rank " + std::to_string(TF_NumDims(q)) + "; it must be 4");
  LatentAttention a;
  a.batch = TF_Dim(q, 0);
  a.count = TF_Dim(q, 1);
  a.heads = TF_Dim(q, 2);
  a.length = c.size(8, 1);
  a.rope = 2 * last(cosines);
  a.nope = last(q) - a.rope;
  a.latent = last(norm);
  a.value = last(up) / a.heads - a.nope;
  a.q = matrix(q);
  a.q.stride *= a.heads;
  a.compressed = matrix(compressed);
  a.norm = matrix(norm);
  a.up = matrix(up, q);
  a.cosines = data<float>(cosines);
  a.sines = data<float>(sines);
  a.slots = data<int32_t>(slots);
  a.valid = TF_TensorElementCount(valid) ? data<char>(valid) : nullptr;
  a.interleave = attributes.interleave;
  a.scale = attributes.scale;
  a.epsilon = attributes.epsilon;
  require(a.nope > 0 && a.value > 0 && a.heads * (a.nope + a.value) == last(up) &&
              rows_of(up) == a.latent && last(compressed) == a.width() &&
              rows_of(compressed) == a.tokens(),
          "q, compressed, norm, up and cosines do not fit together");
  a.one_angle = rows_of(cosines) == a.count;
  a.one_slot = TF_TensorElementCount(slots) == a.count;
  require((a.one_angle || rows_of(cosines) == a.tokens()) && rows_of(sines) == rows_of(cosines) &&
              last(sines) == last(cosines),
          "cosines and sines must be [B, S, R / 2] or [1, S, R / 2]");
  require(a.one_slot || TF_TensorElementCount(slots) == a.tokens(), "slots must be [B or 1, S]");
  require(!a.valid || TF_TensorElementCount(valid) == a.batch * a.length, "valid must be [B, L]");
  for (int64_t i = 0; i < TF_TensorElementCount(slots); i++) {
    require(a.slots[i] >= 0 && a.slots[i] < a.length,
            "slots hold " + std::to_string(a.slots[i]) + "; the cache has " +
                std::to_string(a.length));
  }
  char* y = c.output(0, TF_TensorType(q), {a.batch, a.count, a.heads * a.value});
  a.entries = c.changed(8, 1, {a.batch, a.length, a.width()});
  a.run(y);
}

// ---------------------------------------------------------------- one pass over memory

// What stock TensorFlow does in many operations, each of which reads and writes all its numbers,
// is here one pass: norms, cross-entropy, the optimizer.

constexpr int64_t kBlockRows = 64;  // rows summed together, whatever the number of threads

// Calls `visit(column, count)` for each vector of a row.
template <class Visit>
inline void along(int64_t columns, const Visit& visit) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    visit(c, static_cast<int>(std::min<int64_t>(kLanes, columns - c)));
  }
}

// Row-major numbers of one type, and one row of them.
struct Table {
  char* data;
  Type type;
  int64_t columns;

  char* at(int64_t row, int64_t column) const {
    return data + (row * columns + column) * size_of(type);
  }
  Vec get(int64_t row, int64_t column, int count) const {
    return load(type, at(row, column), count);
  }
  void put(int64_t row, int64_t column, Vec value, int count) const {
    store(type, at(row, column), value, count);
  }
};

Table rows_in(TF_Tensor* tensor) {
  return {data<char>(tensor), type_of(TF_TensorType(tensor)), last(tensor)};
}

Table floats_in(TF_Tensor* tensor, int64_t columns) {
  return {data<char>(tensor), Type::kFloat, columns};
}

// Writes past the caches what nobody reads soon: memory then isn't read before it is written.
inline void stream(float* to, Vec value, int count) {
#ifdef __AVX512F__
  if (count == kLanes) return _mm512_stream_ps(to, (__m512)value);
#endif
  store(Type::kFloat, reinterpret_cast<char*>(to), value, count);
}

// x [..., D], weight [D] -> y = x / rms(x) * weight, and 1 / rms(x) of each row
void rms_norm_op(Context& c, const Attributes& attributes) {
  TF_Tensor *in = c.input(0), *gain = c.input(1);
  const Table x = rows_in(in), weight = floats_in(gain, last(in));
  require(TF_TensorElementCount(gain) == x.columns, "the norm's weight is not as wide as x");
  const int64_t count = rows_of(in);
  const Table y{c.output(0, TF_TensorType(in), shape_with_last(in, x.columns)), x.type, x.columns};
  auto* scales = reinterpret_cast<float*>(c.output(1, TF_FLOAT, {count}));
  shared_rows(count, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      Vec squares{};
      along(x.columns, [&](int64_t k, int n) {
        const Vec value = x.get(row, k, n);
        squares += value * value;
      });
      const float scale = 1.f / std::sqrt(sum(squares) / x.columns + attributes.epsilon);
      scales[row] = scale;
      along(x.columns, [&](int64_t k, int n) {
        y.put(row, k, x.get(row, k, n) * scale * weight.get(0, k, n), n);
      });
    }
  });
}

// x, weight, scales, dy -> dx, dweight
void rms_norm_grad_op(Context& c, const Attributes&) {
  TF_Tensor *in = c.input(0), *gain = c.input(1), *kept = c.input(2), *above = c.input(3);
  const Table x = rows_in(in), weight = floats_in(gain, last(in)), dy = rows_in(above);
  const float* scales = data<float>(kept);
  const int64_t count = rows_of(in), blocks = (count + kBlockRows - 1) / kBlockRows;
  const Table dx{c.output(0, TF_TensorType(in), shape_with_last(in, x.columns)), x.type, x.columns};
  const Table dweight{c.output(1, TF_FLOAT, {x.columns}), Type::kFloat, x.columns};
  std::vector<float> sums(blocks * x.columns);
  const Table partial{reinterpret_cast<char*>(sums.data()), Type::kFloat, x.columns};
  Threads::shared().run(blocks, [&](int64_t block) {
    const int64_t end = std::min(count, (block + 1) * kBlockRows);
    for (int64_t row = block * kBlockRows; row < end; row++) {
      const float scale = scales[row];
      Vec product{};
      along(x.columns, [&](int64_t k, int n) {
        const Vec turned = x.get(row, k, n) * scale * dy.get(row, k, n);
        partial.put(block, k, partial.get(block, k, n) + turned, n);
        product += turned * weight.get(0, k, n);
      });
      const float mean = sum(product) / x.columns;
      along(x.columns, [&](int64_t k, int n) {
        const Vec normed = x.get(row, k, n) * scale;
        const Vec straight = dy.get(row, k, n) * weight.get(0, k, n);
        dx.put(row, k, (straight - normed * mean) * scale, n);
      });
    }
  });
  along(x.columns, [&](int64_t k, int n) {
    Vec total{};
    for (int64_t block = 0; block < blocks; block++) total += partial.get(block, k, n);
    dweight.put(0, k, total, n);
  });
}

// logits [T, V], labels [T] -> loss [T] = -log softmax(logits)[label], and the rows' log of sums
void cross_entropy_op(Context& c, const Attributes&) {
  TF_Tensor *in = c.input(0), *wanted = c.input(1);
  const Table x = rows_in(in);
  const int64_t count = rows_of(in);
  const int32_t* labels = data<int32_t>(wanted);
  require(TF_TensorElementCount(wanted) == count, "logits and labels are of different numbers");
  for (int64_t row = 0; row < count; row++) {
    require(labels[row] >= 0 && labels[row] < x.columns,
            "labels hold " + std::to_string(labels[row]) + "; they run from 0 to " +
                std::to_string(x.columns - 1));
  }
  auto* losses = reinterpret_cast<float*>(c.output(0, TF_FLOAT, {count}));
  auto* sums = reinterpret_cast<float*>(c.output(1, TF_FLOAT, {count}));
  shared_rows(count, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      Vec most = spread(-INFINITY);
      along(x.columns, [&](int64_t k, int n) {
        const Vec value = x.get(row, k, n);
        if (n == kLanes) most = value > most ? value : most;
        else for (int i = 0; i < n; i++) most[i] = std::max(most[i], value[i]);
      });
      float largest = most[0];
      for (int i = 1; i < kLanes; i++) largest = std::max(largest, most[i]);
      Vec total{};
      along(x.columns, [&](int64_t k, int n) {
        Vec value = exponential(x.get(row, k, n) - largest);
        for (int i = n; i < kLanes; i++) value[i] = 0;
        total += value;
      });
      sums[row] = largest + std::log(sum(total));
      losses[row] = sums[row] - x.get(row, labels[row], 1)[0];
    }
  });
}

// logits, labels, the rows' log of sums, dloss [T] -> dlogits [T, V]
void cross_entropy_grad_op(Context& c, const Attributes&) {
  TF_Tensor *in = c.input(0), *wanted = c.input(1), *kept = c.input(2), *above = c.input(3);
  const Table x = rows_in(in);
  const int32_t* labels = data<int32_t>(wanted);
  const float *sums = data<float>(kept), *dloss = data<float>(above);
  const Table dx{c.output(0, TF_TensorType(in), shape_with_last(in, x.columns)), x.type, x.columns};
  shared_rows(rows_of(in), [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      along(x.columns, [&](int64_t k, int n) {
        Vec value = exponential(x.get(row, k, n) - sums[row]);
        if (labels[row] >= k && labels[row] < k + kLanes) value[labels[row] - k] -= 1.f;
        dx.put(row, k, value * dloss[row], n);
      });
    }
  });
}

// N tensors of any shapes -> the sum of the squares of all their numbers
void square_sum_op(Context& c, const Attributes&) {
  constexpr int64_t block = 1 << 16, run = 1 << 12;  // float32 within a run, float64 beyond
  std::vector<std::pair<const float*, int64_t>> blocks;
  for (int i = 0; i < c.inputs(); i++) {
    TF_Tensor* tensor = c.input(i);
    const int64_t count = TF_TensorElementCount(tensor);
    for (int64_t at = 0; at < count; at += block) {
      blocks.push_back({data<float>(tensor) + at, std::min(block, count - at)});
    }
  }
  std::vector<double> sums(blocks.size());
  Threads::shared().run(blocks.size(), [&](int64_t i) {
    const Table x{(char*)blocks[i].first, Type::kFloat, blocks[i].second};
    for (int64_t at = 0; at < x.columns; at += run) {
      Vec squares{};
      along(std::min(run, x.columns - at), [&](int64_t k, int n) {
        const Vec value = x.get(0, at + k, n);
        squares += value * value;
      });
      sums[i] += sum(squares);
    }
  });
  double total = 0;
  for (double each : sums) total += each;
  *reinterpret_cast<float*>(c.output(0, TF_FLOAT, {})) = total;
}

// AdamW as torch defines it, on variable, moments, gradient and
// scalars [6] = (gradient's scale, rate, epsilon, decay, beta 1, beta 2), where rate and epsilon
// carry the bias correction. The new variable takes the gradient's memory where it may.
void adamw_op(Context& c, const Attributes&) {
  TF_Tensor *p = c.input(0), *m = c.input(1), *v = c.input(2);
  const float* s = data<float>(c.input(4));
  const float scale = s[0], rate = s[1], epsilon = s[2], shrink = s[3], beta1 = s[4], beta2 = s[5];
  std::vector<int64_t> shape;
  for (int axis = 0; axis < TF_NumDims(p); axis++) shape.push_back(TF_Dim(p, axis));
  const int64_t count = TF_TensorElementCount(p);
  char* new_p = c.output_on_input(0, 3, shape);
  TF_Tensor* g = c.input(3);
  for (TF_Tensor* other : {m, v, g}) {
    require(TF_TensorElementCount(other) == count, "variable, moments and gradient differ in size");
  }
  auto* new_m = reinterpret_cast<float*>(c.output(1, TF_FLOAT, shape));
  auto* new_v = reinterpret_cast<float*>(c.output(2, TF_FLOAT, shape));
  const Table variable{new_p, Type::kFloat, count};
  const Table old_p = floats_in(p, count), old_m = floats_in(m, count), old_v = floats_in(v, count),
             gradient = floats_in(g, count);
  constexpr int64_t block = 1 << 14;
  Threads::shared().run((count + block - 1) / block, [&](int64_t i) {
    along(std::min(block, count - i * block), [&](int64_t k, int n) {
      const int64_t at = i * block + k;
      const Vec slope = gradient.get(0, at, n) * scale;
      const Vec before = old_p.get(0, at, n), m0 = old_m.get(0, at, n), v0 = old_v.get(0, at, n);
      const Vec m1 = m0 + (slope - m0) * (1.f - beta1);
      const Vec v1 = v0 + (slope * slope - v0) * (1.f - beta2);
      stream(new_m + at, m1, n);
      stream(new_v + at, v1, n);
      variable.put(0, at, before - before * shrink - m1 * rate / (root(v1) + epsilon), n);
    });
  });
}

template <void (*op)(Context&, const Attributes&)>
void plain(Context& c, const Attributes& attributes, TF_OpKernelContext*) {
  op(c, attributes);
}

// scores [T, E], bias [E] or empty -> indices [T, K], gates [T, K]
void route_op(Context& c, const Attributes& a) {
  TF_Tensor *scores = c.input(0), *bias = c.input(1);
  const int64_t tokens = rows_of(scores), biases = TF_TensorElementCount(bias);
  const Route route{data<float>(scores), biases ? data<float>(bias) : nullptr, last(scores),
                    a.chosen, a.groups, a.best_groups, a.two, a.normalize, a.scale};
  require(!biases || biases == route.experts, "bias and scores are of different experts");
  require(a.chosen >= 1 && a.chosen <= route.experts && a.groups >= 1 && a.best_groups >= 1 &&
              route.experts % a.groups == 0 && (!a.two || route.experts / a.groups >= 2),
          "so many can't be chosen of these experts and groups");
  auto* indices = reinterpret_cast<int32_t*>(c.output(0, TF_INT32, {tokens, a.chosen}));
  auto* gates = reinterpret_cast<float*>(c.output(1, TF_FLOAT, {tokens, a.chosen}));
  shared_rows(tokens, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; t++) {
      route.run(t, indices + t * a.chosen, gates + t * a.chosen);
    }
  });
}

void outer_kernel(Context& c, const Attributes& attributes, TF_OpKernelContext* context) {
  outer_op(c, attributes, TF_ExpectedOutputDataType(context, 0));
}
void matmul_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) { matmul_op(c, a); }
void experts_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) { experts_op(c, a); }
void experts_grad_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) {
  experts_grad_op(c, a);
}

void attention_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) { attention_op(c, a); }
void attention_grad_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) {
  attention_grad_op(c, a);
}

void latent_attention_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) {
  latent_attention_op(c, a);
}

void route_kernel(Context& c, const Attributes& a, TF_OpKernelContext*) { route_op(c, a); }

void* create(TF_OpKernelConstruction* context) {
  auto* found = new Attributes{flag(context, "transpose"), flag(context, "keep"),
                               flag(context, "interleave"), 1, 0};
  TF_Status* status = TF_NewStatus();
  TF_OpKernelConstruction_GetAttrFloat(context, "scale", &found->scale, status);
  TF_OpKernelConstruction_GetAttrFloat(context, "epsilon", &found->epsilon, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "chosen", &found->chosen, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "groups", &found->groups, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "best_groups", &found->best_groups, status);
  found->two = flag(context, "two");
  found->normalize = flag(context, "normalize");
  TF_DeleteStatus(status);
  return found;
}
void destroy(void* attributes) { delete static_cast<Attributes*>(attributes); }

template <void (*kernel)(Context&, const Attributes&, TF_OpKernelContext*)>
void compute(void* attributes, TF_OpKernelContext* context) {
  Context c(context);
  try {
    kernel(c, *static_cast<Attributes*>(attributes), context);
  } catch (const Failure& failure) {
    c.fail(failure.message);
  }
}

// Shapes are said by the Python side, which knows more of them.
void any_shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

using Names = std::vector<const char*>;

template <void (*kernel)(Context&, const Attributes&, TF_OpKernelContext*)>
void declare(const char* name, const Names& attributes, const Names& inputs,
             const Names& outputs) {
  TF_Status* status = TF_NewStatus();
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(name);
  TF_OpDefinitionBuilderAddAttr(op, "transpose: bool = false");
  TF_OpDefinitionBuilderAddAttr(op, "keep: bool = false");
  TF_OpDefinitionBuilderAddAttr(op, "interleave: bool = false");
  TF_OpDefinitionBuilderAddAttr(op, "scale: float = 1");
  TF_OpDefinitionBuilderAddAttr(op, "epsilon: float = 0");
  for (const char* spec : attributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : inputs) TF_OpDefinitionBuilderAddInput(op, spec);
  for (const char* spec : outputs) TF_OpDefinitionBuilderAddOutput(op, spec);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, any_shape);
  TF_RegisterOpDefinition(op, status);
  TF_KernelBuilder* builder = TF_NewKernelBuilder(name, "CPU", create, compute<kernel>, destroy);
  TF_RegisterKernelBuilder(name, builder, status);
  TF_DeleteStatus(status);
}

const char* kType = "T: {float, bfloat16}";
const char* kWeight = "W: {float, bfloat16, int8}";

__attribute__((constructor)) void declare_all() {
  declare<matmul_kernel>("DsMatmul", {kType, kWeight}, {"x: T", "w: W", "scales: float"}, {"y: T"});
  declare<outer_kernel>("DsOuter", {kType, "W: {float, bfloat16}"}, {"x: T", "dy: T"}, {"dw: W"});
  declare<experts_kernel>("DsExperts", {kType, kWeight},
                          {"x: T", "indices: int32", "gates: float", "up: W", "up_scales: float",
                           "down: W", "down_scales: float"},
                          {"y: T", "kept: T", "order: int32", "offsets: int32"});
  declare<experts_grad_kernel>("DsExpertsGrad", {kType, "W: {float, bfloat16}"},
                               {"x: T", "gates: float", "up: W", "down: W", "kept: T",
                                "order: int32", "offsets: int32", "dy: T"},
                               {"dx: float", "dgates: float", "dup: W", "ddown: W"});
  const Names attention = {"q: T", "kv: T", "k_rope: T", "cosines: float", "sines: float",
                           "slots: int32", "valid: bool"};
  Names backward = attention;
  backward.insert(backward.end(), {"y: T", "sums: float", "dy: T"});
  declare<attention_kernel>("DsAttention", {kType}, attention, {"y: T", "sums: float"});
  declare<attention_grad_kernel>("DsAttentionGrad", {kType}, backward,
                                 {"dq: T", "dkv: T", "dk_rope: float"});
  declare<latent_attention_kernel>(
      "DsLatentAttention", {kType, "N: {float, bfloat16}", "W: {float, bfloat16}"},
      {"q: T", "compressed: T", "norm: N", "up: W", "cosines: float", "sines: float",
       "slots: int32", "valid: bool", "entries: T"},
      {"y: T", "updated: T"});
  declare<plain<rms_norm_op>>("DsRmsNorm", {kType}, {"x: T", "weight: float"},
                              {"y: T", "scales: float"});
  declare<plain<rms_norm_grad_op>>("DsRmsNormGrad", {kType},
                                   {"x: T", "weight: float", "scales: float", "dy: T"},
                                   {"dx: T", "dweight: float"});
  declare<plain<cross_entropy_op>>("DsCrossEntropy", {kType}, {"logits: T", "labels: int32"},
                                   {"losses: float", "sums: float"});
  declare<plain<cross_entropy_grad_op>>(
      "DsCrossEntropyGrad", {kType},
      {"logits: T", "labels: int32", "sums: float", "dlosses: float"}, {"dlogits: T"});
  declare<plain<square_sum_op>>("DsSquareSum", {"N: int >= 1"}, {"x: N * float"}, {"sum: float"});
  declare<plain<adamw_op>>("DsAdamW", {},
                           {"p: float", "m: float", "v: float", "g: float", "scalars: float"},
                           {"new_p: float", "new_m: float", "new_v: float"});
  declare<route_kernel>("DsRoute",
                        {"chosen: int", "groups: int", "best_groups: int", "two: bool",
                         "normalize: bool"},
                        {"scores: float", "bias: float"}, {"indices: int32", "gates: float"});
}

}  // namespace

extern "C" void ds_set_threads(int count) { Threads::shared().resize(std::max(1, count)); }
