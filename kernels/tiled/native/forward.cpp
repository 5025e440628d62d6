// CLEAR attention, forward, on a CPU, by the online softmax of FlashAttention (arXiv 2205.14135,
// algorithm 1). An image query sees the disc around it and dense keys (text, pooled); a text query
// sees all text and image keys.
//
// The lanes of a vector are queries, those of a small tile of the image: a product is a vector of
// queries times one number of a key, nothing is ever reduced across lanes, and of every row of keys
// exactly the columns that the tile reaches are computed. Plain C++17 with the vector extension of
// GCC and Clang; HEAD_DIM is set when compiling (see forward.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

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
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.693147180559945309417f;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

extern "C" const int32_t tile_rows = TILE_ROWS, tile_columns = TILE_COLUMNS;

// Strides in elements; head_dim has stride 1.
struct Tensor {
  void *data;
  int64_t batch, token, head;

  template <class T> T *at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<T *>(data) + b * batch + t * token + h * head;
  }
};

struct Problem {
  Tensor query, out, lse;         // text_queries, then those of the rows from query_start
  Tensor key, value;              // text_length, then height x width
  Tensor dense_key, dense_value;  // float32, the tokens of a head one after the other
  int32_t dtype, text_queries, text_length, height, width, radius, query_start, dense_length;
  float scale;
};

namespace {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "another size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  float magnitude = bit_cast<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity, NaN
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
}

