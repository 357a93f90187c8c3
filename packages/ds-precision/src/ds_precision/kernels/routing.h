// Which experts a token goes to.
//
// Letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
// A = T*K assignments.

#pragma once

#include <cmath>
#include <vector>

#include "numbers.h"
#include "threads.h"

namespace ds {

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

}  // namespace ds
