// One decoding step of a Transformer decoder on the CPU: one new token for each of a few rows, all layers, one call.
//
// Decoding reads every weight once per token, so it is bound by memory: weights stay in their stored form (fp32, bf16,
// 4 or 8 bits in groups of 32 with an fp16 scale and minimum) and are dequantized in registers. Activations, sums and
// the residual stream are fp32; products of bf16 and quantized weights take activations rounded to bf16 where the
// processor multiplies bf16 (AVX512-BF16) and `exact` does not ask for fp32.
//
// A row's result does not depend on the other rows: the order of each sum depends on its length only.
// Every thread holds its own copy of the residual stream; only results of products are shared, between barriers.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define BF16_PRODUCTS 1
#ifdef __AVX512VNNI__
#define INT8_PRODUCTS 1
#endif
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float F16 __attribute__((vector_size(64), aligned(4)));  // sixteen floats, unaligned
typedef uint16_t H16 __attribute__((vector_size(32), aligned(2)));
typedef uint8_t B16 __attribute__((vector_size(16), aligned(1)));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t I16 __attribute__((vector_size(64)));

enum Kind : int32_t { NONE = 0, FP32 = 1, BF16 = 2, Q4 = 3, Q8 = 4, TILED = 5 };
enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
constexpr int GROUP = 32, TILE = 32;  // columns that share a scale, rows that are stored together

// A matrix (rows, cols). Plain: row by row. Quantized: value = code * scale + low for groups of 32 columns; without
// `low` the codes are centered (8 or 128 stands for 0). It is stored in tiles of 32 rows, in the order in which
// products read it, because sequential reads are fastest: (tile, group, half of 16 rows, pair of columns, row). With 8
// bits a pair has columns 2j and 2j + 1; with 4 bits it has these in the low halves of its bytes and columns 16 + 2j
// and 17 + 2j in the high ones. Scales and lows: (tile, group, 32 rows). Tiled: bf16 without scales, (tile, pair of
// columns, 32 rows, 2); padding is 0.
struct Matrix {
  int32_t kind, rows, cols, groups;
  const void* data;
  const uint16_t *scale, *low;  // fp16, (tiles, groups, 32)
  const float* bias;
};
struct Norm {
  const float *weight, *bias;  // bias: LayerNorm's
};
struct Layer {
  Matrix q, k, v, o, gate, up, down;
  Norm attention, attention_post, ffn, ffn_post, q_norm, k_norm;
  int32_t local, pad;
};
struct Model {
  int32_t depth, width, heads, kv_heads, head_width, ffn_width, vocab, activation;
  int32_t layer_norm, window, rope, exact;
  float eps, embed_scale, attention_scale, rope_factor;
  const float *frequencies, *local_frequencies;  // (head_width / 2), radians per position
  Matrix embed, positions, head;
  Norm norm;
  const Layer* layers;
};
struct Cache {
  int32_t bf16, pad;
  int64_t row_stride, head_stride;  // in numbers; positions follow each other
  void* const* keys;
  void* const* values;
};

namespace {

// --- Numbers ---------------------------------------------------------------------------------------------------------

inline float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16) | 0x40;  // NaN stays NaN
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, u;
  if (exponent == 31) u = sign | 0x7f800000 | fraction << 13;
  else if (exponent) u = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    float f = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline F16 load(const float* p) { return *(const F16*)p; }
inline F16 from_bf16(const uint16_t* p) { return (F16)(__builtin_convertvector(*(const H16*)p, U16) << 16); }
inline F16 splat(float x) { return F16{} + x; }
inline float sum(F16 v) {  // always in this order
  typedef float F8 __attribute__((vector_size(32)));
  F8 low, high;
  memcpy(&low, &v, 32), memcpy(&high, (const char*)&v + 32, 32);
  low += high;
  return ((low[0] + low[4]) + (low[2] + low[6])) + ((low[1] + low[5]) + (low[3] + low[7]));
}
// The sums of sixteen vectors as one vector; each is summed in the same order, whatever its place.
inline F16 sums(const F16* v) {
#ifdef BF16_PRODUCTS
  __m512 t[8], u[4], w[2];
  for (int i = 0; i < 8; i++)
    t[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  for (int i = 0; i < 2; i++)
    w[i] = _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd);
  return _mm512_shuffle_f32x4(w[0], w[1], 0x88) + _mm512_shuffle_f32x4(w[0], w[1], 0xdd);
#else
  F16 out;
  for (int i = 0; i < 16; i++) out[i] = sum(v[i]);
  return out;
#endif
}
inline F16 exponential(F16 x) {  // e^x by 2^n times a polynomial; relative error below 2e-7; x at most 0 here
  const F16 low = splat(-87.0f);
  x = x < low ? low : x;
  const I16 whole = __builtin_convertvector(x * 1.44269504f - 0.5f, I16);
  F16 n = __builtin_convertvector(whole, F16);
  F16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (F16)((whole + 127) << 23);
}
inline float activate(float x, int32_t kind) {
  switch (kind) {
    case SILU: return x / (1.0f + std::exp(-x));
    case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    default: return x < 0 ? 0 : x;
  }
}
inline F16 sigmoid(F16 x) {
  const F16 e = exponential(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
}
// The error function by Abramowitz and Stegun 1964, 7.1.26: off by 1.5e-7 at most.
inline F16 activate(F16 x, int32_t kind) {
  if (kind == SILU) return x * sigmoid(x);
  if (kind == GELU_TANH) return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  if (kind != GELU) return x < 0.0f ? F16{} : x;
  const F16 z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  const F16 p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const F16 rest = 0.5f * x * p * exponential(-z * z);  // x (1 - erf) / 2
  return x < 0.0f ? rest : x - rest;
}
inline void to_float(const uint16_t* x, float* y, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) *(F16*)(y + i) = from_bf16(x + i);
  for (; i < n; i++) y[i] = bf16_to_float(x[i]);
}
inline void to_bf16(const float* x, uint16_t* y, int n) {
  int i = 0;
#ifdef BF16_PRODUCTS
  for (; i + 16 <= n; i += 16) {
    __m256bh r = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    memcpy(y + i, &r, 32);
  }
#endif
  for (; i < n; i++) y[i] = float_to_bf16(x[i]);
}
// y = act(g) u, or act(u) without a gate, for the columns [from, to)
inline void gated(const float* g, const float* u, float* y, int from, int to, int32_t kind) {
  int i = from;
  for (; i + 16 <= to; i += 16) {
    const F16 a = activate(load(g ? g + i : u + i), kind);
    *(F16*)(y + i) = g ? a * load(u + i) : a;
  }
  for (; i < to; i++) y[i] = g ? activate(g[i], kind) * u[i] : activate(u[i], kind);
}
inline int padded(int n) { return (n + GROUP - 1) / GROUP * GROUP; }

// --- Activations: rows of fp32, the same rounded to bf16, and the sum of each group of these -------------------------

struct Input {
  std::vector<float> f, sums;
  std::vector<uint16_t> rounded;
  const uint16_t* h = nullptr;  // in bf16: `rounded`, or rows of the caller
  int stride = 0, groups = 0, columns = 0;  // numbers and sums per row; columns without padding
  void shape(int rows, int cols) {
    if (columns == cols && f.size() >= size_t(rows) * stride) return;  // the padding is zero already
    columns = 0;  // until all is allocated
    stride = padded(cols), groups = (stride / GROUP + 15) / 16 * 16;
    f.assign(size_t(rows) * stride, 0.0f), rounded.assign(size_t(rows) * stride, 0);
    sums.assign(size_t(rows) * groups, 0.0f);
    h = rounded.data(), columns = cols;
  }
  void borrow(const uint16_t* x, int rows, int cols) {  // rows of bf16 whose length is a multiple of GROUP
    stride = cols, groups = cols / GROUP, h = x;
    sums.resize(size_t(rows) * groups);
  }
  void sum_up(int b) {
    for (int g = 0; g < groups; g++) {
      const uint16_t* x = h + size_t(b) * stride + g * GROUP;
      sums[size_t(b) * groups + g] = sum(from_bf16(x) + from_bf16(x + 16));
    }
  }
  float* row(int b) { return f.data() + size_t(b) * stride; }
  const float* group_sums(int b) const { return sums.data() + size_t(b) * groups; }
  // Round columns [from, to) of a row and sum their groups; `from` is a multiple of GROUP. Past `cols` there are zeros.
  // Without bf16 products all is as with `exact`: products use the numbers that are summed here.
  void round(int b, int cols, int from, int to, bool exact) {
    float* x = row(b);
    if (to == cols) to = stride;
    for (int g = from / GROUP; g < to / GROUP; g++) {
      F16 s{};
      for (int i = g * GROUP; i < (g + 1) * GROUP; i += 16) {
#ifdef BF16_PRODUCTS
        if (!exact) {
          uint16_t* y = rounded.data() + size_t(b) * stride + i;
          __m256bh r = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
          memcpy(y, &r, 32);
          s += from_bf16(y);
          continue;
        }
#endif
        s += load(x + i);
      }
      sums[size_t(b) * groups + g] = sum(s);
    }
    (void)exact;
  }
};

// --- Products --------------------------------------------------------------------------------------------------------

