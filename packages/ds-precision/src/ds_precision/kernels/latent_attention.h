// What decoding does between the projections of latent attention.

#pragma once

#include "attention.h"

namespace ds {

// Decoding in the latent space (arXiv 2405.04434, section 2.1): `W_uk` goes into the query and
// `W_uv` into the output, so a new token reads nothing of the past but latents and rotated keys.
//
// Sequences bring as many new tokens as they like, and their past lies in blocks anywhere in a pool
// (arXiv 2309.06180). What a sequence gets does not depend on which others there are.
//
// Letters: T new tokens of B sequences, H heads, N and R the parts of a query, C latent, V a head's
// value, W = C + R.
struct LatentAttention {
  View q;                        // [T, H (N + R)] before rotation
  View compressed;               // [T, W]: the latent before its norm, the key before rotation
  View norm, up;                 // [C], [C, H (N + V)]
  const float *cosines, *sines;  // [angles, R / 2], token t's at t % angles
  const int32_t* slots;          // [places], token t's at t % places: where it goes in its
                                 // sequence; it sees slots up to its own
  const char* valid;             // [B, length] or null: and of those the valid ones
  int64_t angles, places, length;
  bool interleave;
  float scale, epsilon;
  int64_t heads, nope, rope, latent, value;
  int64_t batch;
  const int32_t* splits;  // [B + 1]: sequence b's new tokens
  const int32_t* tables;  // [B, table]: the blocks of its slots, in order
  int64_t table, block;   // and how many slots a block has
  char* entries;          // [blocks, block, W]
  std::vector<int32_t> owner = {};  // [T]: a token's sequence

  int64_t width() const { return latent + rope; }
  int64_t tokens() const { return splits[batch]; }
  int64_t count(int64_t b) const { return splits[b + 1] - splits[b]; }
  int64_t rows(int64_t b) const { return count(b) * heads; }  // queries of one sequence
  int64_t slot(int64_t token) const { return slots[token % places]; }
  View cached(int64_t b, int64_t slot) const {
    const int64_t at = tables[b * table + slot / block] * block + slot % block;
    return {entries + at * width() * size_of(q.type), q.type, width()};
  }

  // How many of its slots a sequence sees.
  int64_t end(int64_t b) const {
    int64_t found = 0;
    for (int64_t t = splits[b]; t < splits[b + 1]; t++) found = std::max(found, slot(t) + 1);
    return found;
  }

  void find_owners() {
    for (int64_t b = 0; b < batch; b++) owner.insert(owner.end(), count(b), b);
  }

