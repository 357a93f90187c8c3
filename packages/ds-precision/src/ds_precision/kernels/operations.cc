// TensorFlow operations for what stock TensorFlow has no fast kernel for: few rows against many
// weights, groups of rows against stacked experts, attention by blocks, and passes over memory that
// it makes many of. Read in this order: numbers.h, threads.h, tiles.h, groups.h; then whichever
// operation you are after.
//
// Letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
// A = T*K assignments.

#include "attention.h"
#include "blocks.h"
#include "experts.h"
#include "latent_attention.h"
#include "passes.h"
#include "routing.h"
#include "tensorflow.h"

namespace ds {

// x [..., K], w [K, N] (or [N, K] to transpose), scales -> y [..., N]
void matmul_op(Context& c, const Attributes& attributes) {
  TF_Tensor *x = c.input(0), *w = c.input(1), *scales = c.input(2);
  require(TF_NumDims(w) == 2, "w has rank " + std::to_string(TF_NumDims(w)) + "; it must be 2");
  View right = weights(w, x, scales);
  right.transposed = attributes.transpose;
  const int64_t m = rows_of(x), k = last(x);
  const int64_t n = TF_Dim(w, attributes.transpose ? 0 : 1);
  require((attributes.transpose ? last(w) : rows_of_weights(w)) == k,
          "x has " + std::to_string(k) + " columns, w another number of rows");
  require(!attributes.transpose || !is_small(right.type), "small weights can't be transposed");
  const Type type = type_of(TF_TensorType(x));
  char* y = c.output(0, TF_TensorType(x), shape_with_last(x, n));
  const int32_t offsets[] = {0, static_cast<int32_t>(m)};
  const Groups one{matrix(x), right, k, n, 0, 1, offsets};
  grouped(one, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      store(type, y + (row * n + at) * size_of(type), value, real);
    });
  });
}

