// Kernels of a serving stage on CPU: attention over the paged cache, and chains of small operators in one pass.
//
// Plain C++17 behind a C interface, no torch headers: it compiles in two seconds.  Inner loops are written so that the
// compiler vectorises them for the machine at hand.  Letters: T tokens, N sequences, H query heads, G key-value heads,
// D and E widths of a key's and a value's head.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}
inline void store(float &to, float x) { to = x; }
inline void store(bf16 &to, float x) {  // round to nearest even; no NaN comes here
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp for x <= 0, to about 2e-7 relative: 2^n · 2^f with a polynomial on |f| <= 1/2.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  float z = x * 1.44269504088896341f;
  float n = std::nearbyint(z);
  float f = z - n;
  float p = 1.5403530393381608e-4f;
  p = p * f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910072e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

}  // namespace

extern "C" {

struct Attention {
  // of the node
  int64_t heads, kv_heads, key_width, value_width, block_size, window;
  double scale, softcap;
  void *k_cache, *v_cache;  // [P, G, D], [P, G, E]
  // of the step
  const int64_t *places, *starts, *lengths, *tables, *chosen;
  int64_t tokens, table_width, sequences, threads;
  // of the call; strides in elements, innermost 1
  const void *q, *k, *v;
  void *out;  // [T, H, E]
  int64_t q_head, q_token, k_head, k_token, v_head, v_token;
};
}

namespace {

template <typename S>
void write_cache(const Attention &a) {
  const S *k = static_cast<const S *>(a.k), *v = static_cast<const S *>(a.v);
  S *k_cache = static_cast<S *>(a.k_cache), *v_cache = static_cast<S *>(a.v_cache);
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t g = 0; g < a.kv_heads; ++g) {
      int64_t at = a.places[t] * a.kv_heads + g;
      std::memcpy(k_cache + at * a.key_width, k + g * a.k_head + t * a.k_token, a.key_width * sizeof(S));
      std::memcpy(v_cache + at * a.value_width, v + g * a.v_head + t * a.v_token, a.value_width * sizeof(S));
    }
}

// All tokens of sequence n and the query heads of key-value head g.
template <typename S>
void attend(const Attention &a, int64_t n, int64_t g, std::vector<float> &room) {
  const int64_t group = a.heads / a.kv_heads, D = a.key_width, E = a.value_width;
  const int64_t first = a.starts[n], count = a.starts[n + 1] - first, length = a.lengths[n];
  const int64_t *table = a.tables + n * a.table_width;
  const S *k_cache = static_cast<const S *>(a.k_cache), *v_cache = static_cast<const S *>(a.v_cache);
  room.resize(group * (length + D + E));
  float *scores = room.data(), *query = scores + group * length, *sum = query + group * D;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t token = first + j, end = length - count + j + 1;
    const int64_t begin = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0, seen = end - begin;
    for (int64_t r = 0; r < group; ++r) {
      const S *q = static_cast<const S *>(a.q) + (g * group + r) * a.q_head + token * a.q_token;
      for (int64_t d = 0; d < D; ++d) query[r * D + d] = load(q[d]) * float(a.scale);
    }
    for (int64_t s = 0; s < seen; ++s) {
      const int64_t at = begin + s, place = table[at / a.block_size] * a.block_size + at % a.block_size;
      const S *key = k_cache + (place * a.kv_heads + g) * D;
      for (int64_t r = 0; r < group; ++r) {
        float dot = 0;
        for (int64_t d = 0; d < D; ++d) dot += query[r * D + d] * load(key[d]);
        scores[r * length + s] = dot;
      }
    }
    for (int64_t r = 0; r < group; ++r) {
      float *row = scores + r * length;
      if (a.softcap > 0)
        for (int64_t s = 0; s < seen; ++s) row[s] = float(a.softcap) * std::tanh(row[s] / float(a.softcap));
      float most = row[0], total = 0;
      for (int64_t s = 1; s < seen; ++s) most = std::max(most, row[s]);
      for (int64_t s = 0; s < seen; ++s) row[s] = exp_negative(row[s] - most);
      for (int64_t s = 0; s < seen; ++s) total += row[s];
      const float inverse = 1 / total;
      for (int64_t s = 0; s < seen; ++s) row[s] *= inverse;
    }
    std::fill(sum, sum + group * E, 0.0f);
    for (int64_t s = 0; s < seen; ++s) {
      const int64_t at = begin + s, place = table[at / a.block_size] * a.block_size + at % a.block_size;
      const S *value = v_cache + (place * a.kv_heads + g) * E;
      for (int64_t r = 0; r < group; ++r) {
        const float weight = scores[r * length + s];
        for (int64_t e = 0; e < E; ++e) sum[r * E + e] += weight * load(value[e]);
      }
    }
    S *out = static_cast<S *>(a.out) + (token * a.heads + g * group) * E;
    for (int64_t i = 0; i < group * E; ++i) store(out[i], sum[i]);
  }
}

template <typename S>
void run(const Attention &a) {
  write_cache<S>(a);
  const int64_t jobs = a.sequences * a.kv_heads;
#pragma omp parallel if (a.threads > 1) num_threads(int(a.threads))
  {
    std::vector<float> room;
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < jobs; ++job) attend<S>(a, a.chosen[job / a.kv_heads], job % a.kv_heads, room);
  }
}

}  // namespace

extern "C" {

void attention_float32(const Attention *a) { run<float>(*a); }
void attention_bfloat16(const Attention *a) { run<bf16>(*a); }

}