  // Turns R numbers by their token's position.
  void turn(int64_t token, const float* from, float factor, float* to) const {
    const int64_t half = rope / 2, at = token % angles * half;
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
    const View entry = cached(owner[token], slot(token));
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

  // What the queries of one sequence found in some of its slots: sums of latents, weighed by e to
  // the score less the highest so far; and the sums of those weights.
  struct Found {
    float *latents, *highest, *total;  // [S, H, C], [S, H], [S, H]
  };

  // Looks at slots [first, end) of sequence `b`, a few at a time, so that no score is kept.
  void look(int64_t b, int64_t first, int64_t end, const float* queries, const Found& found) const {
    std::fill(found.highest, found.highest + rows(b), kLowest);
    std::fill(found.total, found.total + rows(b), 0.f);
    std::fill(found.latents, found.latents + rows(b) * latent, 0.f);
    float* scores = scratch(2, rows(b) * kLook);
    for (int64_t at = first, seen; at < end; at += seen) {
      seen = std::min({kLook, end - at, block - at % block});
      View keys = cached(b, at);
      keys.transposed = true;
      auto keep = [&](int64_t row, int64_t column, Vec one, Vec two, int64_t) {
        auto* to = reinterpret_cast<Vec*>(scores + row * kLook + column);
        to[0] = one;
        to[1] = two;
      };
      const Left asked = left_side(floats(queries, width()), 0, rows(b), width());
      product(asked, keys, Shape{rows(b), width(), 0}, 0, seen, keep);
      weigh(b, at, seen, scores, found);
      auto add = [&](int64_t row, int64_t column, Vec one, Vec two, int64_t wide) {
        each(column, one, two, wide, [&](int64_t c, Vec sums, int real) {
          char* to = reinterpret_cast<char*>(found.latents + row * latent + c);
          store(Type::kFloat, to, load(Type::kFloat, to, real) + sums, real);
        });
      };
      const Left weights = left_side(floats(scores, kLook), 0, rows(b), seen);
      product(weights, cached(b, at), Shape{rows(b), seen, 0}, 0, latent, add);
    }
  }

  // Turns scores into weights, and brings what was found before to the new highest score.
  void weigh(int64_t b, int64_t first, int64_t seen, float* scores, const Found& found) const {
    constexpr int vectors = kLook / kLanes;
    for (int64_t s = 0; s < count(b); s++) {
      const int64_t own = std::min(slot(splits[b] + s) + 1 - first, seen);
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

  // Some of a sequence's slots, for one thread.
  struct Part {
    int64_t sequence, first, end;
    Found found;
  };

  // One head's output: what all parts found, joined in `to [T, H, C]`, through `W_uv` into
  // `y [T, H V]`. A query that sees nothing gets zeros.
  void answer(int64_t head, const std::vector<Part>& parts, const std::vector<int64_t>& first_part,
              float* to, char* y) const {
    to += head * latent;
    for (int64_t token = 0; token < tokens(); token++) {
      const int64_t b = owner[token], row = (token - splits[b]) * heads + head;
      float highest = kLowest, total = 0;
      for (int64_t p = first_part[b]; p < first_part[b + 1]; p++) {
        highest = std::max(highest, parts[p].found.highest[row]);
      }
      float* own = to + token * heads * latent;
      std::fill(own, own + latent, 0.f);
      for (int64_t p = first_part[b]; p < first_part[b + 1]; p++) {
        const Found& part = parts[p].found;
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

  // Attends to what lies in the cache, the new tokens included.
  void attend_absorbed(char* y) const {
    if (!tokens()) return;
    std::unique_ptr<float[]> queries(new float[tokens() * heads * width()]);
    Threads::shared().run(heads, [&](int64_t head) { ask(head, queries.get()); });
    std::vector<Part> parts;
    std::vector<int64_t> first_part{0};
    int64_t size = 0;  // of what all parts find
    for (int64_t b = 0; b < batch; b++) {
      const int64_t last = end(b), share = share_of(last);
      for (int64_t at = 0; at < last; at += share) {
        parts.push_back({b, at, std::min(last, at + share), {}});
        size += rows(b) * (latent + 2);
      }
      first_part.push_back(parts.size());
    }
    std::unique_ptr<float[]> space(new float[size]);
    float* free = space.get();
    for (Part& part : parts) {
      const int64_t n = rows(part.sequence);
      part.found = {free, free + n * latent, free + n * (latent + 1)};
      free += n * (latent + 2);
    }
    Threads::shared().run(parts.size(), [&](int64_t i) {
      const Part& part = parts[i];
      const float* own = queries.get() + splits[part.sequence] * heads * width();
      look(part.sequence, part.first, part.end, own, part.found);
    });
    std::unique_ptr<float[]> joined(new float[tokens() * heads * latent]);
    Threads::shared().run(heads, [&](int64_t i) { answer(i, parts, first_part, joined.get(), y); });
  }

  // The slots that one thread looks at: at most `kParts` shares of a sequence, by its length alone.
  static int64_t share_of(int64_t slots) {
    return std::max(2 * kLook, (slots + kParts * kLook - 1) / (kParts * kLook) * kLook);
  }

  void remember_all() const {
    shared_rows(tokens(), [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; token++) remember(token);
    });
  }

  // The first `few` of the sequences.
  LatentAttention leading(int64_t few) const {
    LatentAttention found = *this;
    found.batch = few;
    return found;
  }

  // Attends for sequence `b` with keys and values of all its slots, which are made for that: less
  // work where many tokens are new.
  void attend_expanded(int64_t b, char* y) const {
    const int64_t slots_seen = end(b), first = splits[b], size = size_of(q.type);
    std::unique_ptr<char[]> latents(new char[slots_seen * latent * size]);
    std::unique_ptr<char[]> keys(new char[slots_seen * rope * size]);
    for (int64_t s = 0; s < slots_seen; s++) {
      const char* from = cached(b, s).data;
      std::memcpy(latents.get() + s * latent * size, from, latent * size);
      std::memcpy(keys.get() + s * rope * size, from + latent * size, rope * size);
    }
    const int64_t wide = heads * (nope + value);
    std::unique_ptr<char[]> kv(new char[slots_seen * wide * size]);
    const int32_t offsets[] = {0, static_cast<int32_t>(slots_seen)};
    const View left{latents.get(), q.type, latent};
    grouped({left, up, latent, wide, 0, 1, offsets},
            [&](int64_t row, int64_t column, Vec one, Vec two, int64_t count) {
              each(column, one, two, count, [&](int64_t at, Vec sums, int real) {
                store(q.type, kv.get() + (row * wide + at) * size, sums, real);
              });
            });
    Attention a;
    a.q = q.data + first * q.stride * size;
    a.kv = kv.get();
    a.k_rope = keys.get();
    a.type = q.type;
    a.cosines = cosines + first * (rope / 2);
    a.sines = sines + first * (rope / 2);
    a.slots = slots + first;
    a.valid = nullptr;
    a.one_row = true;
    a.interleave = interleave;
    a.scale = scale;
    a.batch = 1;
    a.queries = count(b);
    a.keys = slots_seen;
    a.heads = heads;
    a.nope = nope;
    a.rope = rope;
    a.value = value;
    std::unique_ptr<float[]> sums(new float[heads * a.queries]);
    attend(a, y + first * heads * value * size, sums.get());
  }

  static constexpr float kLowest = -1e30f;
  static constexpr int64_t kLook = 64;   // slots whose scores are in the making
  static constexpr int64_t kParts = 32;  // most shares of a sequence's slots
};

}  // namespace ds