// x [..., M], dy [..., N] -> x^T dy [M, N], in the weights' type
void outer_op(Context& c, const Attributes&) {
  const TF_DataType weight = c.output_type(0);
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
  const Experts found{weights(up, x, up_scales), weights(down, x, down_scales), TF_Dim(up, 0),
                      rows_of_weights(up), TF_Dim(up, 2) / 2};
  require(TF_Dim(down, 0) == found.count && rows_of_weights(down) == found.inner &&
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

// What both backward operations of experts begin with: x, gates, up, down, kept, order, offsets, dy.
struct ExpertsBackward {
  ExpertsBackward(Context& c)
      : x(c.input(0)), gates(c.input(1)), up(c.input(2)), kept(c.input(4)),
        experts(experts_of(x, up, nullptr, c.input(3), nullptr)),
        one(TF_TensorElementCount(gates) == 0), tokens(rows_of(x)),
        per_token(one ? 1 : last(gates)), order(data<int32_t>(c.input(5))),
        offsets(data<int32_t>(c.input(6))), dy(matrix(c.input(7))), ones(one ? tokens : 0, 1.f),
        unread(ones.size()) {
    require(TF_Dim(kept, 0) == tokens * per_token, "the forward pass did not keep what this needs");
    dx = reinterpret_cast<float*>(c.output(0, TF_FLOAT, shape_with_last(x, experts.hidden)));
    auto* given = c.output(1, TF_FLOAT, {one ? 0 : tokens, per_token});
    dgates = one ? unread.data() : reinterpret_cast<float*>(given);
  }

  const float* weighed() const { return one ? ones.data() : data<float>(gates); }

  TF_Tensor *x, *gates, *up, *kept;
  Experts experts;
  bool one;
  int64_t tokens, per_token;
  const int32_t *order, *offsets;
  View dy;
  std::vector<float> ones, unread;
  float *dx, *dgates;
};

// -> dx [..., D] float32, dgates [T, K], dup, ddown
void experts_grad_op(Context& c, const Attributes&) {
  const ExpertsBackward b(c);
  const Experts& e = b.experts;
  const TF_DataType weight = TF_TensorType(b.up);
  char* dup = c.output(2, weight, {e.count, e.hidden, 2 * e.inner});
  char* ddown = c.output(3, weight, {e.count, e.inner, e.hidden});
  run_experts_backward(matrix(b.x), b.tokens, e, b.weighed(), b.per_token, b.order, b.offsets,
                       data<char>(b.kept), b.dy, b.dx, b.dgates, type_of(weight), dup, ddown);
}

// -> dx [..., D] float32, dgates [T, K], middle [A, I], wide [A, 2I]
void experts_input_grad_op(Context& c, const Attributes&) {
  const ExpertsBackward b(c);
  const Experts& e = b.experts;
  const TF_DataType type = TF_TensorType(b.x);
  char* middle = c.output(2, type, {b.tokens * b.per_token, e.inner});
  char* wide = c.output(3, type, {b.tokens * b.per_token, 2 * e.inner});
  experts_input_gradients(matrix(b.x), b.tokens, e, b.weighed(), b.per_token, b.order, b.offsets,
                          data<char>(b.kept), b.dy, b.dx, b.dgates, middle, wide);
}

// x, middle, wide, order, offsets, dy -> dup [E, D, 2I], ddown [E, I, D]
void experts_weight_grad_op(Context& c, const Attributes&) {
  TF_Tensor *x = c.input(0), *middle = c.input(1), *wide = c.input(2), *offsets = c.input(4);
  const int64_t tokens = rows_of(x), assignments = rows_of(middle);
  const int64_t count = TF_TensorElementCount(offsets) - 1;
  require(rows_of(wide) == assignments && TF_TensorElementCount(c.input(3)) == assignments &&
              last(wide) == 2 * last(middle) && (!tokens || assignments % tokens == 0),
          "middle, wide, order and x do not fit together");
  const Experts e{{}, {}, count, last(x), last(middle)};
  const TF_DataType weight = c.output_type(0);
  char* dup = c.output(0, weight, {count, e.hidden, 2 * e.inner});
  char* ddown = c.output(1, weight, {count, e.inner, e.hidden});
  experts_weight_gradients(matrix(x), e, tokens ? assignments / tokens : 1,
                           data<int32_t>(c.input(3)), data<int32_t>(offsets), matrix(c.input(5)),
                           data<char>(middle), data<char>(wide), type_of(weight), dup, ddown);
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

// Sequences with up to so many new tokens attend in the latent space, longer ones expanded.
constexpr int64_t kAbsorbed = 8;

// q [..., H, N + R], compressed [..., C + R], norm [C], up [C, H (N + V)], cosines and sines
// [..., R / 2]
LatentAttention latent_attention_of(Context& c, const Attributes& attributes) {
  TF_Tensor *q = c.input(0), *compressed = c.input(1), *norm = c.input(2), *up = c.input(3);
  TF_Tensor *cosines = c.input(4), *sines = c.input(5);
  require(TF_NumDims(q) >= 3, "q has rank " + std::to_string(TF_NumDims(q)) + "; it needs 3 or 4");
  LatentAttention a;
  a.heads = TF_Dim(q, TF_NumDims(q) - 2);
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
  a.angles = rows_of(cosines);
  a.valid = nullptr;
  a.length = 0;
  a.interleave = attributes.interleave;
  a.scale = attributes.scale;
  a.epsilon = attributes.epsilon;
  require(a.nope > 0 && a.value > 0 && a.heads * (a.nope + a.value) == last(up) &&
              rows_of(up) == a.latent && last(compressed) == a.width() &&
              rows_of(compressed) * a.heads == rows_of(q),
          "q, compressed, norm, up and cosines do not fit together");
  require(rows_of(sines) == a.angles && last(sines) == last(cosines),
          "cosines and sines must be of the same shape");
  return a;
}

// and slots [B or 1, S], valid [B, L] or empty, entries [B, L, C + R]
// -> y [B, S, H V], entries with the new tokens, in place where nobody else holds them
void latent_attention_op(Context& c, const Attributes& attributes) {
  LatentAttention a = latent_attention_of(c, attributes);
  TF_Tensor *q = c.input(0), *slots = c.input(6), *valid = c.input(7);
  require(TF_NumDims(q) == 4, "q has rank " + std::to_string(TF_NumDims(q)) + "; it must be 4");
  const int64_t count = TF_Dim(q, 1);
  a.batch = TF_Dim(q, 0);
  a.length = a.block = c.size(8, 1);
  a.table = 1;
  a.slots = data<int32_t>(slots);
  a.places = TF_TensorElementCount(slots);
  a.valid = TF_TensorElementCount(valid) ? data<char>(valid) : nullptr;
  require(a.angles == count || a.angles == a.batch * count,
          "cosines and sines must be [B, S, R / 2] or [1, S, R / 2]");
  require(a.places == count || a.places == a.batch * count, "slots must be [B or 1, S]");
  require(!a.valid || TF_TensorElementCount(valid) == a.batch * a.length, "valid must be [B, L]");
  for (int64_t i = 0; i < a.places; i++) {
    require(a.slots[i] >= 0 && a.slots[i] < a.length,
            "slots hold " + std::to_string(a.slots[i]) + "; the cache has " +
                std::to_string(a.length));
  }
  std::vector<int32_t> splits, tables;  // a row of the cache is one block
  for (int64_t b = 0; b <= a.batch; b++) splits.push_back(b * count);
  for (int64_t b = 0; b < a.batch; b++) tables.push_back(b);
  a.splits = splits.data();
  a.tables = tables.data();
  a.find_owners();
  char* y = c.output(0, TF_TensorType(q), {a.batch, count, a.heads * a.value});
  a.entries = c.changed(8, 1, {a.batch, a.length, a.width()});
  a.remember_all();
  a.attend_absorbed(y);
}

// and slots [T], splits [B + 1], tables [B, M], copies [n, 2], pool [blocks, block, C + R]
// -> y [T, H V]. The new tokens are written into the pool's own memory; before that blocks are
// copied as `copies` says, from and to.
//
// A variable is the pool: what it reads as is its memory, not a copy. The C interface knows no
// variables, so there is no other way to change a few blocks of one.
void paged_attention_op(Context& c, const Attributes& attributes) {
  LatentAttention a = latent_attention_of(c, attributes);
  TF_Tensor *q = c.input(0), *slots = c.input(6), *splits = c.input(7), *tables = c.input(8);
  TF_Tensor *copies = c.input(9), *pool = c.input(10);
  require(TF_NumDims(q) == 3, "q has rank " + std::to_string(TF_NumDims(q)) + "; it must be 3");
  require(TF_NumDims(tables) == 2 && TF_NumDims(pool) == 3 && last(pool) == a.width(),
          "tables must be [B, M] and the pool [blocks, block, C + R]");
  const int64_t count = TF_Dim(q, 0), blocks = TF_Dim(pool, 0);
  a.batch = TF_Dim(tables, 0);
  a.table = TF_Dim(tables, 1);
  a.block = TF_Dim(pool, 1);
  a.slots = data<int32_t>(slots);
  a.places = count;
  a.splits = data<int32_t>(splits);
  a.tables = data<int32_t>(tables);
  a.entries = data<char>(pool);
  require(a.angles == count && TF_TensorElementCount(slots) == count,
          "cosines, sines and slots must be of as many tokens as q");
  require(TF_TensorElementCount(splits) == a.batch + 1 && a.splits[0] == 0 &&
              a.splits[a.batch] == count,
          "splits must run from 0 to the number of tokens, one more than sequences");
  for (int64_t b = 0; b < a.batch; b++) {
    require(a.splits[b] <= a.splits[b + 1], "splits must not fall");
    for (int64_t t = a.splits[b]; t < a.splits[b + 1]; t++) {
      require(a.slots[t] >= 0 && a.slots[t] < a.table * a.block,
              "slots hold " + std::to_string(a.slots[t]) + "; a table has room for " +
                  std::to_string(a.table * a.block));
    }
    const int64_t used = (a.end(b) + a.block - 1) / a.block;
    for (int64_t i = 0; i < used; i++) {
      const int32_t at = a.tables[b * a.table + i];
      require(at >= 0 && at < blocks, "tables hold block " + std::to_string(at) +
                                          "; the pool has " + std::to_string(blocks));
    }
  }
  const auto* moved = data<int32_t>(copies);
  const int64_t bytes = a.block * a.width() * size_of(a.q.type);
  for (int64_t i = 0; i < TF_TensorElementCount(copies); i++) {
    require(moved[i] >= 0 && moved[i] < blocks, "copies hold block " + std::to_string(moved[i]) +
                                                    "; the pool has " + std::to_string(blocks));
  }
  for (int64_t i = 0; i + 1 < TF_TensorElementCount(copies); i += 2) {
    if (moved[i] == moved[i + 1]) continue;
    std::memcpy(a.entries + moved[i + 1] * bytes, a.entries + moved[i] * bytes, bytes);
  }
  a.find_owners();
  char* y = c.output(0, TF_TensorType(q), {count, a.heads * a.value});
  a.remember_all();
  int64_t few = 0;
  while (few < a.batch && a.count(few) <= kAbsorbed) few++;
  a.leading(few).attend_absorbed(y);
  for (int64_t b = few; b < a.batch; b++) {
    if (a.count(b)) a.attend_expanded(b, y);
  }
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

Blocks blocks_of(TF_Tensor* x, const Attributes& a) {
  const int rank = TF_NumDims(x);
  require(rank >= 2, "x has rank " + std::to_string(rank) + "; blocks need 2 or more");
  require(a.rows >= 1 && a.columns >= 1, "a block's sides must be 1 or more");
  const int64_t rows = TF_Dim(x, rank - 2);
  return {rows ? rows_of(x) / rows : 0, rows, last(x), a.rows, a.columns};
}

std::vector<int64_t> shape_of_scales(TF_Tensor* x, const Blocks& b) {
  std::vector<int64_t> shape = shape_with_last(x, b.across());
  shape[shape.size() - 2] = b.down();
  return shape;
}

const Small& small(TF_DataType type) {
  require(type == TF_FLOAT8_E4M3FN || type == TF_FLOAT8_E5M2, "values must be E4M3 or E5M2");
  return type == TF_FLOAT8_E5M2 ? kE5M2 : kE4M3;
}

// x [..., R, C] -> values [..., R, C] of 8 bits, scales [..., P, Q]
void quantize_op(Context& c, const Attributes& attributes) {
  TF_Tensor* x = c.input(0);
  const Blocks b = blocks_of(x, attributes);
  const TF_DataType type = c.output_type(0);
  char* values = c.output(0, type, shape_with_last(x, b.columns));
  auto* scales = reinterpret_cast<float*>(c.output(1, TF_FLOAT, shape_of_scales(x, b)));
  quantize(data<char>(x), type_of(TF_TensorType(x)), b, small(type), attributes.two, values, scales);
}

// values [..., R, C] of 8 bits, scales [..., P, Q] -> y [..., R, C]
void dequantize_op(Context& c, const Attributes& attributes) {
  TF_Tensor *values = c.input(0), *scales = c.input(1);
  const Blocks b = blocks_of(values, attributes);
  require(TF_TensorElementCount(scales) == b.count * b.down() * b.across(),
          "values and scales are of different numbers of blocks");
  const TF_DataType type = c.output_type(0);
  char* y = c.output(0, type, shape_with_last(values, b.columns));
  dequantize(data<char>(values), data<float>(scales), b, small(TF_TensorType(values)),
             type_of(type), y);
}

void* create(TF_OpKernelConstruction* context) {
  auto* found = new Attributes{flag(context, "transpose"), flag(context, "keep"),
                               flag(context, "interleave"), 1, 0};
  TF_Status* status = TF_NewStatus();
  TF_OpKernelConstruction_GetAttrFloat(context, "scale", &found->scale, status);
  TF_OpKernelConstruction_GetAttrFloat(context, "epsilon", &found->epsilon, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "chosen", &found->chosen, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "groups", &found->groups, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "best_groups", &found->best_groups, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "rows", &found->rows, status);
  TF_OpKernelConstruction_GetAttrInt32(context, "columns", &found->columns, status);
  found->two = flag(context, "two");
  found->normalize = flag(context, "normalize");
  TF_DeleteStatus(status);
  return found;
}
void destroy(void* attributes) { delete static_cast<Attributes*>(attributes); }

using Operation = void(Context&, const Attributes&);

template <Operation operation>
void compute(void* attributes, TF_OpKernelContext* context) {
  Context c(context);
  try {
    operation(c, *static_cast<Attributes*>(attributes));
  } catch (const Failure& failure) {
    c.fail(failure.message);
  }
}

// Shapes are said by the Python side, which knows more of them.
void any_shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

using Names = std::vector<const char*>;

template <Operation operation>
void declare(const char* name, const Names& attributes, const Names& inputs, const Names& outputs,
             bool stateful = false) {
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
  TF_OpDefinitionBuilderSetIsStateful(op, stateful);
  TF_RegisterOpDefinition(op, status);
  TF_KernelBuilder* builder = TF_NewKernelBuilder(name, "CPU", create, compute<operation>, destroy);
  TF_RegisterKernelBuilder(name, builder, status);
  TF_DeleteStatus(status);
}

const char* kType = "T: {float, bfloat16}";
const char* kWeight = "W: type";  // a list of types can't name float8_e4m3fn
const char* kScale = "S: {float, bfloat16} = DT_FLOAT";

__attribute__((constructor)) void declare_all() {
  declare<matmul_op>("DsMatmul", {kType, kWeight, kScale}, {"x: T", "w: W", "scales: S"}, {"y: T"});
  declare<outer_op>("DsOuter", {kType, "W: {float, bfloat16}"}, {"x: T", "dy: T"}, {"dw: W"});
  declare<experts_op>("DsExperts", {kType, kWeight, kScale},
                          {"x: T", "indices: int32", "gates: float", "up: W", "up_scales: S",
                           "down: W", "down_scales: S"},
                          {"y: T", "kept: T", "order: int32", "offsets: int32"});
  const Names experts = {"x: T", "gates: float", "up: W", "down: W", "kept: T", "order: int32",
                         "offsets: int32", "dy: T"};
  declare<experts_grad_op>("DsExpertsGrad", {kType, "W: {float, bfloat16}"}, experts,
                               {"dx: float", "dgates: float", "dup: W", "ddown: W"});
  declare<experts_input_grad_op>("DsExpertsInputGrad", {kType, "W: {float, bfloat16}"}, experts,
                                 {"dx: float", "dgates: float", "middle: T", "wide: T"});
  declare<experts_weight_grad_op>("DsExpertsWeightGrad", {kType, "W: {float, bfloat16}"},
                                  {"x: T", "middle: T", "wide: T", "order: int32",
                                   "offsets: int32", "dy: T"},
                                  {"dup: W", "ddown: W"});
  const Names attention = {"q: T", "kv: T", "k_rope: T", "cosines: float", "sines: float",
                           "slots: int32", "valid: bool"};
  Names backward = attention;
  backward.insert(backward.end(), {"y: T", "sums: float", "dy: T"});
  declare<attention_op>("DsAttention", {kType}, attention, {"y: T", "sums: float"});
  declare<attention_grad_op>("DsAttentionGrad", {kType}, backward,
                                 {"dq: T", "dkv: T", "dk_rope: float"});
  declare<latent_attention_op>(
      "DsLatentAttention", {kType, "N: {float, bfloat16}", "W: {float, bfloat16}"},
      {"q: T", "compressed: T", "norm: N", "up: W", "cosines: float", "sines: float",
       "slots: int32", "valid: bool", "entries: T"},
      {"y: T", "updated: T"});
  // Stateful, since it changes the pool: never left out, never done twice, and in order.
  declare<paged_attention_op>(
      "DsPagedAttention", {kType, "N: {float, bfloat16}", "W: {float, bfloat16}"},
      {"q: T", "compressed: T", "norm: N", "up: W", "cosines: float", "sines: float",
       "slots: int32", "splits: int32", "tables: int32", "copies: int32", "pool: T"},
      {"y: T"}, true);
  declare<rms_norm_op>("DsRmsNorm", {kType}, {"x: T", "weight: float"},
                              {"y: T", "scales: float"});
  declare<rms_norm_grad_op>("DsRmsNormGrad", {kType},
                                   {"x: T", "weight: float", "scales: float", "dy: T"},
                                   {"dx: T", "dweight: float"});
  declare<cross_entropy_op>("DsCrossEntropy", {kType}, {"logits: T", "labels: int32"},
                                   {"losses: float", "sums: float"});
  declare<cross_entropy_grad_op>(
      "DsCrossEntropyGrad", {kType},
      {"logits: T", "labels: int32", "sums: float", "dlosses: float"}, {"dlogits: T"});
  declare<square_sum_op>("DsSquareSum", {"N: int >= 1"}, {"x: N * float"}, {"sum: float"});
  declare<adamw_op>("DsAdamW", {},
                           {"p: float", "m: float", "v: float", "g: float", "scalars: float"},
                           {"new_p: float", "new_m: float", "new_v: float"});
  declare<route_op>("DsRoute",
                        {"chosen: int", "groups: int", "best_groups: int", "two: bool",
                         "normalize: bool"},
                        {"scores: float", "bias: float"}, {"indices: int32", "gates: float"});
  const char* eight_bits = "V: type";
  declare<quantize_op>("DsQuantize", {kType, eight_bits, "rows: int", "columns: int", "two: bool"},
                       {"x: T"}, {"values: V", "scales: float"});
  declare<dequantize_op>("DsDequantize", {kType, eight_bits, "rows: int", "columns: int"},
                         {"values: V", "scales: float"}, {"y: T"});
}

}  // namespace ds

extern "C" __attribute__((visibility("default"))) void ds_set_threads(int count) {
  ds::Threads::shared().resize(std::max(1, count));
}
