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
  void *k_cache, *v_cache;  // [blocks, G, D, block size], [blocks, G, block size, E]
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

// Sixteen floats: one AVX-512 register; the compiler splits them where registers are narrower.
typedef float wide __attribute__((vector_size(64)));
typedef uint16_t narrow __attribute__((vector_size(32)));
typedef uint32_t widened __attribute__((vector_size(64)));
constexpr int64_t WIDE = 16;

inline wide load_wide(const float *x) {
  wide y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
inline wide load_wide(const bf16 *x) {
  narrow bits;
  std::memcpy(&bits, x, sizeof bits);
  widened shifted = __builtin_convertvector(bits, widened) << 16;
  wide y;
  std::memcpy(&y, &shifted, sizeof y);
  return y;
}

template <typename S>
void write_cache(const Attention &a) {
  const S *k = static_cast<const S *>(a.k), *v = static_cast<const S *>(a.v);
  S *k_cache = static_cast<S *>(a.k_cache), *v_cache = static_cast<S *>(a.v_cache);
  const int64_t size = a.block_size, D = a.key_width, E = a.value_width;
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t g = 0; g < a.kv_heads; ++g) {
      const int64_t block = (a.places[t] / size) * a.kv_heads + g, within = a.places[t] % size;
      const S *key = k + g * a.k_head + t * a.k_token;
      S *to = k_cache + block * D * size + within;
      for (int64_t d = 0; d < D; ++d) to[d * size] = key[d];
      std::memcpy(v_cache + (block * size + within) * E, v + g * a.v_head + t * a.v_token, E * sizeof(S));
    }
}

// Scores of R query heads against the keys of one block: [R, size], rows `stride` apart.
template <typename S, int R>
void score_block(const S *keys, const float *query, int64_t D, int64_t size, float *scores, int64_t stride) {
  if (size == WIDE) {
    wide sum[R] = {};
    for (int64_t d = 0; d < D; ++d) {
      const wide key = load_wide(keys + d * WIDE);
      for (int r = 0; r < R; ++r) sum[r] += key * query[r * D + d];
    }
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * stride, &sum[r], sizeof sum[r]);
    return;
  }
  for (int r = 0; r < R; ++r) {
    float *row = scores + r * stride;
    std::fill(row, row + size, 0.0f);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t s = 0; s < size; ++s) row[s] += load(keys[d * size + s]) * query[r * D + d];
  }
}

// Adds to R sums [R, E] the values `from` ... `to` - 1 of one block by their weights.
template <typename S, int R>
void add_block(const S *values, const float *weights, int64_t stride, int64_t from, int64_t to, int64_t E, float *sums) {
  int64_t e = 0;
  for (; e + WIDE <= E; e += WIDE) {
    wide sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load_wide(sums + r * E + e);
    for (int64_t s = from; s < to; ++s) {
      const wide value = load_wide(values + s * E + e);
      for (int r = 0; r < R; ++r) sum[r] += value * weights[r * stride + s];
    }
    for (int r = 0; r < R; ++r) std::memcpy(sums + r * E + e, &sum[r], sizeof sum[r]);
  }
  for (int r = 0; r < R; ++r)
    for (int64_t s = from; s < to; ++s)
      for (int64_t i = e; i < E; ++i) sums[r * E + i] += weights[r * stride + s] * load(values[s * E + i]);
}

// R query heads from `head` of one token over positions begin ... end - 1 of its sequence.
template <typename S, int R>
void attend_heads(const Attention &a, const int64_t *table, int64_t head, int64_t token, int64_t begin, int64_t end,
                  std::vector<float> &room) {
  const int64_t D = a.key_width, E = a.value_width, size = a.block_size, g = head / (a.heads / a.kv_heads);
  const int64_t first = begin / size, last = (end + size - 1) / size, stride = (last - first) * size;
  room.resize(R * (stride + D + E));
  float *scores = room.data(), *query = scores + R * stride, *sums = query + R * D;
  const S *k_cache = static_cast<const S *>(a.k_cache), *v_cache = static_cast<const S *>(a.v_cache);
  for (int r = 0; r < R; ++r) {
    const S *q = static_cast<const S *>(a.q) + (head + r) * a.q_head + token * a.q_token;
    for (int64_t d = 0; d < D; ++d) query[r * D + d] = load(q[d]) * float(a.scale);
  }
  for (int64_t b = first; b < last; ++b)
    score_block<S, R>(k_cache + (table[b] * a.kv_heads + g) * D * size, query, D, size, scores + (b - first) * size,
                      stride);
  const int64_t skip = begin - first * size, seen = end - begin;
  for (int r = 0; r < R; ++r) {
    float *row = scores + r * stride + skip;
    if (a.softcap > 0)
      for (int64_t s = 0; s < seen; ++s) row[s] = float(a.softcap) * std::tanh(row[s] / float(a.softcap));
    float most = row[0], total = 0;
    for (int64_t s = 1; s < seen; ++s) most = std::max(most, row[s]);
    for (int64_t s = 0; s < seen; ++s) row[s] = exp_negative(row[s] - most);
    for (int64_t s = 0; s < seen; ++s) total += row[s];
    const float inverse = 1 / total;
    for (int64_t s = 0; s < seen; ++s) row[s] *= inverse;
  }
  std::fill(sums, sums + R * E, 0.0f);
  for (int64_t b = first; b < last; ++b)
    add_block<S, R>(v_cache + (table[b] * a.kv_heads + g) * size * E, scores + (b - first) * size, stride,
                    std::max<int64_t>(0, begin - b * size), std::min(size, end - b * size), E, sums);
  S *out = static_cast<S *>(a.out) + (token * a.heads + head) * E;
  for (int64_t i = 0; i < R * E; ++i) store(out[i], sums[i]);
}