inline bool in_tiles(const Matrix& w) { return w.kind >= Q4; }
inline const uint16_t* tile_of(const Matrix& w, int tile) {  // of a TILED matrix
  return (const uint16_t*)w.data + size_t(tile) * w.groups * GROUP * TILE;
}
constexpr int bytes_of(int kind) { return 16 * GROUP * (kind == Q4 ? 4 : 8) / 8; }  // of 16 rows of a group
inline F16 from_half(const uint16_t* p) {  // sixteen fp16 numbers as fp32
#ifdef BF16_PRODUCTS
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  F16 out;
  for (int i = 0; i < 16; i++) out[i] = half_to_float(p[i]);
  return out;
#endif
}
// The scales and lows of sixteen rows of a group.
inline void scales(const Matrix& w, int tile, int g, int half, F16& scale, F16& low) {
  const size_t at = (size_t(tile) * w.groups + g) * TILE + half * 16;
  scale = from_half(w.scale + at);
  low = w.low ? from_half(w.low + at) : scale * (w.kind == Q4 ? -8.0f : -128.0f);
}

// Sixteen rows of a matrix in tiles times input rows [b, b + M), in fp32 throughout: one lane a row.
template <int M>
void tile_exact(const Matrix& w, int tile, int half, const Input& x, int b, F16* out) {
  const float* a = x.f.data() + size_t(b) * x.stride;
  const uint8_t* p = (const uint8_t*)w.data + size_t(tile) * w.groups * 2 * bytes_of(w.kind);
  for (int m = 0; m < M; m++) out[m] = F16{};
  if (w.kind == TILED) {
    const uint16_t* of = tile_of(w, tile) + half * 32;
    for (int k = 0; k < w.groups * GROUP; k += 2, of += 2 * TILE) {
      const U16 two = *(const U16*)of;
      for (int m = 0; m < M; m++) out[m] += (F16)(two << 16) * a[size_t(m) * x.stride + k];
      for (int m = 0; m < M; m++) out[m] += (F16)(two & 0xffff0000u) * a[size_t(m) * x.stride + k + 1];
    }
    return;
  }
  for (int g = 0; g < w.groups; g++) {
    F16 part[M] = {}, scale, low;
    const uint8_t* c = p + (size_t(g) * 2 + half) * bytes_of(w.kind);
    auto column = [&](H16 codes, int k) {
      const F16 v = __builtin_convertvector(codes, F16);
      for (int m = 0; m < M; m++) part[m] += v * a[size_t(m) * x.stride + g * GROUP + k];
    };
    for (int j = 0; j < bytes_of(w.kind) / 32; j++) {
      const H16 v = *(const H16*)(c + 32 * j);  // two columns' bytes of each row
      if (w.kind == Q4) {
        column(v & 15, 2 * j), column((v >> 8) & 15, 2 * j + 1);
        column((v >> 4) & 15, 16 + 2 * j), column(v >> 12, 17 + 2 * j);
      } else {
        column(v & 255, 2 * j), column(v >> 8, 2 * j + 1);
      }
    }
    scales(w, tile, g, half, scale, low);
    for (int m = 0; m < M; m++) out[m] += part[m] * scale + low * x.group_sums(b + m)[g];
  }
}

// Row n of a plain matrix times input row b, in fp32 throughout.
float dot_exact(const Matrix& w, int n, const Input& x, int b) {
  const float* a = x.f.data() + size_t(b) * x.stride;
  F16 acc{};
  float rest = 0;
  int k = 0;
  if (w.kind == FP32) {
    const float* p = (const float*)w.data + size_t(n) * w.cols;
    for (; k + 16 <= w.cols; k += 16) acc += load(p + k) * load(a + k);
    for (; k < w.cols; k++) rest += p[k] * a[k];
  } else {
    const uint16_t* p = (const uint16_t*)w.data + size_t(n) * w.cols;
    for (; k + 16 <= w.cols; k += 16) acc += from_bf16(p + k) * load(a + k);
    for (; k < w.cols; k++) rest += bf16_to_float(p[k]) * a[k];
  }
  return sum(acc) + rest;
}

#ifdef BF16_PRODUCTS
inline __m512bh pairs(const uint16_t* p) {  // two neighbours in every lane
  uint32_t two;
  memcpy(&two, p, 4);
  return (__m512bh)_mm512_set1_epi32(int(two));
}

// N halves of a tile (16 rows each, from `half` on) times input rows [b, b + M), activations in bf16: one lane a row.
// Codes are integers below 256, which bf16 represents exactly. Those of 4 bits become bf16 without a table: 0x4300 | q
// is 128 + q, and the surplus is subtracted through the sums of the activations. Two accumulators per group alternate,
// so that consecutive operations do not depend on each other.
template <int KIND, int N, int M>
void tile_bf16(const Matrix& w, int tile, int half, const Input& x, int b, __m512* out) {
  constexpr int BYTES = bytes_of(KIND);
  const uint16_t* a = x.h + size_t(b) * x.stride;
  const uint8_t* p = (const uint8_t*)w.data + size_t(tile) * w.groups * 2 * BYTES + half * BYTES;
  const __m512i low_half = _mm512_set1_epi16(15), plus128 = _mm512_set1_epi16(0x4300);
  for (int i = 0; i < N * M; i++) out[i] = _mm512_setzero_ps();
  for (int g = 0; g < w.groups; g++, p += 2 * BYTES, a += GROUP) {
    __m512 even[N * M], odd[N * M];
    for (int i = 0; i < N * M; i++) even[i] = odd[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int j = 0; j < BYTES / 32; j++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        const uint8_t* from = p + n * BYTES + 32 * j;
        if (KIND == Q4) {
          const __m512i c = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
          const __m512bh v0 = (__m512bh)_mm512_ternarylogic_epi32(c, low_half, plus128, 0xea);  // (c & 15) | 0x4300
          const __m512bh v1 = (__m512bh)_mm512_or_si512(_mm512_srli_epi16(c, 4), plus128);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const uint16_t* y = a + size_t(m) * x.stride + 2 * j;
            even[n * M + m] = _mm512_dpbf16_ps(even[n * M + m], v0, pairs(y));
            odd[n * M + m] = _mm512_dpbf16_ps(odd[n * M + m], v1, pairs(y + 16));
          }
        } else {
          const __m512 c0 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
          const __m512 c1 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(from + 16))));
          const __m512bh v = _mm512_cvtne2ps_pbh(c1, c0);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            __m512& to = j % 2 ? odd[n * M + m] : even[n * M + m];
            to = _mm512_dpbf16_ps(to, v, pairs(a + size_t(m) * x.stride + 2 * j));
          }
        }
      }
    for (int n = 0; n < N; n++) {
      F16 scale, low;
      scales(w, tile, g, half + n, scale, low);
      const __m512 s = scale, l = KIND == Q4 ? low - scale * 128.0f : low;
      for (int m = 0; m < M; m++) {
        __m512& to = out[n * M + m];
        to = _mm512_fmadd_ps(_mm512_add_ps(even[n * M + m], odd[n * M + m]), s, to);
        to = _mm512_fmadd_ps(l, _mm512_set1_ps(x.group_sums(b + m)[g]), to);
      }
    }
  }
}

// A tile of bf16 weights times input rows [b, b + M): one lane a row, one sum for each, in the order of the columns.
template <int M>
void tile_plain(const Matrix& w, int tile, const Input& x, int b, __m512* out) {
  const uint16_t *a = x.h + size_t(b) * x.stride, *p = tile_of(w, tile);
  __m512 acc[2 * M];
  for (auto& v : acc) v = _mm512_setzero_ps();
  const uint16_t* row[M];
  for (int m = 0; m < M; m++) row[m] = a + size_t(m) * x.stride;
  for (int g = 0; g < w.groups * GROUP; g += 8, p += 8 * TILE)
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2) {
      const __m512bh v0 = (__m512bh)_mm512_loadu_si512(p + j * TILE);
      const __m512bh v1 = (__m512bh)_mm512_loadu_si512(p + j * TILE + 32);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const __m512bh y = pairs(row[m] + g + j);
        acc[m] = _mm512_dpbf16_ps(acc[m], v0, y), acc[M + m] = _mm512_dpbf16_ps(acc[M + m], v1, y);
      }
    }
  for (int i = 0; i < 2 * M; i++) out[i] = acc[i];
}

// Sixteen sums of plain bf16 rows: N rows times M input rows, N * M = 16; the rows one after the other where M is 1.
template <int N, int M>
void rows_bf16(const Matrix& w, int n, const Input& x, int b, float* out, size_t stride) {
  static_assert(N * M == 16, "as many sums as lanes");
  const uint16_t *a = x.h + size_t(b) * x.stride, *p = (const uint16_t*)w.data + size_t(n) * w.cols;
  const int whole = w.cols / 32 * 32;
  const __mmask32 tail = (1u << (w.cols % 32)) - 1;
  __m512 acc[16];
  for (auto& v : acc) v = _mm512_setzero_ps();
  if (M == 1) {
    for (int i = 0; i < N; i++, p += w.cols) {
      __m512 v = _mm512_setzero_ps();
      int k = 0;
      for (; k < whole; k += 32)
        v = _mm512_dpbf16_ps(v, (__m512bh)_mm512_loadu_si512(p + k), (__m512bh)_mm512_loadu_si512(a + k));
      if (tail)
        v = _mm512_dpbf16_ps(v, (__m512bh)_mm512_maskz_loadu_epi16(tail, p + k), (__m512bh)_mm512_loadu_si512(a + k));
      acc[i] = v;
    }
  } else {
    auto columns = [&](int k, __mmask32 mask) {
      __m512bh y[M];
      for (int m = 0; m < M; m++) y[m] = (__m512bh)_mm512_loadu_si512(a + size_t(m) * x.stride + k);
      for (int i = 0; i < N; i++) {
        const uint16_t* at = p + size_t(i) * w.cols + k;
        const __m512bh v = (__m512bh)(mask == ~0u ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(mask, at));
        for (int m = 0; m < M; m++) acc[m * N + i] = _mm512_dpbf16_ps(acc[m * N + i], v, y[m]);
      }
    };
    for (int k = 0; k < whole; k += 32) columns(k, ~0u);
    if (tail) columns(whole, tail);
  }
  F16 lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = acc[i];
  const F16 result = sums(lanes);
  for (int m = 0; m < M; m++) memcpy(out + m * stride, (const float*)&result + m * N, sizeof(float) * N);
}

