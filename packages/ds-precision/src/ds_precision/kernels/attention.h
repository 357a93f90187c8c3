// Causal attention by blocks, and its gradients.

#pragma once

#include <cmath>
#include <memory>

#include "groups.h"

namespace ds {

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
  bool tiled() const { return type == Type::kBfloat16 && has_pairs(); }
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

constexpr int64_t kQueryBlock = 140;  // a multiple of the rows of a tile, almost or quite
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kMostRope = 512;

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// The right side of products, packed once for many: panels of 32 columns, as float32 or as
// tiles of pairs.
class Packed {
 public:
  static int64_t size(int64_t inner, int64_t columns) {  // in float32, whichever way
    return panels_of(columns) * tiles_of(inner) * kTileInner * kPanel;
  }

  Packed(float* space, int64_t inner, bool tiled) : data_(space), inner_(inner), tiled_(tiled) {}

  void pack(const View& from, int64_t columns) const {
    const Shape shape{0, inner_, 0};
    if (tiled_) return pack_right(from, shape, 0, columns, reinterpret_cast<uint16_t*>(data_));
    for (int64_t c = 0; c < columns; c += kPanel) {
      copy_panel(from, shape, c, columns - c, data_ + c / kPanel * step());
    }
  }

  // Calls `put` with `rows` rows of `a` times `panels` panels from `panel` on, over `count` numbers
  // of the inner size from `first` on, a multiple of 32.
  void multiply(View a, int64_t rows, int64_t panel, int64_t panels, int64_t first, int64_t count,
                const Put& put) const {
    const float* from = data_ + panel * step() + first * (tiled_ ? kPanel / 2 : kPanel);
    if (tiled_) {
      a.type = Type::kRounded;
      const LeftTiles left(a, 0, rows, count);
      for (int64_t p = 0; p < panels; p++) {
        left.multiply(reinterpret_cast<const uint16_t*>(from + p * step()),
                      {p * kPanel, (p + 1) * kPanel, 0}, put);
      }
      return;
    }
    const auto calls = tiles(std::make_index_sequence<kTileRows>());
    const Left left = left_side(a, 0, rows, count);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t high = std::min<int64_t>(kTileRows, rows - row);
      for (int64_t p = 0; p < panels; p++) {
        calls[high - 1](left, from + p * step(), Shape{rows, count, 0}, row, p * kPanel,
                        (p + 1) * kPanel, {reinterpret_cast<const char*>(from), 0}, put);
      }
    }
  }

 private:
  int64_t step() const {  // from one panel to the next
    return tiled_ ? tiles_of(inner_) * kTile : inner_ * kPanel;
  }

  float* data_;
  int64_t inner_;
  bool tiled_;
};

// A matrix of whole vectors in float32.
struct Rows {
  float* data;
  int64_t step;

  Rows(float* data, int64_t columns) : data(data), step(panels_of(columns) * kPanel) {}
  static int64_t size(int64_t rows, int64_t columns) { return rows * panels_of(columns) * kPanel; }
  float* row(int64_t r) const { return data + r * step; }
  Vec& at(int64_t r, int64_t column) const { return *reinterpret_cast<Vec*>(row(r) + column); }
  View view(bool transposed = false) const {
    View found = floats(data, step);
    found.transposed = transposed;
    return found;
  }
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

// What a product does with its sums: writes them to `to`, or adds them to rows from `first` on.
auto into(const Rows& to) {
  return [to](int64_t r, int64_t column, Vec low, Vec high, int64_t) {
    to.at(r, column) = low;
    to.at(r, column + kLanes) = high;
  };
}

auto adding(const Rows& to, int64_t first = 0) {
  return [to, first](int64_t r, int64_t column, Vec low, Vec high, int64_t) {
    to.at(first + r, column) += low;
    to.at(first + r, column + kLanes) += high;
  };
}

// One head of one row of the batch: its keys, as they are and packed, and blocks of its queries.
class Head {
 public:
  Head(const Attention& a, int64_t b, int64_t h, float* space)
      : a_(a), b_(b), h_(h), keys_(space, a.wide()),
        panels_(space + keys_size(a), a.wide(), a.tiled()) {
    for (int64_t k = 0; k < a.keys; k++) {  // the two parts come from two places
      widen(a.key_rows(b, h), k, a.nope, keys_.row(k));
      widen(a.rope_rows(b), k, a.rope, keys_.row(k) + a.nope);
    }
    panels_.pack(keys_.view(true), a.keys);
  }
  static int64_t size(const Attention& a) {
    return keys_size(a) + Packed::size(a.wide(), a.keys);
  }
  const Rows& keys() const { return keys_; }

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
    panels_.multiply(q.view(), rows, key / kPanel, panels_of(count), 0, a_.wide(), into(scores));
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
  static int64_t keys_size(const Attention& a) {  // `widen` writes whole vectors past the last
    return Rows::size(a.keys, a.wide()) + kLanes;
  }

