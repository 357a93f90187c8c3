// The feed-forward of experts, and its gradients.
//
// Letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
// A = T*K assignments.

#pragma once

#include "groups.h"

namespace ds {

// The weights of all experts: `up [E, D, 2I]`, gate first, and `down [E, I, D]`.
struct Experts {
  View up, down;
  int64_t count, hidden, inner;

  Groups through_up(const View& x, const int32_t* offsets) const {
    return {x, up, hidden, inner, inner, count, offsets};
  }
  Groups through_down(const View& x, const int32_t* offsets) const {
    return {x, down, inner, hidden, 0, count, offsets};
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

constexpr int64_t kFewAssignments = 256;

// The sum over a token's experts where tokens are few: threads take experts, each its own, and
// what they give is summed afterwards.
void sum_few(const Groups& down, int64_t tokens, const float* gates, int32_t per_token,
             const int32_t* order, Type type, char* y) {
  const int64_t hidden = down.columns, assignments = tokens * per_token;
  const Buffer buffer(assignments * hidden);
  float* parts = buffer.floats();
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
  const int64_t size = size_of(x.type);
  const Buffer activated(assignments * inner);
  char* middle = activated.bytes();
  View rows = x;
  rows.index = order;
  rows.share = per_token;
  grouped(experts.through_up(rows, offsets),
          [&](int64_t row, int64_t column, Vec gate, Vec up, int64_t count) {
            const int real = std::min<int64_t>(kLanes, count);
            const Vec value = gate * sigmoid(gate) * up;
            store(x.type, middle + (row * inner + column) * size, value, real);
            if (!kept) return;
            char* at = kept + (row * 2 * inner + column) * size;
            store(x.type, at, gate, real);
            store(x.type, at + inner * size, up, real);
          });
  const Groups down = experts.through_down(View{middle, x.type, inner}, offsets);
  if (assignments <= kFewAssignments) {
    sum_few(down, tokens, gates, per_token, order, x.type, y);
    return;
  }
  const bool narrow = x.type != Type::kFloat;
  const Buffer wide(narrow ? tokens * hidden : 0);
  float* sums = narrow ? wide.floats() : reinterpret_cast<float*>(y);
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

// The gradients of the operands of `run_experts` but the weights, given dy. What SwiGLU gave is
// computed again, not kept. For the weights' it leaves `middle [A, I]`, SwiGLU's output times the
// gate, and `wide [A, 2I]`, the gradient of its input.
void experts_input_gradients(const View& x, int64_t tokens, const Experts& experts,
                             const float* gates, int32_t per_token, const int32_t* order,
                             const int32_t* offsets, const char* kept, const View& dy, float* dx,
                             float* dgates, char* middle, char* wide) {
  const int64_t inner = experts.inner, hidden = experts.hidden;
  const int64_t assignments = tokens * per_token;
  const int64_t size = size_of(x.type);
  const View slopes{wide, x.type, 2 * inner};
  View above = dy;
  above.index = order;
  above.share = per_token;

  Groups back = experts.through_down(above, offsets);  // dy W_down^T: [A, I]
  back.b.transposed = true;
  std::swap(back.inner, back.columns);
  grouped(back, [&](int64_t row, int64_t column, Vec first, Vec second, int64_t count) {
    each(column, first, second, count, [&](int64_t at, Vec value, int real) {
      store(x.type, middle + (row * inner + at) * size, value, real);
    });
  });
  // Through SwiGLU: `middle` becomes gate * activation, `wide` the gradient before it.
  shared_rows(assignments, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const float gate = gates[order[row]];
      Vec dgate{};
      for (int64_t c = 0; c < inner; c += kLanes) {
        const int real = std::min<int64_t>(kLanes, inner - c);
        const char* at = kept + (row * 2 * inner + c) * size;
        char* mid = middle + (row * inner + c) * size;
        char* out = wide + (row * 2 * inner + c) * size;
        const Vec g = load(x.type, at, real), u = load(x.type, at + inner * size, real);
        const Vec above = load(x.type, mid, real), s = sigmoid(g), act = g * s;
        dgate += act * u * above;
        const Vec scaled = gate * above;
        store(x.type, out, scaled * u * (s + act * (1.f - s)), real);
        store(x.type, out + inner * size, scaled * act, real);
        store(x.type, mid, gate * act * u, real);
      }
      dgates[order[row]] = sum(dgate);
    }
  });
  std::memset(dx, 0, tokens * hidden * 4);
  Groups down = experts.through_up(slopes, offsets);  // [A, 2I] W_up^T
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
}

// The gradients of the weights of `run_experts`, of what `experts_input_gradients` left.
void experts_weight_gradients(const View& x, const Experts& experts, int32_t per_token,
                              const int32_t* order, const int32_t* offsets, const View& dy,
                              const char* middle, const char* wide, Type weight, char* dup,
                              char* ddown) {
  const int64_t inner = experts.inner, hidden = experts.hidden;
  const View activations{middle, x.type, inner}, slopes{wide, x.type, 2 * inner};
  View rows = x, above = dy;
  rows.index = above.index = order;
  rows.share = above.share = per_token;
  grouped_outer(rows, slopes, hidden, 2 * inner, experts.count, offsets, weight, dup);
  grouped_outer(activations, above, inner, hidden, experts.count, offsets, weight, ddown);
}

// All gradients of `run_experts`, given dy.
void run_experts_backward(const View& x, int64_t tokens, const Experts& experts,
                          const float* gates, int32_t per_token, const int32_t* order,
                          const int32_t* offsets, const char* kept, const View& dy, float* dx,
                          float* dgates, Type weight, char* dup, char* ddown) {
  const int64_t assignments = tokens * per_token;
  const Buffer middle(assignments * experts.inner), wide(assignments * 2 * experts.inner);
  experts_input_gradients(x, tokens, experts, gates, per_token, order, offsets, kept, dy, dx,
                          dgates, middle.bytes(), wide.bytes());
  experts_weight_gradients(x, experts, per_token, order, offsets, dy, middle.bytes(),
                           wide.bytes(), weight, dup, ddown);
}

}  // namespace ds