// Results go to fp32 `out`, or, where that is null, rounded to bf16 `out16`.
template <int KIND>
void multiply_tile(const Matrix& w, int tile, const Input& x, int batch, float* out, uint16_t* out16, size_t stride) {
  const int n = tile * TILE, rows = std::min(TILE, w.rows - n);
  auto store = [&](__m512 v, int half, int b) {
    const int count = std::min(16, rows - half * 16);
    if (count <= 0) return;
    const __mmask16 mask = __mmask16((1u << count) - 1);
    const size_t at = b * stride + n + half * 16;
    if (w.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, w.bias + n + half * 16));
    if (out) _mm512_mask_storeu_ps(out + at, mask, v);
    else _mm256_mask_storeu_epi16(out16 + at, mask, (__m256i)_mm512_cvtneps_pbh(v));
  };
  __m512 acc[16];
  int b = 0;
  if (KIND == TILED) {
    for (; b + 8 <= batch; b += 8) {
      tile_plain<8>(w, tile, x, b, acc);
      for (int m = 0; m < 8; m++) store(acc[m], 0, b + m), store(acc[8 + m], 1, b + m);
    }
    for (; b + 3 <= batch; b += 3) {
      tile_plain<3>(w, tile, x, b, acc);
      for (int m = 0; m < 3; m++) store(acc[m], 0, b + m), store(acc[3 + m], 1, b + m);
    }
    for (; b < batch; b++) {
      tile_plain<1>(w, tile, x, b, acc);
      store(acc[0], 0, b), store(acc[1], 1, b);
    }
    return;
  }
  for (; b + 8 <= batch; b += 8)
    for (int half = 0; half < 2; half++) {
      tile_bf16<KIND, 1, 8>(w, tile, half, x, b, acc);
      for (int m = 0; m < 8; m++) store(acc[m], half, b + m);
    }
  for (; b + 2 <= batch; b += 2) {
    tile_bf16<KIND, 2, 2>(w, tile, 0, x, b, acc);
    for (int m = 0; m < 2; m++) store(acc[m], 0, b + m), store(acc[2 + m], 1, b + m);
  }
  if (b < batch) {
    tile_bf16<KIND, 2, 1>(w, tile, 0, x, b, acc);
    store(acc[0], 0, b), store(acc[1], 1, b);
  }
}
#endif

void multiply_tiles(const Matrix& w, int from, int to, const Input& x, int batch, float* out, uint16_t* out16,
                    size_t stride, bool exact) {
  for (int tile = from / TILE; tile * TILE < to; tile++) {
#ifdef BF16_PRODUCTS
    if (!exact) {
      const auto multiply_one =
          w.kind == Q4 ? multiply_tile<Q4> : w.kind == Q8 ? multiply_tile<Q8> : multiply_tile<TILED>;
      multiply_one(w, tile, x, batch, out, out16, stride);
      continue;
    }
#endif
    (void)out16;
    for (int half = 0; half < 2; half++)
      for (int b = 0; b < batch; b++) {
        F16 v;
        tile_exact<1>(w, tile, half, x, b, &v);
        for (int i = 0, n = tile * TILE + half * 16; i < 16 && n + i < w.rows; i++)
          out[b * stride + n + i] = w.bias ? v[i] + w.bias[n + i] : v[i];
      }
  }
}

void multiply_plain(const Matrix& w, int from, int to, const Input& x, int batch, float* out, size_t stride,
                    bool exact) {
  int n = from;
#ifdef BF16_PRODUCTS
  if (!exact && w.kind == BF16) {
    for (; n + 16 <= to; n += 16) {
      int b = 0;
      for (; b + 4 <= batch; b += 4)
        for (int i = 0; i < 16; i += 4) rows_bf16<4, 4>(w, n + i, x, b, out + b * stride + n + i, stride);
      for (; b < batch; b++) rows_bf16<16, 1>(w, n, x, b, out + b * stride + n, stride);
    }
    if (n < to && to >= 16) {  // the last rows, together with those before them
      float rows[16];
      for (int b = 0; b < batch; b++) {
        rows_bf16<16, 1>(w, to - 16, x, b, rows, 0);
        for (int i = n; i < to; i++) out[b * stride + i] = rows[i - (to - 16)];
      }
      n = to;
    }
  }
#endif
  for (; n < to; n++)
    for (int b = 0; b < batch; b++) out[b * stride + n] = dot_exact(w, n, x, b);
}

// out[b * stride + n] for the rows n in [from, to) of W, whole tiles, bias added.
void multiply(const Matrix& w, int from, int to, const Input& x, int batch, float* out, size_t stride, bool exact) {
  if (from >= to) return;
  if (in_tiles(w)) return multiply_tiles(w, from, to, x, batch, out, nullptr, stride, exact);
  multiply_plain(w, from, to, x, batch, out, stride, exact);
  if (w.bias)
    for (int b = 0; b < batch; b++)
      for (int n = from; n < to; n++) out[b * stride + n] += w.bias[n];
}

void unpack_row(const Matrix& w, int n, float* out) {  // one row as fp32
  if (w.kind == FP32) memcpy(out, (const float*)w.data + size_t(n) * w.cols, sizeof(float) * w.cols);
  else if (w.kind == BF16)
    for (int k = 0; k < w.cols; k++) out[k] = bf16_to_float(((const uint16_t*)w.data)[size_t(n) * w.cols + k]);
  else if (w.kind == TILED) {
    const uint16_t* p = tile_of(w, n / TILE) + n % TILE * 2;
    for (int k = 0; k < w.cols; k++) out[k] = bf16_to_float(p[k / 2 * 2 * TILE + k % 2]);
  } else {
    const int tile = n / TILE, half = n % TILE / 16, row = n % 16, bytes = bytes_of(w.kind);
    for (int g = 0; g * GROUP < w.cols; g++) {
      const size_t at = (size_t(tile) * w.groups + g) * TILE + n % TILE;
      const float scale = half_to_float(w.scale[at]);
      const float low = w.low ? half_to_float(w.low[at]) : scale * (w.kind == Q4 ? -8.0f : -128.0f);
      const uint8_t* p = (const uint8_t*)w.data + ((size_t(tile) * w.groups + g) * 2 + half) * bytes + 2 * row;
      float* to = out + g * GROUP;
      const int columns = std::min(GROUP, w.cols - g * GROUP);
      for (int k = 0; k < columns; k++) {
        const uint8_t c = w.kind == Q8 ? p[k / 2 * 32 + k % 2] : p[k % 16 / 2 * 32 + k % 2] >> (k / 16 * 4) & 15;
        to[k] = c * scale + low;
      }
    }
  }
}

// --- Threads ---------------------------------------------------------------------------------------------------------
// Any number of calls may run at once: while a call runs, no other uses its threads, and its barrier is on its stack.
// With OpenMP the threads are PyTorch's, because its runtime is the one that PyTorch has loaded: two pools that spin
// for work on the same processors slow each other down. OpenMP keeps a pool for every calling thread, and may give
// fewer threads than requested (OMP_DYNAMIC, OMP_THREAD_LIMIT). Without OpenMP there are thread pools here. Results do
// not depend on the number of threads. If one fails, the call fails and no thread waits.

enum Status : int32_t { DONE = 0, NO_MEMORY = 1, FAILED = 2 };
struct Abandoned {};  // thrown by a barrier that not all threads will reach

// Called while waiting. After a while it yields the processor, which the thread waited for may need.
inline void pause(int spins) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
  if (spins > 8000) std::this_thread::sleep_for(std::chrono::microseconds(20));
  else if (spins > 4000) std::this_thread::yield();
}

class Barrier {
 public:
  void wait(int count) {  // until all of `count` are here
    if (count == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
      if (spins % 64 == 63 && status() != DONE) throw Abandoned();
      pause(spins);
    }
  }
  void fail(Status why) { status_.store(why, std::memory_order_relaxed); }
  Status status() const { return status_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int> arrived_{0}, turn_{0};
  std::atomic<Status> status_{DONE};
};

struct Worker {  // one thread of a call
  const int id, count;
  Barrier& all;
  void barrier() const { all.wait(count); }
};

Status why() noexcept {  // of the exception that is being handled
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::length_error&) {  // a vector longer than there can be
    return NO_MEMORY;
  } catch (...) {
    return FAILED;
  }
}

