// Rows of groups, as the ops of many branches share them: those of group g are the elements
// bounds[g] .. bounds[g + 1] of `order`, or where there is none the rows of these numbers.
#pragma once

#include <vector>

#include "few_rows.h"

namespace lora {

// What one call has of every group.
struct Groups {
  const Kernels& kernels;
  Type type;
  std::vector<int64_t> bounds;
  int64_t most_rows;
  const int64_t* order;  // may be null
  double keep;
  uint32_t threshold;
  const int64_t* seeds;  // null without dropout

  int64_t begin(int64_t g) const { return bounds[g]; }
  int64_t count(int64_t g) const { return bounds[g + 1] - bounds[g]; }
  bool takes(int64_t g) const { return 0 < count(g) && count(g) <= most_rows; }
  std::optional<Dropout> dropout(int64_t g) const {
    if (seeds == nullptr) return std::nullopt;
    const uint64_t seed = static_cast<uint64_t>(seeds[g]);
    return Dropout{
        {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, threshold, 0, 0};
  }
};

// A group's rows of a matrix whose columns are contiguous: where they lie, or a copy of them.
struct Own {
  Own(const Groups& groups, int64_t g, const Rows& all)
      : copy(groups.order != nullptr ? groups.count(g) * all.columns * size_of(groups.type) : 0),
        rows(all) {
    const int64_t bytes = rows.row_stride * size_of(groups.type);
    const char* const from = static_cast<const char*>(rows.data);
    if (groups.order == nullptr) {
      rows.data = from + groups.begin(g) * bytes;
      return;
    }
    const int64_t width = rows.columns * size_of(groups.type);
    for (int64_t m = 0; m < groups.count(g); ++m)
      std::memcpy(copy.data + m * width, from + groups.order[groups.begin(g) + m] * bytes, width);
    rows.data = copy.data;
    rows.row_stride = rows.columns;
  }
  // Writes the copy back.
  void put(const Groups& groups, int64_t g, Tensor& t) const {
    if (groups.order == nullptr) return;
    const int64_t width = rows.columns * size_of(groups.type);
    char* const to = static_cast<char*>(t.mutable_data_ptr());
    for (int64_t m = 0; m < groups.count(g); ++m)
      std::memcpy(to + groups.order[groups.begin(g) + m] * t.stride(0) * size_of(groups.type),
                  copy.data + m * width, width);
  }
  Result result() const {
    return {const_cast<void*>(rows.data), rows.type, rows.row_stride, rows.column_stride};
  }
  BufferOf<char> copy;
  Rows rows;
};

// Calls of(g) for every group that is computed.
template <typename Of>
void for_each(const Groups& groups, const Of& of) {
  const int64_t G = static_cast<int64_t>(groups.bounds.size()) - 2;
  int64_t most = 0, all = 0;
  for (int64_t g = 0; g < G; ++g) {
    if (!groups.takes(g)) continue;
    most = std::max(most, groups.count(g));
    all += groups.count(g);
  }
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      if (groups.takes(g)) of(g);
  };
  if (2 * most > all) return some(0, G);
  torch::stable::parallel_for(0, G, 1, some);
}

// [rows, columns] of a type, the columns contiguous.
void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns, Type type);

// Of the adapters [r_g,K] and [N,r_g].
void check_pairs(const std::vector<Tensor>& a, const std::vector<Tensor>& b, int64_t K, int64_t N,
                 Type type);

// Checked against the rows of a call and the number of its groups.
Groups groups_of(const Kernels& kernels, Type type, int64_t rows, std::vector<int64_t> bounds,
                 int64_t most_rows, const std::optional<Tensor>& order, size_t count, double keep,
                 int64_t threshold, const std::optional<Tensor>& seeds);

}  // namespace lora
