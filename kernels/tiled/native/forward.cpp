// CLEAR attention, forward, on a CPU, by the online softmax of FlashAttention (arXiv 2205.14135,
// algorithm 1). An image query sees text keys, the disc around it and all pooled keys; or, with far
// keys, near tokens and far cells (see cells.py). A text query sees all text and image keys.
//
// The lanes of a vector are queries, those of a small tile of the image: a product is a vector of
// queries times one number of a key, nothing is ever reduced across lanes, and of every row of keys
// exactly the columns are computed that some query of the tile sees, as far as one row of queries
// can tell. Plain C++17 with the vector extension of GCC and Clang; HEAD_DIM is set when compiling
// (see forward.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "numbers.h"

// ACCUMULATORS: vectors held in registers, a few of which are left over.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 4, TILE_COLUMNS = 4, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 4, TILE_COLUMNS = 2, ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 2, TILE_COLUMNS = 2, ACCUMULATORS = 24;
#else
constexpr int LANES = 4, TILE_ROWS = 2, TILE_COLUMNS = 2, ACCUMULATORS = 12;
#endif
constexpr int D = HEAD_DIM;
constexpr int CHUNK = 128;        // keys between two updates of the sums
constexpr float MASKED = -1e30f;  // a score without weight; finite: no difference of two is NaN
constexpr int MOST_LEVELS = 16;   // these two as in cells.py
constexpr double ENDLESS = 1 << 30;
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.693147180559945309417f;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

extern "C" const int32_t tile_rows = TILE_ROWS, tile_columns = TILE_COLUMNS;

struct Problem {
  Tensor query, out, lse;           // text_queries, then those of the rows from query_start
  Tensor key, value;                // text_length, then the given rows of the image
  Tensor packed_key, packed_value;  // float32, of a head one after the other: text, then pooled
  Tensor bias;                      // float32, of the pooled keys
  int32_t dtype, text_queries, text_length, height, width, radius, query_start, pooled_length;
  int32_t far_levels, group;        // group: query heads that read the same key head
  struct { int32_t start, stop; } given[MOST_LEVELS + 1];  // rows of tokens, of a level's cells
  float scale;
};

namespace {

// 2^x for x <= 0, 0 below -126.5: the nearest integer goes into the exponent's bits, 2^rest is its
// Taylor series (|rest| <= 1/2, relative error 5e-9).
inline vec exp2(vec x) {
  x = x < -127.0f ? vec{} - 127.0f : x;
  vec shifted = x + 0x1.8p23f;  // has the integer in its lowest bits
  vec t = (x - (shifted - 0x1.8p23f)) * LN_2;
  vec sum = t * (1.0f / 5040) + 1.0f / 720;
  sum = sum * t + 1.0f / 120;
  sum = sum * t + 1.0f / 24;
  sum = sum * t + 1.0f / 6;
  sum = sum * t + 0.5f;
  sum = sum * t + 1.0f;
  sum = sum * t + 1.0f;
  return sum * (vec)(((ivec)shifted << 23) + 0x3f800000);
}

template <int... I> using Indices = std::integer_sequence<int, I...>;

// f(Indices<0, .. n - 1>) for a number n of 1 .. MOST that is known at run time only.
template <int MOST, class F> inline void with_indices(int n, F f) {
  if (n == MOST) f(std::make_integer_sequence<int, MOST>());
  else if constexpr (MOST > 1) with_indices<MOST - 1>(n, f);
}

template <class T, int... I> inline vec gather(const T *const *from, int d, Indices<I...>) {
  return vec{widen(from[I][d])...};
}

// Queries, a lane each, and their softmax over the keys seen so far.
struct Tile {
  int64_t token[LANES];
  vec query[D];      // times scale and log2(e): scores are logarithms to the base 2
  vec top, sum;      // largest score, sum of 2^(score - top)
  vec out[D];        // sum of 2^(score - top) value
  vec score[CHUNK];  // of the last `filled` keys, which are not in the sums yet; then their weight
  struct { const float *value; int length; } runs[CHUNK];  // where those keys' values are
  int filled, run_count;
  int64_t keys;      // seen, masked ones too

  template <class T> void load(const Problem &p, int64_t b, int64_t h) {
    const T *from[LANES];
    for (int lane = 0; lane < LANES; ++lane) from[lane] = p.query.at<const T>(b, token[lane], h);
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    for (int d = 0; d < D; ++d) query[d] = gather(from, d, lanes) * (p.scale * LOG2_E);
    top = vec{} + MASKED, sum = vec{};
    std::fill(out, out + D, vec{});
    filled = run_count = keys = 0;
  }

