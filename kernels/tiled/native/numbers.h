// What the compiled kernels share: tensors as they are given, and numbers of 16 bits.

#pragma once

#include <cstdint>
#include <cstring>

// Strides in elements; head_dim has stride 1.
struct Tensor {
  void *data;
  int64_t batch, token, head;

  template <class T> T *at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<T *>(data) + b * batch + t * token + h * head;
  }
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

}  // namespace
