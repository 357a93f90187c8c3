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

}  // namespace ds