  template <class T> void store(const Problem &p, int64_t b, int64_t h) {
    update();
    const ivec blind = (top == MASKED) & (sum == sum);  // saw no key, not even one that is NaN
    for (vec &each : out) each = blind ? vec{} : each / sum;
    sum = blind ? vec{} + 1.0f : sum;
    for (int lane = 0; lane < LANES; ++lane) {
      T *to = p.out.at<T>(b, token[lane], h);
      for (int d = 0; d < D; ++d) narrow(out[d][lane], to[d]);
      *p.lse.at<float>(b, token[lane], h) = (top[lane] + std::log2(sum[lane])) * LN_2;
    }
  }

  void see_all(const float *key, const float *value, int length) {
    see(key, value, length, [](int, vec score) { return score; });
  }

  // Keys side by side: `judge` makes of a key's place among them and its score what counts.
  template <class Judge> void see(const float *key, const float *value, int length, Judge judge) {
    for (int i = 0; i < length;) {
      const int part = std::min(length - i, CHUNK - filled);
      runs[run_count++] = {value + i * D, part};
      score_run(key + i * D, part);
      keys += part;
      for (const int stop = i + part; i < stop; ++i, ++filled)
        score[filled] = judge(i, score[filled]);
      if (filled == CHUNK) update();
    }
  }

  void score_run(const float *key, int length) {
    vec *to = score + filled;
    for (int blocks = (length + ACCUMULATORS - 1) / ACCUMULATORS; blocks; --blocks) {
      const int count = (length + blocks - 1) / blocks;
      with_indices<ACCUMULATORS>(count, [&](auto keys) { score_keys(key, to, keys); });
      key += count * D, to += count, length -= count;
    }
  }

  template <int... I> void score_keys(const float *key, vec *to, Indices<I...>) {
    // Of few keys several sums each, of every so many channels: no addition waits for another.
    constexpr int KEYS = sizeof...(I), PARTS = KEYS > 4 ? 1 : KEYS > 2 ? 2 : 4;
    vec sums[PARTS][KEYS] = {};
    int d = 0;
    for (; d + PARTS <= D; d += PARTS)
      for (int part = 0; part < PARTS; ++part)
        ((sums[part][I] += query[d + part] * key[I * D + d + part]), ...);
    for (; d < D; ++d) ((sums[0][I] += query[d] * key[I * D + d]), ...);
    for (int part = 1; part < PARTS; ++part) ((sums[0][I] += sums[part][I]), ...);
    ((to[I] = sums[0][I]), ...);
  }

  void update() {
    vec old = top;
    for (int k = 0; k < filled; ++k) top = score[k] > top ? score[k] : top;
    vec factor = exp2(old - top);
    sum *= factor;
    for (int k = 0; k < filled; ++k) sum += score[k] = exp2(score[k] - top);
    constexpr int BLOCK = ACCUMULATORS >= 16 ? 16 : 8, REST = D % BLOCK;
    for (int d = 0; d < D - REST; d += BLOCK)
      add_values(d, factor, std::make_integer_sequence<int, BLOCK>());
    if constexpr (REST > 0)
      add_values(D - REST, factor, std::make_integer_sequence<int, REST>());
    filled = run_count = 0;
  }

  template <int... I> void add_values(int d, vec factor, Indices<I...>) {
    vec sums[] = {(out[d + I] * factor)...};
    const vec *weight = score;
    for (int run = 0; run < run_count; ++run) {
      const float *value = runs[run].value + d;
      for (int k = 0; k < runs[run].length; ++k, value += D, ++weight)
        ((sums[I] += *weight * value[I]), ...);
    }
    ((out[d + I] = sums[I]), ...);
  }
};

// Keys or values of `count` tokens, one after the other.
template <class T>
void widen_tokens(const Tensor &from, int64_t b, int64_t t, int64_t h, int count, float *to) {
  for (int i = 0; i < count; ++i, to += D) {
    const T *token = from.at<const T>(b, t + i, h);
    for (int d = 0; d < D; ++d) to[d] = widen(token[d]);
  }
}

// Tokens (level 0) or the cells of a level. Places and distances are doubled, so that centres are
// integers. A query sees a cell iff the centre of the cell around, of `outer_level`, is nearer than
// `outer` and its own is not nearer than `inner`; a token of CLEAR's disc iff it is nearer itself.
struct Level {
  int number, outer_level, columns;
  double inner2, outer2;
  std::vector<float> own, around;   // centres of every column's cell and of the cell around
  const float *key, *value, *bias;  // of the first given cell

  static int centre(int cell, int level, int length) {
    const int first = cell << level;
    return first + std::min(first + (1 << level), length) - 1;
  }

