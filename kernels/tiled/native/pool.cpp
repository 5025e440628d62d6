// Cells of far keys from the level below them (see `pool_cells` in pooling.py), on a CPU: in one
// pass over that level. Plain C++17; HEAD_DIM is set when compiling (see pool.py).

#include <algorithm>
#include <cmath>

#include "numbers.h"

constexpr int D = HEAD_DIM;

struct Problem {
  Tensor key, value;          // of the level below, in raster order: tokens in `dtype`, or float32
  Tensor cell_key, cell_value;                    // float32
  Tensor largest, mass, cell_largest, cell_mass;  // float32, of one number each; see `shares`
  int32_t dtype, are_tokens, rows, columns;       // of the level below
  float scale, learned[4];                        // by the child's place
};

namespace {

// Several sums, of every so many channels: no addition waits for another.
template <class T> inline float length2(const T *key) {
  constexpr int PARTS = D % 16 ? D % 8 ? 1 : 8 : 16;
  float sums[PARTS] = {}, sum = 0;
  for (int d = 0; d < D; d += PARTS)
    for (int i = 0; i < PARTS; ++i) sums[i] += widen(key[d + i]) * widen(key[d + i]);
  for (float each : sums) sum += each;
  return sum;
}

// With their number known when compiling, a sum is a register's.
template <int COUNT, class T>
inline void sum_up(const T *const *children, const float *factor, float *__restrict to) {
  for (int d = 0; d < D; ++d) {
    float sum = 0;
    for (int i = 0; i < COUNT; ++i) sum += factor[i] * widen(children[i][d]);
    to[d] = sum;
  }
}

// Rows first .. stop - 1 of cells.
template <class T> void pool(const Problem &p, int64_t b, int64_t h, int first, int stop) {
  const int across = (p.columns + 1) / 2;
  for (int row = first; row < stop; ++row)
    for (int column = 0; column < across; ++column) {
      int64_t child[4];
      float largest[4], mass[4], factor[4];
      int count = 0;
      for (int place = 0; place < 4; ++place) {
        const int y = 2 * row + place / 2, x = 2 * column + place % 2;
        if (y >= p.rows || x >= p.columns) continue;
        const int64_t at = child[count] = int64_t(y) * p.columns + x;
        if (p.are_tokens) {
          largest[count] = p.scale * length2(p.key.at<const T>(b, at, h)), mass[count] = 1;
        } else {
          largest[count] = *p.largest.at<float>(b, at, h);
          mass[count] = *p.mass.at<float>(b, at, h);
        }
        factor[count++] = p.learned[place];
      }
      const float top = *std::max_element(largest, largest + count);
      float total = 0;
      for (int i = 0; i < count; ++i) total += mass[i] *= std::exp(largest[i] - top);
      const int64_t cell = int64_t(row) * across + column;
      *p.cell_largest.at<float>(b, cell, h) = top, *p.cell_mass.at<float>(b, cell, h) = total;
      for (int i = 0; i < count; ++i) factor[i] *= mass[i] / total;
      const auto pool_one = [&](const Tensor &from, const Tensor &to) {
        const T *children[4];
        for (int i = 0; i < count; ++i) children[i] = from.template at<const T>(b, child[i], h);
        float *sum = to.template at<float>(b, cell, h);
        if (count == 4) sum_up<4>(children, factor, sum);
        else if (count == 2) sum_up<2>(children, factor, sum);
        else sum_up<1>(children, factor, sum);
      };
      pool_one(p.key, p.cell_key);
      pool_one(p.value, p.cell_value);
    }
}

}  // namespace

// A share of the work: of one batch item and head, rows of cells.
extern "C" void pool_share(const Problem *p, int64_t b, int64_t h, int first, int stop) {
  switch (p->dtype) {
    case 0: return pool<float>(*p, b, h, first, stop);
    case 1: return pool<BFloat16>(*p, b, h, first, stop);
    default: return pool<Float16>(*p, b, h, first, stop);
  }
}