template <class Work>
void take_part(const Work& work, const Worker& worker) noexcept {
  try {
    work(worker);
  } catch (const Abandoned&) {  // another one has said why
  } catch (...) {
    worker.all.fail(why());
  }
}

#ifndef _OPENMP
class Pool {  // threads that serve one call at a time; they spin for a while after it, then sleep
 public:
  explicit Pool(int size) {
    try {
      while (size_ < size) {
        std::thread([this, id = size_] { serve(id); }).detach();
        size_++;
      }
    } catch (const std::system_error&) {  // the system gives no more threads
    }
  }
  int size() const { return size_; }
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    left_.store(size_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    for (int spins = 0; left_.load(std::memory_order_acquire); spins++) pause(spins);
  }

 private:
  void serve(int id) {
    for (unsigned seen = 0;;) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(500);
      while (round_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
        for (int i = 0; i < 32; i++) pause(0);
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
      }
      seen++;
      (*work_)(id);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
  int size_ = 1;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<unsigned> round_{0};
  std::atomic<int> left_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pools {  // the idle pools of this process; never destroyed
 public:
  static Pools& here() {
    Pools* pools = current_.load(std::memory_order_acquire);
    if (pools && pools->process_ == getpid()) return *pools;
    Pools* fresh = new Pools;  // threads do not exist after a fork, nor do the holders of locks
    if (current_.compare_exchange_strong(pools, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *pools;
  }
  Pool* take(int size) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < idle_.size(); i++) {
      if (idle_[i].first != size) continue;
      Pool* pool = idle_[i].second;
      idle_.erase(idle_.begin() + i);
      return pool;
    }
    idle_.reserve(idle_.size() + ++made_);  // so that give() cannot fail
    return new Pool(size);
  }
  void give(int size, Pool* pool) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.emplace_back(size, pool);
  }

 private:
  inline static std::atomic<Pools*> current_{nullptr};
  const pid_t process_ = getpid();
  std::mutex mutex_;
  std::vector<std::pair<int, Pool*>> idle_;
  size_t made_ = 0;
};
#endif

#ifdef _OPENMP
const pid_t loaded_by = getpid();
#endif

int pool_size(int threads) {  // no more threads than processors: others would only be waited for
#ifdef _OPENMP
  if (threads < 2 || loaded_by != getpid()) return 1;  // OpenMP's threads do not exist after a fork
  return std::max(1, std::min(threads, omp_get_num_procs()));
#else
  if (threads < 2) return 1;
#ifdef __linux__
  cpu_set_t allowed;
  if (!sched_getaffinity(0, sizeof allowed, &allowed)) return std::min(threads, CPU_COUNT(&allowed));
#endif
  return std::max(1, std::min(threads, int(std::thread::hardware_concurrency())));
#endif
}

// Run work(worker) on up to `threads` threads and wait for all of them.
template <class Work>
Status in_parallel(int threads, const Work& work) noexcept try {
  const int size = pool_size(threads);
  Barrier all;
  if (size == 1) {
    take_part(work, Worker{0, 1, all});
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(size)
    take_part(work, Worker{omp_get_thread_num(), omp_get_num_threads(), all});
#else
    Pools& pools = Pools::here();
    Pool* pool = pools.take(size);
    pool->run([&](int id) { take_part(work, Worker{id, pool->size(), all}); });
    pools.give(size, pool);
#endif
  }
  return all.status();
} catch (...) {
  return why();
}
inline int share(int total, int unit, int part, int parts) {  // where a part begins, in whole units
  const int64_t units = (total + unit - 1) / unit;
  return int(std::min<int64_t>(total, units * part / parts * unit));
}
struct Range {
  int from, to;
};
inline Range share(int total, int unit, const Worker& me) {  // the part of this thread
  return {share(total, unit, me.id, me.count), share(total, unit, me.id + 1, me.count)};
}

#ifdef INT8_PRODUCTS
// --- Products of 8 by 8 bits -----------------------------------------------------------------------------------------

// Rows of bf16 as signed codes of 8 bits in groups of 32 that share a scale, as GGUF's Q8_0 has them.
struct Int8Input {
  int groups;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> starts;  // -128 times the sum of a group's codes, for the offset of centered weights
  Int8Input(int rows, int cols)
      : groups(cols / GROUP),
        codes(size_t(rows) * cols),
        scales(size_t(rows) * groups),
        starts(size_t(rows) * groups) {}
  void round(const uint16_t* x, int b) {
    for (int g = 0; g < groups; g++, x += GROUP) {
      const __m512 low = (__m512)from_bf16(x), high = (__m512)from_bf16(x + 16);
      const int32_t bits = _mm512_reduce_max_epi32(  // of magnitudes as whole numbers, among which NaN is the greatest
          _mm512_max_epi32((__m512i)_mm512_abs_ps(low), (__m512i)_mm512_abs_ps(high)));
      float most;
      memcpy(&most, &bits, 4);
      const __m512 per = _mm512_set1_ps(most > 1e-30f ? 127 / most : 0);
      const __m512i a = _mm512_cvtps_epi32(low * per), c = _mm512_cvtps_epi32(high * per);
      const size_t at = size_t(b) * groups + g;
      _mm_storeu_si128((__m128i*)(codes.data() + at * GROUP), _mm512_cvtsepi32_epi8(a));
      _mm_storeu_si128((__m128i*)(codes.data() + at * GROUP + 16), _mm512_cvtsepi32_epi8(c));
      scales[at] = most / 127;  // a number that is not finite makes the whole row so
      starts[at] = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
    }
  }
};

// A tile of Q8 codes with four columns of a row side by side, where it stores two.
void fours(const Matrix& w, int tile, uint8_t* out) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
  const __m512i index = _mm512_load_si512(order);
  const size_t bytes = size_t(w.groups) * GROUP * TILE;
  const uint8_t* from = (const uint8_t*)w.data + tile * bytes;
  for (size_t i = 0; i < bytes; i += 64)
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, _mm512_loadu_si512(from + i)));
}

// Such a tile times input rows [b, b + M): one lane a row; whole numbers within a group, fp32 from group to group.
template <int M>
void tile_int8(const uint8_t* codes, const uint16_t* scale, const Int8Input& x, int b, __m512* out) {
  __m512 acc[2 * M];
  for (auto& v : acc) v = _mm512_setzero_ps();
  const int8_t* row[M];
  for (int m = 0; m < M; m++) row[m] = x.codes.data() + size_t(b + m) * x.groups * GROUP;
  const float* scales = x.scales.data() + size_t(b) * x.groups;
  const int32_t* starts = x.starts.data() + size_t(b) * x.groups;
  for (int g = 0; g < x.groups; g++, codes += GROUP * TILE, scale += TILE) {
    __m512i sum[2 * M];
    for (int m = 0; m < M; m++) sum[m] = sum[M + m] = _mm512_set1_epi32(starts[size_t(m) * x.groups + g]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      const __m512i v0 = _mm512_loadu_si512(codes + j * 64), v1 = _mm512_loadu_si512(codes + j * 64 + 16 * GROUP);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        int32_t four;
        memcpy(&four, row[m] + g * GROUP + 4 * j, 4);
        const __m512i y = _mm512_set1_epi32(four);
        sum[m] = _mm512_dpbusd_epi32(sum[m], v0, y), sum[M + m] = _mm512_dpbusd_epi32(sum[M + m], v1, y);
      }
    }
    const __m512 s0 = (__m512)from_half(scale), s1 = (__m512)from_half(scale + 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const __m512 s = _mm512_set1_ps(scales[size_t(m) * x.groups + g]);
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), _mm512_mul_ps(s0, s), acc[m]);
      acc[M + m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[M + m]), _mm512_mul_ps(s1, s), acc[M + m]);
    }
  }
  for (int i = 0; i < 2 * M; i++) out[i] = acc[i];
}

// y[b * rows + n] for the rows n of a tile and the input rows [from, to), bias added.
template <int M>
int multiply_int8(const Matrix& w, int tile, const uint8_t* codes, const Int8Input& x, int from, int to, uint16_t* y) {
  __m512 acc[2 * M];
  int b = from;
  for (; b + M <= to; b += M) {
    tile_int8<M>(codes, w.scale + size_t(tile) * w.groups * TILE, x, b, acc);
    for (int half = 0; half < 2; half++) {
      const int n = tile * TILE + half * 16, count = std::min(16, w.rows - n);
      if (count <= 0) break;
      const __mmask16 mask = __mmask16((1u << count) - 1);
      const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + n) : _mm512_setzero_ps();
      for (int m = 0; m < M; m++)
        _mm256_mask_storeu_epi16(y + size_t(b + m) * w.rows + n, mask,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(acc[half * M + m], bias)));
    }
  }
  return b;
}
#endif

// --- The step --------------------------------------------------------------------------------------------------------