  static double reach2(int radius, int level) {
    const double reach = std::ldexp(radius, level);
    return std::min(reach * reach, ENDLESS);
  }

  Level(const Problem &p, int level) : number(level), outer_level(level) {
    inner2 = level ? reach2(p.radius, level) : 0, outer2 = ENDLESS;
    if (!p.far_levels) outer2 = reach2(p.radius, 1);
    else if (level < p.far_levels) outer2 = reach2(p.radius, ++outer_level);
    for (columns = 0; int64_t(columns) << level < p.width; ++columns) {
      own.push_back(centre(columns, level, p.width));
      around.push_back(centre(columns >> (outer_level - level), outer_level, p.width));
    }
  }
};

// A row of a level, and the columns of it that a tile of queries sees: first .. stop - 1 without
// hole .. hole_stop - 1, which all of its queries look into.
struct Row {
  const Level *level;
  const float *key, *value, *bias;  // of the first column
  vec inner, outer;                 // centres no farther than this to the side are nearer; -1: none
  int least_inner = INT32_MAX, most_outer = -1;
  int first = 0, stop = 0, hole = 0, hole_stop = 0;

  // For tiles of the rows y .. last_y.
  Row(const Level &of, int row, int height, int y, int last_y) : level(&of) {
    const int own = Level::centre(row, of.number, height);
    const int around = Level::centre(row >> (of.outer_level - of.number), of.outer_level, height);
    for (int i = 0; i < TILE_ROWS; ++i) {
      const int query = 2 * std::min(y + i, last_y);
      const int in = side(of.inner2, query - own), out = side(of.outer2, query - around);
      for (int j = i * TILE_COLUMNS; j < (i + 1) * TILE_COLUMNS; ++j) inner[j] = in, outer[j] = out;
      least_inner = std::min(least_inner, in), most_outer = std::max(most_outer, out);
    }
  }

  static int side(double reach2, double dy) {
    const double room = reach2 - dy * dy;
    return room > 0 ? int(std::sqrt(room - 1)) : -1;
  }

  // Whether some tile may see some of it: not all of it is too far, or looked into by all.
  bool seen(int width) const {
    const std::vector<float> &own = level->own;
    return most_outer >= 0 && least_inner < std::max(2 * (width - 1) - own.front(), own.back());
  }

