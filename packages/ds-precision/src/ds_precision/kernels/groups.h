// Products of groups of rows, each with a matrix of its own.
//
// Results do not depend on the number of threads: each output is summed by one thread, in the
// order of the groups.

#pragma once

#include "pairs.h"

namespace ds {

// Rows offsets[e] to offsets[e + 1] of `a` times matrix e of `b`, for all e.
struct Groups {
  View a, b;
  int64_t inner, columns, pair;  // see `Shape`
  int64_t count;                 // of groups
  const int32_t* offsets;        // [count + 1]
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
    const Shape s{t.rows, g.inner, g.pair, t.row};
    // What this thread will most likely do after this.
    const int64_t later = std::min<int64_t>(tasks.size() - 1, i + Threads::shared().count());
    const View next = g.b.of_stack(tasks[later].group);
    product(g.a, t.row, g.b.of_stack(t.group), s, t.column, std::min(g.columns, t.column + share), put,
            &next);
  });
}

// Group by group within a share of the columns, so that `put` may add to what other groups wrote.
void grouped_in_order(const Groups& g, const Put& put) {
  // A left side is packed into tiles once for each part, so the fewer the better.
  const bool tiled = in_pairs(g.a, g.b, g.offsets[g.count]);
  const int64_t parts = (tiled ? 1 : 2) * Threads::shared().count();
  const int64_t share = std::max<int64_t>(1, (g.columns / parts + kPanel - 1) / kPanel) * kPanel;
  Threads::shared().run((g.columns + share - 1) / share, [&](int64_t i) {
    for (int64_t e = 0; e < g.count; e++) {
      const int64_t block = block_of(g.offsets[e + 1] - g.offsets[e]);
      for (int64_t row = g.offsets[e]; row < g.offsets[e + 1]; row += block) {
        const int64_t rows = std::min<int64_t>(block, g.offsets[e + 1] - row);
        const View next = g.b.of_stack(std::min(e + 1, g.count - 1));
        product(g.a, row, g.b.of_stack(e), Shape{rows, g.inner, g.pair, row}, i * share,
                std::min(g.columns, (i + 1) * share), put, &next);
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
  const bool tiled = in_pairs(a, b, m), few = count < 3 * Threads::shared().count();
  const int64_t share = tiled && !few ? n : 8 * kPanel, block = block_of(m);
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
        store(type, out + ((e * m + r) * n + at) * size_of(type), value, real);
      });
    };
    product(left, row, right, Shape{rows, inner, 0, row}, column, std::min(n, column + share), put);
  });
}

}  // namespace ds