void normalize(const float* x, float* y, int n, const Norm& norm, bool layer_norm, float eps) {
  double s = 0, ss = 0;
  F16 a{}, aa{};
  int i = 0;
  for (; i + 16 <= n; i += 16) a += load(x + i), aa += load(x + i) * load(x + i);
  for (; i < n; i++) s += x[i], ss += double(x[i]) * x[i];
  s += sum(a), ss += sum(aa);
  float mean = 0, scale;
  if (layer_norm) {
    mean = float(s / n);
    F16 d{};
    double rest = 0;
    for (i = 0; i + 16 <= n; i += 16) d += (load(x + i) - mean) * (load(x + i) - mean);
    for (; i < n; i++) rest += double(x[i] - mean) * (x[i] - mean);
    scale = float(1.0 / std::sqrt((sum(d) + rest) / n + eps));
  } else {
    scale = float(1.0 / std::sqrt(ss / n + eps));
  }
  for (i = 0; i + 16 <= n; i += 16) {
    F16 v = (load(x + i) - mean) * scale * load(norm.weight + i);
    if (norm.bias) v += load(norm.bias + i);
    *(F16*)(y + i) = v;
  }
  for (; i < n; i++) y[i] = (x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

constexpr int PARTS = 64;  // the most parts of a long row's positions, however many threads there are

// Memory that is kept from step to step.
struct Workspace {
  std::vector<float> qkv, out, parts;  // shared: (B, (H + 2G) K), (B, D), (B, H, parts, K + 2)
  Input hidden;                        // shared: the feed-forward layer's inner activations
};
struct ThreadWorkspace {
  std::vector<float> x, scratch, gate, up, global, local, position, post;
  Input in, heads;
};

struct Step {
  const Model& m;
  const Cache& cache;
  const int batch, most;  // rows, parts of a row's positions
  const int32_t *tokens, *lengths;
  float* logits;
  std::vector<float>&qkv, &out, &parts;
  Input& hidden;

  Step(const Model& model, const Cache& c, int b, const int32_t* t, const int32_t* l, float* y, int threads,
       Workspace& w)
      : m(model), cache(c), batch(b), most(std::max(1, std::min(threads, PARTS))), tokens(t), lengths(l), logits(y),
        qkv(w.qkv), out(w.out), parts(w.parts), hidden(w.hidden) {
    grow(qkv, size_t(b) * (m.heads + 2 * m.kv_heads) * m.head_width);
    grow(out, size_t(b) * m.width);
    grow(parts, size_t(b) * m.heads * most * (m.head_width + 2));
    hidden.shape(b, m.ffn_width);
  }
  static void grow(std::vector<float>& v, size_t size) {
    if (v.size() < size) v.resize(size);
  }

  void product(const Matrix& w, const Input& x, float* y, size_t stride, const Worker& me) {
    const auto [from, to] = share(w.rows, TILE, me);
    multiply(w, from, to, x, batch, y, stride, m.exact);
  }

  void normed(const std::vector<float>& x, const Norm& norm, Input& y) {
    y.shape(batch, m.width);
    for (int b = 0; b < batch; b++) {
      normalize(&x[size_t(b) * m.width], y.row(b), m.width, norm, m.layer_norm, m.eps);
      y.round(b, m.width, 0, m.width, m.exact);
    }
  }

  // Add the shared result of a part to this thread's residual stream.
  void add(std::vector<float>& x, const Norm& post, std::vector<float>& y) {
    for (int b = 0; b < batch; b++) {
      const float* from = &out[size_t(b) * m.width];
      if (post.weight) {
        grow(y, m.width);
        normalize(from, y.data(), m.width, post, m.layer_norm, m.eps);
        from = y.data();
      }
      float* to = &x[size_t(b) * m.width];
      for (int i = 0; i < m.width; i++) to[i] += from[i];
    }
  }

  void rotate(float* x, const Norm& norm, const float* angles) const {  // QK-norm, then rotary positions
    const int half = m.head_width / 2;
    if (norm.weight) normalize(x, x, m.head_width, norm, false, m.eps);
    if (!m.rope) return;
    for (int i = 0; i < half; i++) {
      const float c = angles[i], s = angles[half + i], a = x[i], b = x[half + i];
      x[i] = a * c - b * s, x[half + i] = b * c + a * s;
    }
  }

  float number(const void* p, size_t i) const {
    return cache.bf16 ? bf16_to_float(((const uint16_t*)p)[i]) : ((const float*)p)[i];
  }
  F16 sixteen(const void* p, size_t i) const {
    return cache.bf16 ? from_bf16((const uint16_t*)p + i) : load((const float*)p + i);
  }

  // The number of parts that positions are read in. It depends only on their number and the threads requested, so that
  // a row's sums depend neither on other rows nor on the number of threads that run.
  int parts_of(int positions) const { return positions <= 128 ? 1 : most; }

  // Queries of one group of heads against a part of the positions: unnormalized output, largest score, sum of weights.
  void attend(const Layer& layer, int index, int b, int g, int part, const float* angles, std::vector<float>& scratch) {
    const int K = m.head_width, G = m.kv_heads, n = m.heads / G;
    const int length = lengths[b] + 1, begin = layer.local ? std::max(0, length - m.window) : 0;
    const int cut = parts_of(length - begin);
    if (part >= cut) {
      for (int i = 0; i < n; i++) part_of(b, g * n + i, part)[K] = -INFINITY;
      return;
    }
    const int from = begin + share(length - begin, 16, part, cut);
    const int to = begin + share(length - begin, 16, part + 1, cut);
    const float* row = &qkv[size_t(b) * (m.heads + 2 * G) * K];
    const size_t at = (b * cache.row_stride + g * cache.head_stride) * (cache.bf16 ? 2 : 4);
    char *keys = (char*)cache.keys[index] + at, *values = (char*)cache.values[index] + at;
    grow(scratch, size_t(n) * K + K + size_t(n) * (to - from + 16));
    float *q = scratch.data(), *k = q + n * K, *scores = k + K;
    memcpy(q, row + size_t(g) * n * K, sizeof(float) * n * K);
    for (int i = 0; i < n; i++) {
      rotate(q + i * K, layer.q_norm, angles);
      for (int j = 0; j < K; j++) q[i * K + j] *= m.attention_scale;
    }
    if (to == length) {  // the thread with the last part stores the new position
      memcpy(k, row + size_t(m.heads + g) * K, sizeof(float) * K);
      rotate(k, layer.k_norm, angles);
      const float* v = row + size_t(m.heads + G + g) * K;
      for (int j = 0; j < K; j++) {
        const size_t i = size_t(length - 1) * K + j;
        if (cache.bf16) ((uint16_t*)keys)[i] = float_to_bf16(k[j]), ((uint16_t*)values)[i] = float_to_bf16(v[j]);
        else ((float*)keys)[i] = k[j], ((float*)values)[i] = v[j];
      }
    }
    const int count = to - from, stride = count + 16;
    for (int i = 0; i < n; i += 4) {  // heads of a group share what is read; the sums of four fit in registers
      float* s = scores + size_t(i) * stride;
      switch (std::min(4, n - i)) {
        case 1: score<1>(keys, from, count, q + i * K, s, stride); break;
        case 2: score<2>(keys, from, count, q + i * K, s, stride); break;
        case 3: score<3>(keys, from, count, q + i * K, s, stride); break;
        default: score<4>(keys, from, count, q + i * K, s, stride);
      }
    }
    for (int i = 0; i < n; i++) {
      float* s = scores + size_t(i) * stride;
      float* result = part_of(b, g * n + i, part);
      float top = -INFINITY;
      for (int t = 0; t < count; t++) top = s[t] > top ? s[t] : top;
      for (int t = count; t < stride; t++) s[t] = -INFINITY;
      F16 total{};
      for (int t = 0; t < count; t += 16) {
        const F16 e = exponential(load(s + t) - top);
        *(F16*)(s + t) = e;
        if (t + 16 <= count) total += e;
        else
          for (int l = 0; t + l < count; l++) total[l] += e[l];
      }
      if (pairwise()) {  // in place: each vector is read before it is overwritten
        uint16_t* h = (uint16_t*)s;
        to_bf16(s, h, (count + 15) / 16 * 16);
        for (int t = count; t < count + 2; t++) h[t] = 0;
      }
      result[K] = top, result[K + 1] = sum(total);
    }
    for (int i = 0; i < n; i += 4) {
      const float* s = scores + size_t(i) * stride;
      switch (std::min(4, n - i)) {
        case 1: weigh<1>(values, from, count, s, stride, b, g * n + i, part); break;
        case 2: weigh<2>(values, from, count, s, stride, b, g * n + i, part); break;
        case 3: weigh<3>(values, from, count, s, stride, b, g * n + i, part); break;
        default: weigh<4>(values, from, count, s, stride, b, g * n + i, part);
      }
    }
  }

  bool pairwise() const {  // whether weights and values are multiplied as pairs of bf16 numbers
#ifdef BF16_PRODUCTS
    return cache.bf16 && !m.exact && m.head_width % 64 == 0;
#else
    return false;
#endif
  }

  float* part_of(int b, int head, int part) {
    return &parts[((size_t(b) * m.heads + head) * most + part) * (m.head_width + 2)];
  }

  // scores[i * stride + s] = q_i k_s for N queries and the positions [from, from + count)
  template <int N>
  void score(const void* keys, int from, int count, const float* q, float* scores, int stride) const {
    const int K = m.head_width;
#ifdef BF16_PRODUCTS
    if (cache.bf16 && !m.exact && K % 32 == 0) {
      uint16_t h[N][256];
      if (K <= 256) {
        for (int i = 0; i < N; i++) to_bf16(q + i * K, h[i], K);
        for (int s = 0; s < count; s += 16) {
          F16 acc[N][16];
          for (int p = 0; p < 16; p++) {
            const uint16_t* k = (const uint16_t*)keys + size_t(from + std::min(s + p, count - 1)) * K;
            __m512 a[N];
            for (int i = 0; i < N; i++) a[i] = _mm512_setzero_ps();
            for (int j = 0; j < K; j += 32) {
              const __m512bh v = (__m512bh)_mm512_loadu_si512(k + j);
              for (int i = 0; i < N; i++) a[i] = _mm512_dpbf16_ps(a[i], v, (__m512bh)_mm512_loadu_si512(h[i] + j));
            }
            for (int i = 0; i < N; i++) acc[i][p] = a[i];
          }
          for (int i = 0; i < N; i++) *(F16*)(scores + size_t(i) * stride + s) = sums(acc[i]);
        }
        return;
      }
    }
#endif
    for (int s = 0; s < count; s += 16) {
      F16 acc[N][16];
      for (int p = 0; p < 16; p++) {
        const size_t at = size_t(from + std::min(s + p, count - 1)) * K;
        F16 a[N] = {};
        int j = 0;
        for (; j + 16 <= K; j += 16) {
          const F16 k = sixteen(keys, at + j);
          for (int i = 0; i < N; i++) a[i] += k * load(q + i * K + j);
        }
        for (; j < K; j++)
          for (int i = 0; i < N; i++) a[i][0] += number(keys, at + j) * q[i * K + j];
        for (int i = 0; i < N; i++) acc[i][p] = a[i];
      }
      for (int i = 0; i < N; i++) *(F16*)(scores + size_t(i) * stride + s) = sums(acc[i]);
    }
  }

  // The sum over positions of weight times value, for N heads from `head` on.
  template <int N>
  void weigh(const void* values, int from, int count, const float* weights, int stride, int b, int head, int part) {
    const int K = m.head_width;
    int j = 0;
#ifdef BF16_PRODUCTS
    if (pairwise()) {
      // Two positions at a time: their values as pairs, the weights rounded to bf16 as those of prompts are.
      const uint16_t* v = (const uint16_t*)values + size_t(from) * K;
      for (; j + 64 <= K; j += 64) {
        __m512 acc[N][4];
        for (auto& a : acc) a[0] = a[1] = a[2] = a[3] = _mm512_setzero_ps();
        for (int t = 0; t < count; t += 2) {
          const uint16_t *p = v + size_t(t) * K + j, *q = t + 1 < count ? p + K : p;  // past the end the weight is 0
          const __m512i a0 = _mm512_loadu_si512(p), a1 = _mm512_loadu_si512(p + 32);
          const __m512i b0 = _mm512_loadu_si512(q), b1 = _mm512_loadu_si512(q + 32);
          const __m512bh v0 = (__m512bh)_mm512_unpacklo_epi16(a0, b0), v1 = (__m512bh)_mm512_unpackhi_epi16(a0, b0);
          const __m512bh v2 = (__m512bh)_mm512_unpacklo_epi16(a1, b1), v3 = (__m512bh)_mm512_unpackhi_epi16(a1, b1);
          for (int i = 0; i < N; i++) {
            const __m512bh w = pairs((const uint16_t*)(weights + size_t(i) * stride) + t);
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], v0, w), acc[i][1] = _mm512_dpbf16_ps(acc[i][1], v1, w);
            acc[i][2] = _mm512_dpbf16_ps(acc[i][2], v2, w), acc[i][3] = _mm512_dpbf16_ps(acc[i][3], v3, w);
          }
        }
        // Interleaving left columns 0-3, 8-11, 16-19, 24-27 in one vector and those between in the other.
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for (int i = 0; i < N; i++)
          for (int c = 0; c < 4; c += 2) {
            float* to = part_of(b, head + i, part) + j + c * 16;
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(acc[i][c], first, acc[i][c + 1]));
            _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(acc[i][c], second, acc[i][c + 1]));
          }
      }
      return;
    }