  // On to the tile of the columns x .. last_x, to the right of the one before.
  void move(int x, int last_x) {
    const float *own = level->own.data(), *around = level->around.data();
    const int end = level->columns;
    while (first < end && around[first] < 2 * x - most_outer) ++first;
    while (stop < end && around[stop] <= 2 * last_x + most_outer) ++stop;
    while (hole < end && own[hole] < 2 * last_x - least_inner) ++hole;
    while (hole_stop < end && own[hole_stop] <= 2 * x + least_inner) ++hole_stop;
  }
};

inline vec abs(vec x) { return (vec)((ivec)x & 0x7fffffff); }

// Each returns the (query, key) pairs it computed, masked ones too.

// The text queries first .. stop - 1.
template <class T>
int64_t attend_text(const Problem &p, int64_t b, int64_t h, int first, int stop) {
  const int count = (stop - first + LANES - 1) / LANES, length = p.text_length + p.height * p.width;
  std::vector<Tile> tiles(count);
  for (int i = 0; i < count; ++i) {
    for (int lane = 0; lane < LANES; ++lane)  // beyond the last query, that one again
      tiles[i].token[lane] = std::min(first + i * LANES + lane, stop - 1);
    tiles[i].load<T>(p, b, h);
  }
  const int64_t key_head = h / p.group;
  float keys[CHUNK * D], values[CHUNK * D];
  for (int start = 0; start < length; start += CHUNK) {
    const int some = std::min(CHUNK, length - start);
    widen_tokens<T>(p.key, b, start, key_head, some, keys);
    widen_tokens<T>(p.value, b, start, key_head, some, values);
    for (int i = 0; i < count; ++i) {
      tiles[i].see_all(keys, values, some);
      tiles[i].update();
    }
  }
  for (int i = 0; i < count; ++i) tiles[i].store<T>(p, b, h);
  return int64_t(count) * LANES * length;
}

// The image queries of the rows first_row .. stop - 1.
template <class T>
int64_t attend_image(const Problem &p, int64_t b, int64_t h, int first_row, int stop) {
  const int64_t step = p.bias.token, key_head = h / p.group;
  std::vector<Level> levels;
  int64_t cells = 0;  // of the levels below
  for (int number = 0; number <= p.far_levels; ++number) {
    Level level(p, number);
    level.key = p.packed_key.at<float>(b, p.text_length + cells, key_head);
    level.value = p.packed_value.at<float>(b, p.text_length + cells, key_head);
    level.bias = p.bias.at<float>(0, cells, h);
    if (number) cells += int64_t(p.given[number].stop - p.given[number].start) * level.columns;
    levels.push_back(level);
  }
  // The rows of tokens that a row of tiles reaches, row y in slot y % slots.
  const int slots = std::min(p.height, TILE_ROWS + 2 * p.radius);
  const int64_t size = int64_t(p.width) * D;
  const std::unique_ptr<float[]> keys(new float[slots * size]), values(new float[slots * size]);
  int next = 0;  // the first row that has not been there
  std::vector<Row> rows;
  int64_t pairs = 0;
  Tile tile;
  for (int y = first_row; y < stop; y += TILE_ROWS) {
    const int last_y = std::min(y + TILE_ROWS, stop) - 1;
    rows.clear();
    for (const Level &level : levels) {
      const auto [start, end] = p.given[level.number];
      for (int at = start; at < end; ++at) {
        Row row(level, at, p.height, y, last_y);
        if (!row.seen(p.width)) continue;
        const int64_t cell = int64_t(at - start) * level.columns;
        if (level.number) {
          row.key = level.key + cell * D, row.value = level.value + cell * D;
          row.bias = level.bias + cell * step;
        } else {
          float *key = keys.get() + at % slots * size, *value = values.get() + at % slots * size;
          if (at >= next) {
            widen_tokens<T>(p.key, b, p.text_length + cell, key_head, p.width, key);
            widen_tokens<T>(p.value, b, p.text_length + cell, key_head, p.width, value);
            next = at + 1;
          }
          row.key = key, row.value = value;
        }
        rows.push_back(row);
      }
    }
    for (int x = 0; x < p.width; x += TILE_COLUMNS) {
      const int last_x = std::min(x + TILE_COLUMNS, p.width) - 1;
      vec place;
      for (int lane = 0; lane < LANES; ++lane) {  // beyond the border, the last row or column again
        const int64_t lane_y = std::min(y + lane / TILE_COLUMNS, last_y) - p.query_start;
        const int lane_x = std::min(x + lane % TILE_COLUMNS, last_x);
        tile.token[lane] = p.text_queries + lane_y * p.width + lane_x;
        place[lane] = 2 * lane_x;
      }
      tile.load<T>(p, b, h);
      tile.see_all(p.packed_key.at<float>(b, 0, key_head),
                   p.packed_value.at<float>(b, 0, key_head), p.text_length);
      if (!p.far_levels)
        tile.see(levels[0].key, levels[0].value, p.pooled_length, [&](int i, vec score) {
          return score + levels[0].bias[i * step] * LOG2_E;
        });
      for (Row &row : rows) {
        row.move(x, last_x);
        const float *own = row.level->own.data(), *around = row.level->around.data();
        const auto see_tokens = [&](int i, vec score) {
          return abs(place - around[row.first + i]) <= row.outer ? score : vec{} + MASKED;
        };
        const auto see_cells = [&](int from, int to) {
          tile.see(row.key + from * D, row.value + from * D, to - from, [&](int i, vec score) {
            const ivec near = abs(place - around[from + i]) <= row.outer;
            const ivec into = abs(place - own[from + i]) <= row.inner;
            return near & ~into ? score + row.bias[(from + i) * step] * LOG2_E : vec{} + MASKED;
          });
        };
        if (!row.level->number) {
          const int from = row.first;
          tile.see(row.key + from * D, row.value + from * D, row.stop - from, see_tokens);
        } else if (row.hole < row.hole_stop) {
          see_cells(row.first, row.hole);
          see_cells(row.hole_stop, row.stop);
        } else {
          see_cells(row.first, row.stop);
        }
      }
      pairs += tile.keys * LANES;
      tile.store<T>(p, b, h);
    }
  }
  return pairs;
}

template <class T>
int64_t attend(const Problem &p, bool text, int64_t b, int64_t h, int first, int stop) {
  return text ? attend_text<T>(p, b, h, first, stop) : attend_image<T>(p, b, h, first, stop);
}

}  // namespace

// A share of the work: of one batch item and head, text queries or rows of image queries. Returns
// the (query, key) pairs it computed; -1 where memory is too small.
extern "C" int64_t attend_share(const Problem *p, int text, int64_t b, int64_t h, int first,
                                int stop) try {
  switch (p->dtype) {
    case 0: return attend<float>(*p, text, b, h, first, stop);
    case 1: return attend<BFloat16>(*p, text, b, h, first, stop);
    default: return attend<Float16>(*p, text, b, h, first, stop);
  }
} catch (const std::bad_alloc &) {
  return -1;
}