  const Attention& a_;
  int64_t b_, h_;
  Rows keys_;
  Packed panels_;
};

// Hands out parts of a buffer.
class Space {
 public:
  explicit Space(float* data) : data_(data) {}
  float* take(int64_t size) { return std::exchange(data_, data_ + size); }
  Rows rows(int64_t rows, int64_t columns) { return {take(Rows::size(rows, columns)), columns}; }

 private:
  float* data_;
};

// y [B, S, H, V] and, for the backward pass, `sums [B, H, S]`: the logarithm of each softmax's sum.
void attend(const Attention& a, char* y, float* sums) {
  Threads::shared().run(a.batch * a.heads, [&](int64_t task) {
    const int64_t b = task / a.heads, h = task % a.heads;
    Space space(scratch(2, Head::size(a) + Packed::size(a.keys, a.value) +
                               Rows::size(kQueryBlock, a.wide()) +
                               Rows::size(kQueryBlock, kKeyBlock) +
                               Rows::size(kQueryBlock, a.value)));
    const Head head(a, b, h, space.take(Head::size(a)));
    const Packed values(space.take(Packed::size(a.keys, a.value)), a.keys, a.tiled());
    values.pack(a.value_rows(b, h), a.value);
    const Rows q = space.rows(kQueryBlock, a.wide());
    const Rows scores = space.rows(kQueryBlock, kKeyBlock);
    const Rows out = space.rows(kQueryBlock, a.value);
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
        values.multiply(scores.view(), rows, 0, panels_of(a.value), key, count, adding(out));
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

// The gradients of `attend`: dq [B, S, H, Q] and dkv [B, L, H, N + V] in the tensors' type,
// dk_rope [B, H, L, R] float32, one for each head. Weights are computed again, block by block.
void attend_backward(const Attention& a, const char* y, const float* sums, const char* dy, char* dq,
                     char* dkv, float* dk_rope) {
  Threads::shared().run(a.batch * a.heads, [&](int64_t task) {
    const int64_t b = task / a.heads, h = task % a.heads;
    Space space(scratch(2, Head::size(a) + Packed::size(a.value, a.keys) +
                               Packed::size(a.keys, a.wide()) +
                               2 * Rows::size(kQueryBlock, a.wide()) +
                               Packed::size(kQueryBlock, a.wide()) +
                               Rows::size(kQueryBlock, a.value) +
                               Packed::size(kQueryBlock, a.value) +
                               2 * Rows::size(kQueryBlock, kKeyBlock) +
                               Rows::size(a.keys, a.wide()) + Rows::size(a.keys, a.value)));
    const Head head(a, b, h, space.take(Head::size(a)));
    // For dP = dy V^T: values side by side. For dq = dS K: keys as they are.
    const Packed values(space.take(Packed::size(a.value, a.keys)), a.value, a.tiled());
    View value_rows = a.value_rows(b, h);
    value_rows.transposed = true;
    values.pack(value_rows, a.keys);
    const Packed keys(space.take(Packed::size(a.keys, a.wide())), a.keys, a.tiled());
    keys.pack(head.keys().view(), a.wide());

    const Rows q = space.rows(kQueryBlock, a.wide()), dq_rows = space.rows(kQueryBlock, a.wide());
    float* q_space = space.take(Packed::size(kQueryBlock, a.wide()));
    const Rows above = space.rows(kQueryBlock, a.value);
    float* above_space = space.take(Packed::size(kQueryBlock, a.value));
    const Rows p = space.rows(kQueryBlock, kKeyBlock), dp = space.rows(kQueryBlock, kKeyBlock);
    const Rows dk = space.rows(a.keys, a.wide()), dv = space.rows(a.keys, a.value);
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
      const Packed q_panels(q_space, rows, a.tiled()), above_panels(above_space, rows, a.tiled());
      q_panels.pack(q.view(), a.wide());
      above_panels.pack(above.view(), a.value);
      std::memset(dq_rows.data, 0, rows * dq_rows.step * 4);
      for (int64_t key = 0; key < seen; key += kKeyBlock) {
        const int64_t count = std::min(kKeyBlock, seen - key);
        head.score(q, first, rows, key, count, p);
        values.multiply(above.view(), rows, key / kPanel, panels_of(count), 0, a.value, into(dp));
        for (int64_t r = 0; r < rows; r++) {
          const float log_sum = sums[(b * a.heads + h) * a.queries + first + r];
          for (int64_t c = 0; c < panels_of(count) * kPanel; c += kLanes) {
            const Vec s = p.at(r, c);
            const Vec weight = s > Head::kForbidden ? exponential(s - log_sum) : Vec{};
            p.at(r, c) = weight;
            dp.at(r, c) = weight * (dp.at(r, c) - inner[r]);
          }
        }
        keys.multiply(dp.view(), rows, 0, panels_of(a.wide()), key, count, adding(dq_rows));
        above_panels.multiply(p.view(true), count, 0, panels_of(a.value), 0, rows,
                              adding(dv, key));
        q_panels.multiply(dp.view(true), count, 0, panels_of(a.wide()), 0, rows, adding(dk, key));
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

}  // namespace ds