#endif
    for (; j + 64 <= K; j += 64) {
      F16 acc[N][4] = {};
      for (int t = 0; t < count; t++) {
        const size_t at = size_t(from + t) * K + j;
        for (int c = 0; c < 4; c++) {
          const F16 v = sixteen(values, at + c * 16);
          for (int i = 0; i < N; i++) acc[i][c] += v * weights[size_t(i) * stride + t];
        }
      }
      for (int i = 0; i < N; i++)
        for (int c = 0; c < 4; c++) *(F16*)(part_of(b, head + i, part) + j + c * 16) = acc[i][c];
    }
    for (; j < K; j++)
      for (int i = 0; i < N; i++) {
        float acc = 0;
        for (int t = 0; t < count; t++)
          acc += number(values, size_t(from + t) * K + j) * weights[size_t(i) * stride + t];
        part_of(b, head + i, part)[j] = acc;
      }
  }

  void merge(Input& y) {  // the parts of every head into one output (the softmax over all positions)
    const int K = m.head_width, P = most;
    y.shape(batch, m.heads * K);
    for (int b = 0; b < batch; b++) {
      for (int h = 0; h < m.heads; h++) {
        const float* p = &parts[(size_t(b) * m.heads + h) * P * (K + 2)];
        float top = -INFINITY, total = 0, weight[PARTS];
        for (int i = 0; i < P; i++) top = std::max(top, p[i * (K + 2) + K]);
        for (int i = 0; i < P; i++) {
          const float* one = p + i * (K + 2);
          weight[i] = one[K] == -INFINITY ? 0.0f : std::exp(one[K] - top);
          total += weight[i] * one[K + 1];
        }
        float* to = y.row(b) + h * K;
        for (int j = 0; j < K; j++) to[j] = 0;
        for (int i = 0; i < P; i++)
          if (weight[i] != 0.0f)
            for (int j = 0; j < K; j++) to[j] += p[i * (K + 2) + j] * (weight[i] / total);
      }
      y.round(b, m.heads * K, 0, m.heads * K, m.exact);
    }
  }

  void angles(std::vector<float>& table, const float* frequencies) const {
    const int half = m.head_width / 2;
    grow(table, size_t(batch) * m.head_width);
    for (int b = 0; b < batch; b++)
      for (int i = 0; i < half; i++) {
        const float angle = float(lengths[b]) * frequencies[i];
        table[size_t(b) * m.head_width + i] = std::cos(angle) * m.rope_factor;
        table[size_t(b) * m.head_width + half + i] = std::sin(angle) * m.rope_factor;
      }
  }

  void feed_forward(const Layer& layer, const Input& x, std::vector<float>& gate, std::vector<float>& up,
                    const Worker& me) {
    const int F = m.ffn_width;
    const auto [from, to] = share(F, GROUP, me);
    if (from == to) return;
    grow(up, size_t(batch) * F), grow(gate, size_t(batch) * F);
    multiply(layer.up, from, to, x, batch, up.data(), F, m.exact);
    if (layer.gate.kind) multiply(layer.gate, from, to, x, batch, gate.data(), F, m.exact);
    for (int b = 0; b < batch; b++) {
      const float* g = layer.gate.kind ? &gate[size_t(b) * F] : nullptr;
      gated(g, &up[size_t(b) * F], hidden.row(b), from, to, m.activation);
      hidden.round(b, F, from, to, m.exact);
    }
  }

  void run(const Worker& me) {
    const int D = m.width, K = m.head_width, stride = (m.heads + 2 * m.kv_heads) * K;
    thread_local ThreadWorkspace workspace;
    auto& [x, scratch, gate, up, global, local, position, post, in, heads] = workspace;
    grow(x, size_t(batch) * D), grow(position, D);
    for (int b = 0; b < batch; b++) {
      unpack_row(m.embed, tokens[b], &x[size_t(b) * D]);
      for (int i = 0; i < D; i++) x[size_t(b) * D + i] *= m.embed_scale;
      if (m.positions.kind) {
        unpack_row(m.positions, lengths[b], position.data());
        for (int i = 0; i < D; i++) x[size_t(b) * D + i] += position[i];
      }
    }
    if (m.rope) angles(global, m.frequencies);
    if (m.rope && m.window) angles(local, m.local_frequencies);
    for (int l = 0; l < m.depth; l++) {
      const Layer& layer = m.layers[l];
      normed(x, layer.attention, in);
      product(layer.q, in, qkv.data(), stride, me);
      product(layer.k, in, qkv.data() + size_t(m.heads) * K, stride, me);
      product(layer.v, in, qkv.data() + size_t(m.heads + m.kv_heads) * K, stride, me);
      me.barrier();
      const float* table = (layer.local ? local : global).data();
      for (int task = me.id; task < batch * m.kv_heads * most; task += me.count) {
        // Parts follow pairs, so that rows in one part are shared among threads too.
        const int pairs = batch * m.kv_heads, part = task / pairs, pair = task % pairs, b = pair / m.kv_heads;
        attend(layer, l, b, pair % m.kv_heads, part, m.rope ? table + size_t(b) * K : nullptr, scratch);
      }
      me.barrier();
      merge(heads);
      product(layer.o, heads, out.data(), D, me);
      me.barrier();
      add(x, layer.attention_post, post);
      normed(x, layer.ffn, in);
      feed_forward(layer, in, gate, up, me);
      me.barrier();
      product(layer.down, hidden, out.data(), D, me);
      me.barrier();
      add(x, layer.ffn_post, post);
    }
    normed(x, m.norm, in);
    product(m.head, in, logits, m.vocab, me);
  }
};

}  // namespace