// To the nearest, ties to even.
inline void narrow(float x, float &to) { to = x; }
inline void narrow(float x, BFloat16 &to) {
  uint32_t bits = bit_cast<uint32_t>(x);
  to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void narrow(float x, Float16 &to) {
  uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff, half;
  if (magnitude > 0x7f800000) half = 0x7e00;
  else if (magnitude >= 0x47800000) half = 0x7c00;
  else if (magnitude >= 0x38800000)
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  else half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;  // subnormal
  to.bits = half | (bits >> 16 & 0x8000);
}

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
  vec x, y;          // place in the image
  vec query[D];      // times scale and log2(e): scores are logarithms to the base 2
  vec top, sum;      // largest score, sum of 2^(score - top)
  vec out[D];        // sum of 2^(score - top) value
  vec score[CHUNK];  // of the last `filled` keys, which are not in the sums yet; then their weight
  struct { const float *value; int length; } runs[CHUNK];  // where those keys' values are
  int filled, run_count;

  template <class T> void load(const Problem &p, int64_t b, int64_t h) {
    const T *from[LANES];
    for (int lane = 0; lane < LANES; ++lane) from[lane] = p.query.at<const T>(b, token[lane], h);
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    for (int d = 0; d < D; ++d) query[d] = gather(from, d, lanes) * (p.scale * LOG2_E);
    top = vec{} + MASKED, sum = vec{};
    std::fill(out, out + D, vec{});
    filled = run_count = 0;
  }

  template <class T> void store(const Problem &p, int64_t b, int64_t h) {
    update();
    for (vec &each : out) each /= sum;
    for (int lane = 0; lane < LANES; ++lane) {
      T *to = p.out.at<T>(b, token[lane], h);
      for (int d = 0; d < D; ++d) narrow(out[d][lane], to[d]);
      *p.lse.at<float>(b, token[lane], h) = (top[lane] + std::log2(sum[lane])) * LN_2;
    }
  }

  void see_all(const float *key, const float *value, int length) {
    see(key, value, length, 0, vec{} + INFINITY);
  }

  // Keys side by side in a row of the image, from `column`: seen where dx^2 < room.
  void see(const float *key, const float *value, int length, int column, vec room) {
    while (length > 0) {
      int part = std::min(length, CHUNK - filled);
      runs[run_count++] = {value, part};
      for (int blocks = (part + ACCUMULATORS - 1) / ACCUMULATORS, left = part; blocks; --blocks) {
        int count = (left + blocks - 1) / blocks;
        auto score = [&](auto indices) { score_keys(key, column, room, indices); };
        with_indices<ACCUMULATORS>(count, score);
        key += count * D, column += count, left -= count;
      }
      value += part * D, length -= part;
      if (filled == CHUNK) update();
    }
  }

  template <int... I> void score_keys(const float *key, int column, vec room, Indices<I...>) {
    vec sums[] = {(vec{} * float(I))...};
    for (int d = 0; d < D; ++d) ((sums[I] += query[d] * key[I * D + d]), ...);
    for (vec each : sums) {
      vec dx = x - float(column++);
      score[filled++] = dx * dx < room ? each : vec{} + MASKED;
    }
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

// Each returns the (query, key) pairs it computed, masked ones too; -1 where memory is too small.

// The text queries first .. stop - 1.
template <class T>
int64_t attend_text(const Problem &p, int64_t b, int64_t h, int first, int stop) {
  const int count = (stop - first + LANES - 1) / LANES, length = p.text_length + p.height * p.width;
  auto *tiles = static_cast<Tile *>(std::aligned_alloc(alignof(Tile), count * sizeof(Tile)));
  if (!tiles) return -1;
  for (int i = 0; i < count; ++i) {
    for (int lane = 0; lane < LANES; ++lane)  // beyond the last query, that one again
      tiles[i].token[lane] = std::min(first + i * LANES + lane, stop - 1);
    tiles[i].x = vec{};
    tiles[i].load<T>(p, b, h);
  }
  float keys[CHUNK * D], values[CHUNK * D];
  for (int start = 0; start < length; start += CHUNK) {
    const int some = std::min(CHUNK, length - start);
    widen_tokens<T>(p.key, b, start, h, some, keys);
    widen_tokens<T>(p.value, b, start, h, some, values);
    for (int i = 0; i < count; ++i) {
      tiles[i].see_all(keys, values, some);
      tiles[i].update();
    }
  }
  for (int i = 0; i < count; ++i) tiles[i].store<T>(p, b, h);
  std::free(tiles);
  return int64_t(count) * LANES * length;
}

// The image queries of the rows first_row .. stop - 1.
template <class T>
int64_t attend_image(const Problem &p, int64_t b, int64_t h, int first_row, int stop) {
  const int reach = p.radius - 1, slots = std::min(p.height, TILE_ROWS + 2 * reach);
  const int64_t row = int64_t(p.width) * D;  // of keys or values
  const float square = float(p.radius) * p.radius;
  // The rows of keys and values that a row of tiles reaches, row y in slot y % slots.
  float *keys = static_cast<float *>(std::malloc(2 * slots * row * sizeof(float)));
  if (!keys) return -1;
  float *values = keys + slots * row;
  int packed = std::max(0, first_row - reach);  // the next row to go there
  int64_t pairs = 0;
  Tile tile;
  for (int y = first_row; y < stop; y += TILE_ROWS) {
    const int last_y = std::min(y + TILE_ROWS, stop) - 1;
    const int last_key_y = std::min(last_y + reach, p.height - 1);
    for (; packed <= last_key_y; ++packed) {
      const int64_t token = p.text_length + int64_t(packed) * p.width, to = packed % slots * row;
      widen_tokens<T>(p.key, b, token, h, p.width, keys + to);
      widen_tokens<T>(p.value, b, token, h, p.width, values + to);
    }
    for (int x = 0; x < p.width; x += TILE_COLUMNS) {
      const int last_x = std::min(x + TILE_COLUMNS, p.width) - 1;
      for (int lane = 0; lane < LANES; ++lane) {  // beyond the border, the last row or column again
        const int lane_y = std::min(y + lane / TILE_COLUMNS, last_y);
        const int lane_x = std::min(x + lane % TILE_COLUMNS, last_x);
        const int64_t image_row = lane_y - p.query_start;
        tile.y[lane] = lane_y, tile.x[lane] = lane_x;
        tile.token[lane] = p.text_queries + image_row * p.width + lane_x;
      }
      tile.load<T>(p, b, h);
      tile.see_all(p.dense_key.at<float>(b, 0, h), p.dense_value.at<float>(b, 0, h),
                   p.dense_length);
      pairs += int64_t(p.dense_length) * LANES;
      for (int key_y = std::max(0, y - reach); key_y <= last_key_y; ++key_y) {
        const double nearest = std::max({0, y - key_y, key_y - last_y});
        const int half = std::sqrt(square - nearest * nearest - 1);
        const int first = std::max(0, x - half), last = std::min(last_x + half, p.width - 1);
        const int64_t at = key_y % slots * row + int64_t(first) * D;
        const vec dy = tile.y - float(key_y);
        tile.see(keys + at, values + at, last + 1 - first, first, square - dy * dy);
        pairs += int64_t(last + 1 - first) * LANES;
      }
      tile.store<T>(p, b, h);
    }
  }
  std::free(keys);
  return pairs;
}

template <class T>
int64_t attend(const Problem &p, bool text, int64_t b, int64_t h, int first, int stop) {
  return text ? attend_text<T>(p, b, h, first, stop) : attend_image<T>(p, b, h, first, stop);
}

}  // namespace

// A share of the work: of one batch item and head, text queries or rows of image queries.
extern "C" int64_t attend_share(const Problem *p, int text, int64_t b, int64_t h, int first,
                                int stop) {
  switch (p->dtype) {
    case 0: return attend<float>(*p, text, b, h, first, stop);
    case 1: return attend<BFloat16>(*p, text, b, h, first, stop);
    default: return attend<Float16>(*p, text, b, h, first, stop);
  }
}