// All tokens of sequence n and the query heads of key-value head g.
template <typename S>
void attend(const Attention &a, int64_t n, int64_t g, std::vector<float> &room) {
  const int64_t group = a.heads / a.kv_heads, count = a.starts[n + 1] - a.starts[n];
  const int64_t *table = a.tables + n * a.table_width;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t token = a.starts[n] + j, end = a.lengths[n] - count + j + 1;
    const int64_t begin = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
    int64_t head = g * group;
    const int64_t stop = head + group;
    for (; head + 4 <= stop; head += 4) attend_heads<S, 4>(a, table, head, token, begin, end, room);
    if (stop - head == 3) attend_heads<S, 3>(a, table, head, token, begin, end, room);
    if (stop - head == 2) attend_heads<S, 2>(a, table, head, token, begin, end, room);
    if (stop - head == 1) attend_heads<S, 1>(a, table, head, token, begin, end, room);
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

// -- chains of small operators ----------------------------------------------------------------------------------------

extern "C" {

struct Norm {  // [outer, inner, width], innermost stride 1; out is dense
  const void *x, *weight;
  void *out;
  int64_t outer, outer_stride, inner, inner_stride, width;
  double epsilon;
};

struct Rotation {  // x [heads, tokens, width]; cosine and sine [tokens, width]; out is dense
  const void *x, *cosine, *sine;
  void *out;
  int64_t heads, head_stride, tokens, token_stride, width, cosine_stride, sine_stride;
};

struct Gate {  // silu(a) · b, both [rows, width]; out is dense
  const void *a, *b;
  void *out;
  int64_t rows, a_stride, b_stride, width;
};
}

namespace {

template <typename S>
float rounded(float x) {
  S y;
  store(y, x);
  return load(y);
}

template <typename S>
void norm(const Norm &a) {
  const S *weight = static_cast<const S *>(a.weight);
  S *out = static_cast<S *>(a.out);
  for (int64_t i = 0; i < a.outer; ++i)
    for (int64_t j = 0; j < a.inner; ++j, out += a.width) {
      const S *x = static_cast<const S *>(a.x) + i * a.outer_stride + j * a.inner_stride;
      float squares = 0;
      for (int64_t d = 0; d < a.width; ++d) squares += load(x[d]) * load(x[d]);
      const float scale = 1 / std::sqrt(squares / float(a.width) + float(a.epsilon));
      if (weight)
        for (int64_t d = 0; d < a.width; ++d) store(out[d], rounded<S>(load(x[d]) * scale) * load(weight[d]));
      else
        for (int64_t d = 0; d < a.width; ++d) store(out[d], load(x[d]) * scale);
    }
}

template <typename S>
void rotate(const Rotation &a) {
  const int64_t half = a.width / 2;
  S *out = static_cast<S *>(a.out);
  for (int64_t h = 0; h < a.heads; ++h)
    for (int64_t t = 0; t < a.tokens; ++t, out += a.width) {
      const S *x = static_cast<const S *>(a.x) + h * a.head_stride + t * a.token_stride;
      const S *c = static_cast<const S *>(a.cosine) + t * a.cosine_stride;
      const S *s = static_cast<const S *>(a.sine) + t * a.sine_stride;
      for (int64_t d = 0; d < half; ++d) {
        const float low = load(x[d]), high = load(x[d + half]);
        store(out[d], low * load(c[d]) - high * load(s[d]));
        store(out[d + half], high * load(c[d + half]) + low * load(s[d + half]));
      }
    }
}

template <typename S>
void gate(const Gate &g) {
  for (int64_t i = 0; i < g.rows; ++i) {
    const S *a = static_cast<const S *>(g.a) + i * g.a_stride, *b = static_cast<const S *>(g.b) + i * g.b_stride;
    S *out = static_cast<S *>(g.out) + i * g.width;
    for (int64_t d = 0; d < g.width; ++d) {
      const float x = load(a[d]), e = exp_negative(-std::fabs(x)), sigmoid = (x >= 0 ? 1.0f : e) / (1 + e);
      store(out[d], x * sigmoid * load(b[d]));
    }
  }
}

}  // namespace

extern "C" {

void attention_float32(const Attention *a) { run<float>(*a); }
void attention_bfloat16(const Attention *a) { run<bf16>(*a); }
void norm_float32(const Norm *a) { norm<float>(*a); }
void norm_bfloat16(const Norm *a) { norm<bf16>(*a); }
void rotate_float32(const Rotation *a) { rotate<float>(*a); }
void rotate_bfloat16(const Rotation *a) { rotate<bf16>(*a); }
void gate_float32(const Gate *a) { gate<float>(*a); }
void gate_bfloat16(const Gate *a) { gate<bf16>(*a); }

}