extern "C" {  // functions that can fail return a Status

int32_t tfcli_sizes(int32_t which) {  // for Python to check its structures
  const int32_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Cache)};
  return sizes[which];
}

int32_t tfcli_bf16_products() {
#ifdef BF16_PRODUCTS
  return 1;
#else
  return 0;
#endif
}

int32_t tfcli_bf16_tiles() {  // whether the processor multiplies whole tiles of bf16 (AMX), which is not used here
#ifdef __AMX_BF16__
  return 1;
#else
  return 0;
#endif
}

int32_t tfcli_int8_products() {
#ifdef INT8_PRODUCTS
  return 1;
#else
  return 0;
#endif
}

// tokens[b] follows the lengths[b] positions of row b in the cache: stores its key and value, writes logits (B, V).
int32_t tfcli_step(const Model* model, const Cache* cache, int32_t batch, const int32_t* tokens, const int32_t* lengths,
                   float* logits, int32_t threads) try {
  thread_local Workspace workspace;
  Step step(*model, *cache, batch, tokens, lengths, logits, threads, workspace);
  return in_parallel(threads, [&](const Worker& me) { step.run(me); });
} catch (...) {
  return why();
}

// y (B, rows) = x (B, cols) W^T + bias
int32_t tfcli_linear(const Matrix* w, int32_t batch, const float* x, float* y, int32_t exact, int32_t threads) try {
  Input in;
  in.shape(batch, w->cols);
  for (int b = 0; b < batch; b++) {
    memcpy(in.row(b), x + size_t(b) * w->cols, sizeof(float) * w->cols);
    in.round(b, w->cols, 0, w->cols, exact);
  }
  return in_parallel(threads, [&](const Worker& me) {
    const auto [from, to] = share(w->rows, TILE, me);
    multiply(*w, from, to, in, batch, y, w->rows, exact);
  });
} catch (...) {
  return why();
}

// The same for rows of bf16 whose length is a multiple of 32, by a W in tiles; only where tfcli_bf16_products().
int32_t tfcli_linear_bf16(const Matrix* w, int32_t batch, const uint16_t* x, uint16_t* y, int32_t threads) try {
  Input in;
  in.borrow(x, batch, w->cols);
  return in_parallel(threads, [&](const Worker& me) {
    if (w->kind != TILED)
      for (auto [b, end] = share(batch, 1, me); b < end; b++) in.sum_up(b);
    me.barrier();
    const auto [from, to] = share(w->rows, TILE, me);
    // Some input rows at a time: they stay in the cache while all of the weights pass.
    for (int b = 0; b < batch && from < to; b += 64) {
      Input some;
      some.stride = in.stride, some.groups = in.groups, some.h = in.h + size_t(b) * in.stride;
      some.sums.assign(in.group_sums(b), in.group_sums(std::min(batch, b + 64)));
      multiply_tiles(*w, from, to, some, std::min(64, batch - b), nullptr, y + size_t(b) * w->rows, w->rows, false);
    }
  });
} catch (...) {
  return why();
}

#ifdef INT8_PRODUCTS
// The same by a Q8 matrix without `low`, input rows rounded to 8 bits too.
int32_t tfcli_linear_int8(const Matrix* w, int32_t batch, const uint16_t* x, uint16_t* y, int32_t threads) try {
  Int8Input in(batch, w->cols);
  return in_parallel(threads, [&](const Worker& me) {
    const auto [first, last] = share(batch, 1, me);
    for (int b = first; b < last; b++) in.round(x + size_t(b) * w->cols, b);
    me.barrier();
    const auto [from, to] = share(w->rows, TILE, me);
    std::vector<uint8_t> codes(size_t(w->groups) * GROUP * TILE);
    for (int tile = from / TILE; tile * TILE < to; tile++) {
      fours(*w, tile, codes.data());
      int b = multiply_int8<6>(*w, tile, codes.data(), in, 0, batch, y);
      b = multiply_int8<2>(*w, tile, codes.data(), in, b, batch, y);
      multiply_int8<1>(*w, tile, codes.data(), in, b, batch, y);
    }
  });
} catch (...) {
  return why();
}
#endif

// A BF16 matrix as a TILED one: out (tiles, padded columns / 2, 32, 2).
int32_t tfcli_tile(const Matrix* w, uint16_t* out, int32_t threads) {
  const int pairs = padded(w->cols) / 2, tiles = (w->rows + TILE - 1) / TILE;
  return in_parallel(threads, [&](const Worker& me) {
    for (auto [tile, end] = share(tiles, 1, me); tile < end; tile++) {
      uint32_t* to = (uint32_t*)out + size_t(tile) * pairs * TILE;
      for (int r = 0; r < TILE; r++) {
        const int n = tile * TILE + r, cols = n < w->rows ? w->cols : 0;
        const uint16_t* from = (const uint16_t*)w->data + size_t(n) * w->cols;
        for (int j = 0; j < pairs; j++) {
          const uint32_t even = 2 * j < cols ? from[2 * j] : 0, odd = 2 * j + 1 < cols ? from[2 * j + 1] : 0;
          to[size_t(j) * TILE + r] = even | odd << 16;
        }
      }
    }
  });
}

// y = RMSNorm(x) w over rows of `cols`; bf16 or fp32 alike in x and y.
int32_t tfcli_norm(const void* x, void* y, int32_t rows, int32_t cols, const float* weight, float eps, int32_t bf16,
                   int32_t threads) {
  return in_parallel(threads, [&](const Worker& me) {
    std::vector<float> row(cols);
    for (auto [r, end] = share(rows, 1, me); r < end; r++) {
      const size_t at = size_t(r) * cols;
      const float* from = (const float*)x + at;
      if (bf16) to_float((const uint16_t*)x + at, row.data(), cols), from = row.data();
      normalize(from, bf16 ? row.data() : (float*)y + at, cols, Norm{weight, nullptr}, false, eps);
      if (bf16) to_bf16(row.data(), (uint16_t*)y + at, cols);
    }
  });
}

// Heads (tokens, heads, width): QK-norm where there is a weight, then rotation by cos and sin (tables, width / 2),
// which repeat every `tables` tokens. x and y may be the same.
int32_t tfcli_rotate(const void* x, void* y, int32_t tokens, int32_t heads, int32_t width, const float* weight,
                     float eps, const float* cos, const float* sin, int32_t tables, int32_t bf16, int32_t threads) {
  return in_parallel(threads, [&](const Worker& me) {
    std::vector<float> row(width), out(width);
    const int half = width / 2;
    for (auto [t, end] = share(tokens, 1, me); t < end; t++) {
      const float *c = cos + size_t(t % tables) * half, *s = sin + size_t(t % tables) * half;
      for (int h = 0; h < heads; h++) {
        const size_t at = (size_t(t) * heads + h) * width;
        if (bf16) to_float((const uint16_t*)x + at, row.data(), width);
        else memcpy(row.data(), (const float*)x + at, sizeof(float) * width);
        if (weight) normalize(row.data(), row.data(), width, Norm{weight, nullptr}, false, eps);
        float *to = bf16 ? out.data() : (float*)y + at, *a = row.data(), *b = row.data() + half;
        for (int i = 0; i < half; i++) to[i] = a[i] * c[i] - b[i] * s[i];
        for (int i = 0; i < half; i++) to[half + i] = b[i] * c[i] + a[i] * s[i];
        if (bf16) to_bf16(to, (uint16_t*)y + at, width);
      }
    }
  });
}

// y = act(gate) * up, or act(up) where there is no gate; all of n numbers, y may be one of the others.
int32_t tfcli_activate(const void* gate, const void* up, void* y, int64_t n, int32_t activation, int32_t bf16,
                       int32_t threads) {
  return in_parallel(threads, [&](const Worker& me) {
    const int64_t units = (n + 1023) / 1024;
    float g[1024], u[1024];
    for (int64_t unit = units * me.id / me.count; unit < units * (me.id + 1) / me.count; unit++) {
      const int64_t at = unit * 1024;
      const int count = int(std::min<int64_t>(1024, n - at));
      const float *a = gate ? (const float*)gate + at : nullptr, *b = (const float*)up + at;
      if (bf16) {
        if (gate) to_float((const uint16_t*)gate + at, g, count), a = g;
        to_float((const uint16_t*)up + at, u, count), b = u;
      }
      float* out = bf16 ? u : (float*)y + at;
      gated(a, b, out, 0, count, activation);
      if (bf16) to_bf16(out, (uint16_t*)y + at, count);
    }
  });
}

// Rows of W (all of them, or those listed) as fp32 or, rounded to nearest, as bf16: out (count, cols).
int32_t tfcli_unpack(const Matrix* w, int32_t count, const int64_t* rows, void* out, int32_t bf16, int32_t threads) {
  return in_parallel(threads, [&](const Worker& me) {
    std::vector<float> row(w->cols);
    for (auto [i, end] = share(count, 1, me); i < end; i++) {
      const size_t at = size_t(i) * w->cols;
      float* to = bf16 ? row.data() : (float*)out + at;
      unpack_row(*w, int(rows ? rows[i] : i), to);
      if (!bf16) continue;
      to_bf16(to, (uint16_t*)out + at, w->cols);
    }
  });
}

