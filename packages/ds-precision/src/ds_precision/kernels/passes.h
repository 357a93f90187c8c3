// What stock TensorFlow does in many operations, each of which reads and writes all its numbers,
// is here one pass over memory: norms, cross-entropy, the optimizer.

#pragma once

#include <cmath>

#include "tensorflow.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ds {

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

}  // namespace ds
