// What decoding does between the projections of latent attention.

#pragma once

#include "attention.h"

namespace ds {

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

}  // namespace ds