#ifdef BF16_PRODUCTS
// Attention of many queries at once in bf16 (Vaswani et al. 2017, eq. 1): out (B, H, T, K) of q (B, H, T, K) and keys
// and values (B, G, S, K), with `strides`; query t attends to the keys up to offset + t, or to all where not causal.
// `bias` (B, S), or null, is added to the scores of a row's keys. K is a multiple of 32 of at most 256. Scores and sums
// are fp32.
int32_t tfcli_attend(const uint16_t* q, const uint16_t* keys, const uint16_t* values, uint16_t* out, int32_t batch,
                     int32_t heads, int32_t groups, int32_t queries, int32_t length, int32_t width,
                     const int64_t* strides, float scale, const float* bias, int32_t causal, int32_t offset,
                     int32_t threads) try {
  // strides: of q, keys, values and out, from row to row, head to head and position to position
  const int n = heads / groups, S = (length + 31) / 32 * 32, K = width;
  constexpr int ROWS = 32;  // queries of a task
  const int blocks = (queries + ROWS - 1) / ROWS, pairs_of_heads = batch * groups;
  // Many rows: each thread packs the keys and values of one at a time, for itself. Few: all are packed for all threads.
  const int most = pool_size(threads);
  const bool apart = pairs_of_heads >= 4 * most;
  const size_t packed = size_t(S) * K;
  std::unique_ptr<uint16_t[]> shared(new uint16_t[2 * packed * (apart ? most : pairs_of_heads)]);
  std::atomic<int> next{0};
  // Keys of sixteen positions as pairs of columns, values of two positions as pairs: what products want in a lane.
  auto pack = [&](int pair, uint16_t* pk) {
    const int b = pair / groups, g = pair % groups;
    const uint16_t *k = keys + b * strides[3] + g * strides[4], *v = values + b * strides[6] + g * strides[7];
    for (int s = 0; s < S; s++) {
      const uint16_t* row = s < length ? k + s * strides[5] : nullptr;
      uint32_t* to = (uint32_t*)pk + size_t(s / 16) * (K / 2) * 16 + s % 16;
      for (int j = 0; j < K / 2; j++) {
        uint32_t two = 0;
        if (row) memcpy(&two, row + 2 * j, 4);
        to[size_t(j) * 16] = two;
      }
    }
    for (int s = 0; s < S; s += 2) {
      uint32_t* to = (uint32_t*)(pk + packed) + size_t(s / 2) * K;
      const uint16_t *even = v + s * strides[8], *odd = even + strides[8];
      if (s + 1 < length)
        for (int j = 0; j < K; j++) to[j] = even[j] | uint32_t(odd[j]) << 16;
      else
        for (int j = 0; j < K; j++) to[j] = s < length ? even[j] : 0;
    }
  };
  return in_parallel(most, [&](const Worker& me) {
    std::vector<float> scores(size_t(ROWS) * S);
    std::vector<uint16_t> weights(size_t(ROWS) * S);
    float inverse[ROWS];
    auto attend = [&](int b, int h, int block, const uint16_t* pk) {
      const uint16_t* pv = pk + packed;
      const int first = block * ROWS, count = std::min(ROWS, queries - first);
      const int end = causal ? std::min(length, offset + first + count) : length;  // of any query here
      const int stop = (end + 31) / 32 * 32;
      for (int t = 0; t < count; t += 8) {
        const uint16_t* rows[8];
        for (int i = 0; i < 8; i++)
          rows[i] = q + b * strides[0] + h * strides[1] + (first + std::min(t + i, count - 1)) * strides[2];
        for (int s = 0; s < stop; s += 16) {
          __m512 acc[8];
          for (auto& a : acc) a = _mm512_setzero_ps();
          const uint16_t* p = pk + size_t(s / 16) * K * 16;
          for (int j = 0; j < K; j += 2, p += 32) {
            const __m512bh k = (__m512bh)_mm512_loadu_si512(p);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) acc[i] = _mm512_dpbf16_ps(acc[i], k, pairs(rows[i] + j));
          }
          for (int i = 0; i < 8 && t + i < count; i++) _mm512_storeu_ps(&scores[size_t(t + i) * S + s], acc[i]);
        }
      }
      for (int t = 0; t < count; t++) {
        float* s = &scores[size_t(t) * S];
        uint16_t* w = &weights[size_t(t) * S];
        const int to = causal ? std::min(length, offset + first + t + 1) : length;
        if (bias)
          for (int i = 0; i < to; i++) s[i] += bias[size_t(b) * length + i] / scale;
        for (int i = to; i < stop; i++) s[i] = -INFINITY;
        F16 most = splat(-INFINITY);
        for (int i = 0; i < stop; i += 16) {
          const F16 v = load(s + i);
          most = v > most ? v : most;
        }
        float top = -INFINITY;
        for (int l = 0; l < 16; l++) top = most[l] > top ? most[l] : top;
        F16 total{};
        for (int i = 0; i < stop; i += 16) {
          const F16 v = load(s + i), e = v == -INFINITY ? F16{} : exponential((v - top) * scale);
          const __m256bh r = _mm512_cvtneps_pbh(e);
          memcpy(w + i, &r, 32);
          total += e;
        }
        inverse[t] = 1.0f / sum(total);
      }
      for (int t = 0; t < count; t += 4)
        for (int j = 0; j < K; j += 32) {
          __m512 acc[4][2];
          for (auto& a : acc) a[0] = a[1] = _mm512_setzero_ps();
          const uint16_t* w[4];
          for (int i = 0; i < 4; i++) w[i] = &weights[size_t(std::min(t + i, count - 1)) * S];
          for (int s = 0; s < stop; s += 2) {
            const uint16_t* p = pv + size_t(s / 2) * 2 * K + j * 2;
            const __m512bh v0 = (__m512bh)_mm512_loadu_si512(p), v1 = (__m512bh)_mm512_loadu_si512(p + 32);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
              const __m512bh two = pairs(w[i] + s);
              acc[i][0] = _mm512_dpbf16_ps(acc[i][0], two, v0), acc[i][1] = _mm512_dpbf16_ps(acc[i][1], two, v1);
            }
          }
          for (int i = 0; i < 4 && t + i < count; i++) {
            uint16_t* to = out + b * strides[9] + h * strides[10] + (first + t + i) * strides[11] + j;
            const __m512 by = _mm512_set1_ps(inverse[t + i]);
            for (int c = 0; c < 2; c++) {
              const __m256bh r = _mm512_cvtneps_pbh(_mm512_mul_ps(acc[i][c], by));
              memcpy(to + 16 * c, &r, 32);
            }
          }
        }
    };
    if (apart) {
      uint16_t* place = &shared[2 * packed * me.id];
      for (int pair; (pair = next.fetch_add(1)) < pairs_of_heads;) {
        pack(pair, place);
        for (int h = pair % groups * n; h < (pair % groups + 1) * n; h++)
          for (int block = 0; block < blocks; block++) attend(pair / groups, h, block, place);
      }
      return;
    }
    for (int pair = me.id; pair < pairs_of_heads; pair += me.count) pack(pair, &shared[2 * packed * pair]);
    me.barrier();
    for (int task; (task = next.fetch_add(1)) < batch * heads * blocks;) {
      // The longest rows first: of causal attention the last queries.
      const int b = task % (batch * heads) / heads, h = task % heads;
      attend(b, h, blocks - 1 - task / (batch * heads), &shared[2 * packed * (size_t(b) * groups + h / n)]);
    }
  });
} catch (...) {
  return why();
}
#endif

// The likeliest token of each row, the first of equals, or the one that `ids` names, and its log-probability; a row
// that is not finite has id -1.
int32_t tfcli_pick(const float* logits, int32_t batch, int32_t vocab, int32_t* ids, float* logprobs, int32_t chosen,
                   int32_t threads) {
  auto row = [&](int b) {
    const float* x = logits + size_t(b) * vocab;
    int best = 0;
    float top = x[0];
    bool bad = false;
    for (int i = 0; i < vocab;) {
      const int end = std::min(vocab, i + 1024);
      float most = -INFINITY;
      F16 m = splat(-INFINITY), z{};
      int j = i;
      for (; j + 16 <= end; j += 16) {
        const F16 v = load(x + j);
        m = v > m ? v : m;
        z += v * 0.0f;  // NaN and infinity leave NaN
      }
      for (int l = 0; l < 16; l++) most = m[l] > most ? m[l] : most;
      float rest = sum(z);
      for (; j < end; j++) most = x[j] > most ? x[j] : most, rest += x[j] * 0.0f;
      bad = bad || rest != 0.0f;
      if (most > top || i == 0) {
        top = most;
        for (best = i; best < end - 1 && x[best] != top;) best++;
      }
      i = end;
    }
    F16 total{};
    double rest = 0;
    int i = 0;
    for (; i + 16 <= vocab; i += 16) total += exponential(load(x + i) - top);
    for (; i < vocab; i++) rest += std::exp(double(x[i]) - top);
    if (chosen) best = ids[b];
    ids[b] = bad ? -1 : best;
    logprobs[b] = float(double(x[best]) - top - std::log(sum(total) + rest));
  };
  if (batch == 1) {
    row(0);
    return DONE;
  }
  return in_parallel(threads, [&](const Worker& me) {
    for (auto [b, end] = share(batch, 1, me); b < end; b++) row(b);
  });
}

}  // extern "C"
