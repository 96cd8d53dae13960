// Kernels of a serving stage on CPU: attention over the paged cache, chains of small operators in one pass, products with
// packed weights and with int8 weights, the choice of tokens.
//
// Plain C++17 behind a C interface, no torch headers: it compiles in seconds.  Inner loops are written so that the
// compiler vectorises them for the machine at hand.  Letters: T tokens, N sequences, H query heads, G key-value heads,
// D and E widths of a key's and a value's head.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>
#ifdef __linux__
#include <pthread.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
#define MATRIX_UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// -- the parts of a kernel's work, on several cores -------------------------------------------------------------------

namespace {

inline void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// Threads on cores that are free as long as this stage computes: they take parts of its kernels' work, and sleep otherwise.
class Crew {
 public:
  // A thread on each of the cores.  It stays as long as the process.
  void hire(const int64_t *cores, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      std::thread([this, core = cores[i]] {
#ifdef __linux__
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(int(core), &only);
        if (pthread_setaffinity_np(pthread_self(), sizeof only, &only)) return;
#endif
        while (true) {
          {
            std::unique_lock<std::mutex> lock(mutex_);
            begun_.wait(lock, [this] { return at_work(); });
          }
          while (at_work())
            if (!take()) pause();
        }
      }).detach();
  }

  bool at_work() const { return at_work_.load(std::memory_order_acquire); }

  void begin() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      at_work_.store(true, std::memory_order_release);
    }
    begun_.notify_all();
  }

  void end() { at_work_.store(false, std::memory_order_release); }

  // part(0) ... part(parts - 1), each once, by whoever is free.
  template <typename F>
  void run(int64_t parts, const F &part) {
    call_ = [](const void *of, int64_t i) { (*static_cast<const F *>(of))(i); };
    of_ = &part;
    parts_ = parts;
    done_.store(0, std::memory_order_relaxed);
    left_.store((left_.load(std::memory_order_relaxed) & ~LEFT) + LEFT + 1 + uint64_t(parts), std::memory_order_release);
    while (take()) {
    }
    while (done_.load(std::memory_order_acquire) < parts) pause();
  }

 private:
  // Does one part, if there is one left.  Who has taken one may read what is to be done: it changes only after all are done.
  bool take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    do
      if (!(left & LEFT)) return false;
    while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acquire));
    call_(of_, parts_ - int64_t(left & LEFT));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  static constexpr uint64_t LEFT = 0xffffffff;
  void (*call_)(const void *, int64_t) = nullptr;
  const void *of_ = nullptr;
  int64_t parts_ = 0;
  alignas(64) std::atomic<uint64_t> left_{0};  // parts, below the number of the work they are of
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> at_work_{false};
  std::mutex mutex_;
  std::condition_variable begun_;
};

Crew &crew() {
  static Crew *const made = new Crew;  // never ends: its threads don't either
  return *made;
}

// part(0) ... part(parts - 1) on so many threads of this process' own, or with the crew's help where that is at work.
template <typename F>
void in_parts(int64_t threads, int64_t parts, const F &part) {
  if (crew().at_work()) return crew().run(parts, part);
#pragma omp parallel for if (threads > 1) num_threads(int(threads)) schedule(dynamic)
  for (int64_t i = 0; i < parts; ++i) part(i);
}

// A thread's memory for a while, as much as was asked for last or more.  Its values are any.
template <typename T>
T *scratch(int64_t count) {
  static thread_local std::vector<T> room;
  if (int64_t(room.size()) < count) room.resize(count);
  return room.data();
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
constexpr int64_t TILE = 6;  // rows whose sums, with what they are multiplied by, fit into 32 registers

// How many of the rows that are left are computed at once.
inline int64_t at_once(int64_t left) { return left == 7 || left == 8 ? 4 : std::min(left, TILE); }

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

// Scores of R query heads against the keys of B blocks of WIDE: [R, B · WIDE], rows `stride` apart.  Meanwhile fetches
// the blocks `ahead`.
template <typename S, int R, int B>
void score_blocks(const S *const *keys, const S *const *ahead, const float *query, int64_t D, float *scores,
                  int64_t stride) {
  wide sum[R][B] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int b = 0; b < B; ++b) {
      const wide key = load_wide(keys[b] + d * WIDE);
      __builtin_prefetch(ahead[b] + d * WIDE);
      for (int r = 0; r < R; ++r) sum[r][b] += key * query[r * D + d];
    }
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * stride, &sum[r], sizeof sum[r]);
}

// The same for a block of any size.
template <typename S, int R>
void score_block(const S *keys, const float *query, int64_t D, int64_t size, float *scores, int64_t stride) {
  for (int r = 0; r < R; ++r) {
    float *row = scores + r * stride;
    std::fill(row, row + size, 0.0f);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t s = 0; s < size; ++s) row[s] += load(keys[d * size + s]) * query[r * D + d];
  }
}

// Adds to R sums [R, E] the values `from` ... `to` - 1 of one block by their weights.  Meanwhile fetches the block
// `ahead`.
template <typename S, int R>
void add_block(const S *values, const S *ahead, const float *weights, int64_t stride, int64_t from, int64_t to,
               int64_t E, float *sums) {
  constexpr int C = 4;  // columns at once
  int64_t e = 0;
  for (; e + C * WIDE <= E; e += C * WIDE) {
    wide sum[R][C];
    for (int r = 0; r < R; ++r) std::memcpy(&sum[r], sums + r * E + e, sizeof sum[r]);
    for (int64_t s = from; s < to; ++s)
      for (int c = 0; c < C; ++c) {
        const wide value = load_wide(values + s * E + e + c * WIDE);
        __builtin_prefetch(ahead + s * E + e + c * WIDE);
        for (int r = 0; r < R; ++r) sum[r][c] += value * weights[r * stride + s];
      }
    for (int r = 0; r < R; ++r) std::memcpy(sums + r * E + e, &sum[r], sizeof sum[r]);
  }
  for (int r = 0; r < R; ++r)
    for (int64_t s = from; s < to; ++s)
      for (int64_t i = e; i < E; ++i) sums[r * E + i] += weights[r * stride + s] * load(values[s * E + i]);
}

// A sequence's queries at one key-value head: row i is its token i / group of the step and query head i % group.
struct Queries {
  const int64_t *table;
  int64_t g, group, start, past;  // key-value head; query heads of it; first token; positions before the step's

  int64_t head(int64_t row) const { return g * group + row % group; }
  int64_t token(int64_t row) const { return start + row / group; }
  int64_t end(int64_t row) const { return past + row / group + 1; }  // of the positions that it sees
  int64_t begin(int64_t row, int64_t window) const { return window > 0 ? std::max<int64_t>(0, end(row) - window) : 0; }
};

// R rows from `row` on.  A row's result doesn't depend on the rows beside it: what they alone see gets no weight.
template <typename S, int R>
void attend_rows(const Attention &a, const Queries &of, int64_t row) {
  const int64_t D = a.key_width, E = a.value_width, size = a.block_size;
  const int64_t begin = of.begin(row, a.window), end = of.end(row + R - 1);  // of all rows
  const int64_t first = begin / size, last = (end + size - 1) / size, stride = (last - first) * size;
  float *scores = scratch<float>(R * (stride + D + E)), *query = scores + R * stride, *sums = query + R * D;
  const S *k_cache = static_cast<const S *>(a.k_cache), *v_cache = static_cast<const S *>(a.v_cache);
  for (int r = 0; r < R; ++r) {
    const S *q = static_cast<const S *>(a.q) + of.head(row + r) * a.q_head + of.token(row + r) * a.q_token;
    for (int64_t d = 0; d < D; ++d) query[r * D + d] = load(q[d]) * float(a.scale);
  }
  const auto keys = [&](int64_t b) { return k_cache + (of.table[b] * a.kv_heads + of.g) * D * size; };
  const auto values = [&](int64_t b) { return v_cache + (of.table[b] * a.kv_heads + of.g) * size * E; };
  const auto next = [&](int64_t b) { return b < last ? keys(b) : values(std::min(first + b - last, last - 1)); };
  for (int64_t b = first; b < last;) {
    float *to = scores + (b - first) * size;
    const S *here[] = {keys(b), next(b + 1)}, *ahead[] = {next(b + 2), next(b + 3)};
    if (size != WIDE) score_block<S, R>(here[0], query, D, size, to, stride);
    else if (b + 1 == last) score_blocks<S, R, 1>(here, ahead, query, D, to, stride);
    else score_blocks<S, R, 2>(here, ahead, query, D, to, stride);
    b += size == WIDE ? 2 : 1;
  }
  for (int r = 0; r < R; ++r) {
    const int64_t skip = of.begin(row + r, a.window) - first * size, seen = of.end(row + r) - first * size - skip;
    std::fill(scores + r * stride, scores + r * stride + skip, 0.0f);
    std::fill(scores + r * stride + skip + seen, scores + (r + 1) * stride, 0.0f);
    float *own = scores + r * stride + skip;
    if (a.softcap > 0)
      for (int64_t s = 0; s < seen; ++s) own[s] = float(a.softcap) * std::tanh(own[s] / float(a.softcap));
    float most = own[0], total = 0;
    for (int64_t s = 1; s < seen; ++s) most = std::max(most, own[s]);
    for (int64_t s = 0; s < seen; ++s) own[s] = exp_negative(own[s] - most);
    for (int64_t s = 0; s < seen; ++s) total += own[s];
    const float inverse = 1 / total;
    for (int64_t s = 0; s < seen; ++s) own[s] *= inverse;
  }
  std::fill(sums, sums + R * E, 0.0f);
  for (int64_t b = first; b < last; ++b) {  // behind the last values come the next group's keys
    const S *ahead = b + 2 < last ? values(b + 2) : keys(std::min(first + b + 2 - last, last - 1)) + D * size;
    add_block<S, R>(values(b), ahead, scores + (b - first) * size, stride, std::max<int64_t>(0, begin - b * size),
                    std::min(size, end - b * size), E, sums);
  }
  for (int r = 0; r < R; ++r) {
    S *out = static_cast<S *>(a.out) + (of.token(row + r) * a.heads + of.head(row + r)) * E;
    for (int64_t i = 0; i < E; ++i) store(out[i], sums[r * E + i]);
  }
}

// All tokens of sequence n and the query heads of key-value head g.
template <typename S>
void attend(const Attention &a, int64_t n, int64_t g) {
  const int64_t group = a.heads / a.kv_heads, count = a.starts[n + 1] - a.starts[n], rows = count * group;
  const Queries of{a.tables + n * a.table_width, g, group, a.starts[n], a.lengths[n] - count};
  for (int64_t row = 0; row < rows;) {
    const int64_t taken = at_once(rows - row);
    if (taken == 6) attend_rows<S, 6>(a, of, row);
    if (taken == 5) attend_rows<S, 5>(a, of, row);
    if (taken == 4) attend_rows<S, 4>(a, of, row);
    if (taken == 3) attend_rows<S, 3>(a, of, row);
    if (taken == 2) attend_rows<S, 2>(a, of, row);
    if (taken == 1) attend_rows<S, 1>(a, of, row);
    row += taken;
  }
}

template <typename S>
void run(const Attention &a) {
  write_cache<S>(a);
  in_parts(a.threads, a.sequences * a.kv_heads, [&a](int64_t job) {
    attend<S>(a, a.chosen[job / a.kv_heads], job % a.kv_heads);
  });
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

struct Add {  // a + b, all dense
  const void *a, *b;
  void *out;
  int64_t count;
};

struct Take {  // out[i] = x[index[i]], the rows of so many bytes; all dense
  const void *x;
  const int64_t *index;
  void *out;
  int64_t rows, count, bytes;
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

template <typename S>
void add(const Add &g) {
  const S *a = static_cast<const S *>(g.a), *b = static_cast<const S *>(g.b);
  for (int64_t i = 0; i < g.count; ++i) store(static_cast<S *>(g.out)[i], load(a[i]) + load(b[i]));
}

void take(const Take &t) {
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t row = std::min(std::max<int64_t>(t.index[i], 0), t.rows - 1);  // never outside of x
    std::memcpy(static_cast<char *>(t.out) + i * t.bytes, static_cast<const char *>(t.x) + row * t.bytes, t.bytes);
  }
}

}  // namespace

// -- the choice of tokens ----------------------------------------------------------------------------------------------

extern "C" {

struct Asked {  // of a row; what it means is in serving/request.py (Sampling) and serving/sampling.py
  double temperature, top_p, min_p, uniform, repetition_penalty, presence_penalty, frequency_penalty;
  int64_t top_k, logprobs, biases;  // logprobs: how many of the likeliest tokens; -1: not even the chosen one's
  const float *counts;              // [width] occurrences in the output, or null: no penalties
  const uint8_t *seen;              // [width]
  const int64_t *bias_tokens;
  const float *bias;
};

struct Choice {  // out[r] = token, log-probability, likeliest tokens, their log-probabilities; what isn't asked is left
  const void *logits;  // rows `stride` apart
  const Asked *asked;
  double *out;
  int64_t rows, stride, width, columns, threads;
};
}

namespace {

struct Candidate {
  float value;
  int32_t token;
};

// The likelier first, of equals the first.
inline bool before(const Candidate &a, const Candidate &b) {
  return a.value != b.value ? a.value > b.value : a.token < b.token;
}

template <typename S>
int64_t likeliest(const S *row, int64_t width) {
  constexpr int64_t PART = 1024;
  float most = load(row[0]);
  int64_t part = 0;  // where the largest first is, as far as it is known
  for (int64_t from = 0; from < width; from += PART) {
    const int64_t to = std::min(from + PART, width);
    float here = load(row[from]);
    for (int64_t i = from; i < to; ++i) here = std::max(here, load(row[i]));
    if (here > most) {
      most = here;
      part = from;
    }
  }
  int64_t i = part;
  while (i + 1 < width && load(row[i]) != most) ++i;
  return i;
}

// e[i] = exp((x[i] - the largest) · scale); the largest.
float exponentials(const float *x, int64_t width, float scale, float *e) {
  float most = x[0];
  for (int64_t i = 0; i < width; ++i) most = std::max(most, x[i]);
  for (int64_t i = 0; i < width; ++i) e[i] = exp_negative((x[i] - most) * scale);
  return most;
}

constexpr float MOST = std::numeric_limits<float>::max();
constexpr int64_t SUMMED = 512;  // values whose sum is a float

// Of those of the values that are at least `least`.
float sum(const float *x, int64_t count, float least) {
  float total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i] >= least ? x[i] : 0.0f;
  return total;
}

double sum_all(const float *x, int64_t count, float least = 0) {
  double total = 0;
  for (int64_t from = 0; from < count; from += SUMMED) total += sum(x + from, std::min(SUMMED, count - from), least);
  return total;
}

// The first index at which the sum so far exceeds this share of it all.
int64_t at_share(const float *x, int64_t count, double share) {
  double left = share * sum_all(x, count);
  int64_t from = 0;
  for (; from + SUMMED < count; from += SUMMED) {
    const double here = sum(x + from, SUMMED, 0);
    if (here > left) break;
    left -= here;
  }
  int64_t last = from;  // rounding at the very end
  for (int64_t i = from; i < std::min(from + SUMMED, count); ++i) {
    if (x[i] > left) return i;
    left -= x[i];
    if (x[i] > 0) last = i;
  }
  return last;
}

// Those of the values that are at least `least` and less than `end`, in their order; how many.
int64_t candidates(const float *x, int64_t width, float least, float end, Candidate *to) {
  int64_t count = 0;
  for (int64_t from = 0; from < width; from += 64) {
    const int64_t until = std::min(from + 64, width);
    int here = 0;
    for (int64_t i = from; i < until; ++i) here += x[i] >= least && x[i] < end;
    if (!here) continue;
    for (int64_t i = from; i < until; ++i) {
      to[count] = {x[i], int32_t(i)};
      count += x[i] >= least && x[i] < end;
    }
  }
  return count;
}

// The k largest of the values, in any order.  The k-th largest of the maxima of some groups is no more than the k-th
// largest of all, so few have to be looked at.
int64_t largest(const float *x, int64_t width, int64_t k, Candidate *to, float *maxima) {
  constexpr int64_t LANES = 16, STEPS = 16;
  const int64_t groups = width / (LANES * STEPS) * LANES;
  float least = -MOST;
  if (k <= groups) {
    for (int64_t g = 0; g < groups; g += LANES) {
      const float *from = x + g * STEPS;
      for (int64_t l = 0; l < LANES; ++l) maxima[g + l] = from[l];
      for (int64_t s = 1; s < STEPS; ++s)
        for (int64_t l = 0; l < LANES; ++l) maxima[g + l] = std::max(maxima[g + l], from[s * LANES + l]);
    }
    std::nth_element(maxima, maxima + k - 1, maxima + groups, std::greater<float>());
    least = maxima[k - 1];
  }
  const int64_t count = candidates(x, width, least, MOST, to);
  k = std::min(k, count);
  if (k < count) std::nth_element(to, to + k - 1, to + count, before);
  return k;
}

inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The last of the fewest values, from the largest on, that hold `mass`; of values from 0 to 1.
Candidate nucleus(const float *x, int64_t count, double mass, Candidate *edge) {
  constexpr uint32_t ONE = 0x3f800000, NEAR = 1 << 18;  // a 32nd of an octave
  uint32_t low = 0, high = ONE + 1;                     // the last one is from `low` on, and less than `high`
  double above = 0;                                     // what those hold that are `high` or more
  while (high - low > NEAR) {
    const uint32_t middle = low + (high - low) / 2;
    const double held = sum_all(x, count, of_bits(middle));
    if (held >= mass) {
      low = middle;
    } else {
      high = middle;
      above = held;
    }
  }
  const int64_t on_edge = candidates(x, count, of_bits(low), of_bits(high), edge);
  std::sort(edge, edge + on_edge, before);
  int64_t last = 0;
  while (last + 1 < on_edge && (above += edge[last].value) < mass) ++last;
  return edge[last];
}

// Where a row is computed: as many floats, and twice as many candidates, as it is wide.
struct Room {
  float *e;
  Candidate *kept, *spare;
};

// A token drawn by softmax(x / temperature), among those that top-k, then top-p, then min-p leave, in their order.
int64_t draw(const Asked &a, const float *x, int64_t width, const Room &room) {
  float *e = room.e;
  exponentials(x, width, float(1 / a.temperature), e);
  Candidate last{float(a.min_p), int32_t(width)};  // what isn't before it is left
  int64_t count = width;
  const bool some = a.top_k > 0 && a.top_k < width;
  if (some) {
    count = largest(e, width, a.top_k, room.kept, reinterpret_cast<float *>(room.spare));
    std::sort(room.kept, room.kept + count, [](const Candidate &p, const Candidate &q) { return p.token < q.token; });
    for (int64_t i = 0; i < count; ++i) e[i] = room.kept[i].value;
  }
  if (a.top_p < 1) {
    const Candidate by_mass = nucleus(e, count, a.top_p * sum_all(e, count), room.spare);
    if (before(by_mass, last)) last = by_mass;
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool keep = e[i] > last.value || (e[i] == last.value && int32_t(i) <= last.token);
    e[i] = keep ? e[i] : 0.0f;
  }
  const int64_t at = at_share(e, count, a.uniform);
  return some ? room.kept[at].token : at;
}

template <typename S>
void choose_row(const Choice &c, int64_t r) {
  const S *row = static_cast<const S *>(c.logits) + r * c.stride;
  const Asked &a = c.asked[r];
  double *out = c.out + r * c.columns;
  const int64_t width = c.width, most = (c.columns - 2) / 2;
  if (a.temperature == 0 && a.logprobs < 0 && !a.counts && !a.biases) {
    out[0] = double(likeliest(row, width));
    return;
  }
  float *x = scratch<float>(6 * width);
  Candidate *kept = reinterpret_cast<Candidate *>(x + 2 * width);
  const Room room{x + width, kept, kept + width};
  for (int64_t i = 0; i < width; ++i) x[i] = load(row[i]);
  double all = 0;  // log of the sum of the exponentials
  if (a.logprobs >= 0) {
    const float largest_x = exponentials(x, width, 1, room.e);
    all = largest_x + std::log(sum_all(room.e, width));
    if (a.logprobs > 0) {
      const int64_t count = largest(x, width, a.logprobs, kept, room.e);
      std::sort(kept, kept + count, before);
      for (int64_t i = 0; i < count; ++i) {
        out[2 + i] = kept[i].token;
        out[2 + most + i] = kept[i].value - all;
      }
    }
  }
  if (a.counts)
    for (int64_t i = 0; i < width; ++i) {
      const float repeated = x[i] > 0 ? x[i] / float(a.repetition_penalty) : x[i] * float(a.repetition_penalty);
      const float taken = float(a.frequency_penalty) * a.counts[i] + (a.counts[i] > 0 ? float(a.presence_penalty) : 0.0f);
      x[i] = (a.seen[i] ? repeated : x[i]) - taken;
    }
  for (int64_t i = 0; i < a.biases; ++i) x[a.bias_tokens[i]] += a.bias[i];
  const int64_t token = a.temperature == 0 ? likeliest(x, width) : draw(a, x, width, room);
  out[0] = double(token);
  if (a.logprobs >= 0) out[1] = load(row[token]) - all;
}

template <typename S>
void choose(const Choice &c) {
  in_parts(c.threads, c.rows, [&](int64_t r) { choose_row<S>(c, r); });
}

}  // namespace

// -- products with packed weights ------------------------------------------------------------------------------------

extern "C" {

struct PackedProduct {  // out [rows, outputs] = x [rows, inputs] · weightᵀ + bias
  const void *x;        // rows `stride` apart
  const void *weight;   // panels of PANEL outputs, filled up with zeros: float [panels, inputs, PANEL], or pairs of
                        // inputs, bf16 [panels, half the inputs, PANEL, 2]; inputs filled up to a multiple of `deep`
  const void *bias;     // [outputs], or null
  void *out;            // dense
  int64_t rows, stride, inputs, outputs, threads;
};
}

namespace {

constexpr int64_t PANEL = 64;
constexpr int PARTS = PANEL / WIDE;
constexpr int64_t BLOCK_BYTES = 1 << 18;  // of a panel that all rows meet before its next part is read: it stays in L2
constexpr int64_t AHEAD_BYTES = 1 << 12;
constexpr int64_t TILE_ROWS = 16, TILE_INPUTS = 32, TILE_BYTES = TILE_INPUTS * PANEL * 2;  // of matrix units
constexpr int64_t NEAR_BYTES = 1 << 15;              // as BLOCK_BYTES, for matrix units: it stays in L1

// Adds to a part's sums the products of two neighbouring inputs with their weights.
inline wide add_pair(wide sum, widened weights, const bf16 *x) {
  uint32_t pair;
  std::memcpy(&pair, x, sizeof pair);
#ifdef __AVX512BF16__
  return wide(_mm512_dpbf16_ps(__m512(sum), __m512bh(weights), __m512bh(_mm512_set1_epi32(int32_t(pair)))));
#else
  const widened even = weights << 16, odd = weights & 0xffff0000u;
  wide w[2];
  std::memcpy(&w[0], &even, sizeof even);
  std::memcpy(&w[1], &odd, sizeof odd);
  return sum + w[0] * load(x[0]) + w[1] * load(x[1]);
#endif
}

// The sums [P, R, PANEL] of R rows of x, inputs `from` ... `to` - 1 (an even number of bf16), against P panels, which are
// `apart` values from each other.
template <int R, int P>
void add_inputs(const float *x, int64_t stride, const float *panel, int64_t apart, int64_t from, int64_t to,
                wide (*sums)[R][PARTS]) {
  for (int64_t k = from; k < to; ++k)
    for (int p = 0; p < P; ++p)
      for (int c = 0; c < PARTS; ++c) {
        const float *at = panel + p * apart + k * PANEL + c * WIDE;
        const wide w = load_wide(at);
        __builtin_prefetch(reinterpret_cast<const char *>(at) + AHEAD_BYTES / P);
        for (int r = 0; r < R; ++r) sums[p][r][c] += w * x[r * stride + k];
      }
}
template <int R, int P>
void add_inputs(const bf16 *x, int64_t stride, const bf16 *panel, int64_t apart, int64_t from, int64_t to,
                wide (*sums)[R][PARTS]) {
  for (int64_t k = from; k < to; k += 2)
    for (int p = 0; p < P; ++p)
      for (int c = 0; c < PARTS; ++c) {
        const bf16 *at = panel + p * apart + k * PANEL + 2 * c * WIDE;
        widened w;
        std::memcpy(&w, at, sizeof w);
        __builtin_prefetch(reinterpret_cast<const char *>(at) + AHEAD_BYTES / P);
        for (int r = 0; r < R; ++r) sums[p][r][c] = add_pair(sums[p][r][c], w, x + r * stride + k);
      }
}

// R rows of x, inputs `from` ... `to` - 1, against P panels: begins or goes on with sums [P, R, PANEL], those of a panel
// `room` from the last one's.  A row's result depends on neither R nor P: its products are added in the order of the
// inputs.
template <typename S, int R, int P>
void packed_rows(const S *x, int64_t stride, const S *panel, int64_t apart, int64_t from, int64_t to, float *sums,
                 int64_t room) {
  wide sum[P][R][PARTS] = {};
  if (from > 0)
    for (int p = 0; p < P; ++p) std::memcpy(sum[p], sums + p * room, sizeof sum[p]);
  add_inputs<R, P>(x, stride, panel, apart, from, to, sum);
  for (int p = 0; p < P; ++p) std::memcpy(sums + p * room, sum[p], sizeof sum[p]);
}

// All rows against a part of one panel.
template <typename S>
void meet(const PackedProduct &p, const S *x, int64_t stride, const S *panel, int64_t from, int64_t to, float *sums) {
  for (int64_t r = 0; r < p.rows;) {
    const int64_t taken = at_once(p.rows - r);
    const S *rows = x + r * stride;
    float *sum = sums + r * PANEL;
    if (taken == 6) packed_rows<S, 6, 1>(rows, stride, panel, 0, from, to, sum, 0);
    if (taken == 5) packed_rows<S, 5, 1>(rows, stride, panel, 0, from, to, sum, 0);
    if (taken == 4) packed_rows<S, 4, 1>(rows, stride, panel, 0, from, to, sum, 0);
    if (taken == 3) packed_rows<S, 3, 1>(rows, stride, panel, 0, from, to, sum, 0);
    if (taken == 2) packed_rows<S, 2, 1>(rows, stride, panel, 0, from, to, sum, 0);
    if (taken == 1) packed_rows<S, 1, 1>(rows, stride, panel, 0, from, to, sum, 0);
    r += taken;
  }
}

#ifdef MATRIX_UNITS
// Whether this process may use the processor's matrix units (AMX): Linux grants them to those that ask.
bool matrix_units() {
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return granted;
}

// While it lives, this thread's tiles are eight of 16 rows of 64 bytes: 16 floats, or 32 of bf16.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// 16 rows of x, inputs `from` ... `to` - 1, multiples of TILE_INPUTS, against a panel: begins or goes on with sums.
// Meanwhile fetches `ahead`, so many lines for every four tiles.
void tile_rows(const bf16 *x, int64_t stride, const bf16 *panel, int64_t from, int64_t to, float *sums,
               const char *ahead, int64_t lines) {
  constexpr int64_t LINE = PANEL * sizeof(float);
  const auto fetch = [&ahead, quarter = (lines + 3) / 4] {
    for (int64_t i = 0; i < quarter; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  };
  if (from > 0) {
    _tile_loadd(0, sums, LINE);
    _tile_loadd(1, sums + WIDE, LINE);
    _tile_loadd(2, sums + 2 * WIDE, LINE);
    _tile_loadd(3, sums + 3 * WIDE, LINE);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = from; k < to; k += TILE_INPUTS) {
    const bf16 *at = panel + k * PANEL;
    _tile_loadd(4, x + k, stride * sizeof(bf16));
    fetch();
    _tile_loadd(5, at, LINE);
    _tile_dpbf16ps(0, 4, 5);
    fetch();
    _tile_loadd(6, at + 2 * WIDE, LINE);
    _tile_dpbf16ps(1, 4, 6);
    fetch();
    _tile_loadd(7, at + 4 * WIDE, LINE);
    _tile_dpbf16ps(2, 4, 7);
    fetch();
    _tile_loadd(5, at + 6 * WIDE, LINE);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, LINE);
  _tile_stored(1, sums + WIDE, LINE);
  _tile_stored(2, sums + 2 * WIDE, LINE);
  _tile_stored(3, sums + 3 * WIDE, LINE);
}
#else
bool matrix_units() { return false; }
struct Tiles {
  Tiles() {}
};
void tile_rows(const bf16 *, int64_t, const bf16 *, int64_t, int64_t, float *, const char *, int64_t) {}
#endif

// How many inputs a packed weight has a multiple of.
template <typename S>
int64_t deep() {
  return sizeof(S) == sizeof(float) ? 1 : matrix_units() ? TILE_INPUTS : 2;
}

// What a product's sums become: out [rows, outputs], from its output `first` on.
template <typename S>
void give(const PackedProduct &p, int64_t first, const float *sums) {
  const S *bias = p.bias ? static_cast<const S *>(p.bias) + first : nullptr;
  const int64_t wanted = std::min(PANEL, p.outputs - first);
  for (int64_t r = 0; r < p.rows; ++r, sums += PANEL) {
    S *out = static_cast<S *>(p.out) + r * p.outputs + first;
    if (bias)
      for (int64_t j = 0; j < wanted; ++j) store(out[j], sums[j] + load(bias[j]));
    else if (wanted == PANEL)
      for (int64_t j = 0; j < PANEL; ++j) store(out[j], sums[j]);
    else
      for (int64_t j = 0; j < wanted; ++j) store(out[j], sums[j]);
  }
}

int64_t filled_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// x, filled up with zeros to so many rows and inputs where it has less, and then its rows' distance is `inputs`.
template <typename S>
const S *filled_up(const PackedProduct &p, int64_t rows, int64_t inputs, std::vector<S> &room) {
  const S *x = static_cast<const S *>(p.x);
  if (rows == p.rows && inputs == p.inputs) return x;
  room.resize(rows * inputs, S{});
  for (int64_t r = 0; r < p.rows; ++r) std::copy_n(x + r * p.stride, p.inputs, room.data() + r * inputs);
  return room.data();
}

// With AVX-512.
template <typename S>
void packed_product(const PackedProduct &p) {
  const int64_t inputs = filled_up(p.inputs, deep<S>());
  std::vector<S> filled;
  const S *x = filled_up(p, p.rows, inputs, filled), *weight = static_cast<const S *>(p.weight);
  const int64_t stride = filled.empty() ? p.stride : inputs;
  const int64_t panels = (p.outputs + PANEL - 1) / PANEL, half = (panels + 1) / 2;
  const int64_t apart = half * PANEL * inputs, room = p.rows * PANEL;
  // Few rows: then reading is what takes time, and memory gives more to two readings at once.
  const bool pairs = p.rows < 4 && !crew().at_work();
  const int64_t block = p.rows > TILE ? BLOCK_BYTES / int64_t(sizeof(S)) / PANEL : inputs;
  in_parts(p.threads, pairs ? half : panels, [&](int64_t n) {
    float *sums = scratch<float>(2 * room);
    const S *panel = weight + n * PANEL * inputs;
    const int64_t count = pairs && n + half < panels ? 2 : 1;
    if (count == 2) {
      if (p.rows == 3) packed_rows<S, 3, 2>(x, stride, panel, apart, 0, inputs, sums, room);
      if (p.rows == 2) packed_rows<S, 2, 2>(x, stride, panel, apart, 0, inputs, sums, room);
      if (p.rows == 1) packed_rows<S, 1, 2>(x, stride, panel, apart, 0, inputs, sums, room);
    } else {
      for (int64_t from = 0; from < inputs; from += block)
        meet(p, x, stride, panel, from, std::min(from + block, inputs), sums);
    }
    for (int64_t i = 0; i < count; ++i) give<S>(p, (n + i * half) * PANEL, sums + i * room);
  });
}

// With matrix units.  A row's result doesn't depend on the rows beside it here either.
void tiled_product(const PackedProduct &p) {
  const int64_t rows = filled_up(p.rows, TILE_ROWS), inputs = filled_up(p.inputs, TILE_INPUTS);
  std::vector<bf16> filled;
  const bf16 *x = filled_up(p, rows, inputs, filled), *weight = static_cast<const bf16 *>(p.weight);
  const int64_t stride = filled.empty() ? p.stride : inputs;
  const int64_t panels = (p.outputs + PANEL - 1) / PANEL, passes = rows / TILE_ROWS;
  const int64_t block = passes > 1 ? NEAR_BYTES / int64_t(sizeof(bf16)) / PANEL : inputs;
  in_parts(p.threads, panels, [&](int64_t n) {
    const Tiles tiles;
    float *sums = scratch<float>(rows * PANEL);
    const bf16 *panel = weight + n * PANEL * inputs;
    for (int64_t from = 0; from < inputs; from += block) {
      // One pass reads what it fetches soon after; of several, each fetches a part of the next block.
      const int64_t to = std::min(from + block, inputs), bytes = (to - from) * PANEL * sizeof(bf16);
      const char *ahead = reinterpret_cast<const char *>(panel + from * PANEL) + (passes > 1 ? bytes : AHEAD_BYTES);
      for (int64_t i = 0; i < passes; ++i)
        tile_rows(x + i * TILE_ROWS * stride, stride, panel, from, to, sums + i * TILE_ROWS * PANEL,
                  ahead + i * bytes / passes, (TILE_BYTES / 64 + passes - 1) / passes);
    }
    give<bf16>(p, n * PANEL, sums);
  });
}

}  // namespace

// -- products with int8 weights --------------------------------------------------------------------------------------

extern "C" {

struct Product {  // out [rows, outputs] = x [rows, inputs] · weightᵀ + bias; all dense
  const void *x;
  const int8_t *values;    // [outputs, inputs], zero in the outliers' columns
  const float *scales;     // [outputs]
  const void *outliers;    // bf16 [outlying, outputs], rows `stride` apart
  const int64_t *columns;  // [outlying]
  const void *bias;        // [outputs], or null
  void *out;
  int64_t rows, inputs, outputs, outlying, stride, threads;
};
}

namespace {

typedef int8_t bytes __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
constexpr int64_t DEEP = 64;   // inputs that one step takes
constexpr int ACROSS = 4;      // outputs of one tile
constexpr int64_t CHUNK = 64;  // outputs whose weights all rows meet before the next ones' are read
constexpr int64_t NEAR = 32;   // steps after which the next outputs take their turn, so that rows of x stay in L1
constexpr int64_t FAR = 1024;  // as many as a 32-bit sum has room for
constexpr float LARGEST = 127 * 257;

// Integers of 16 bit, each as two signed digits to the base 256.
struct alignas(64) Digits {
  int8_t high[DEEP], low[DEEP];
};

struct Rows {  // of x
  int64_t steps;                // of a row
  std::vector<Digits> digits;   // [rows, steps]: x / scale, filled up with zeros
  std::vector<float> scale;     // [rows]
  std::vector<int64_t> sum;     // [rows], of the integers
  std::vector<float> outlying;  // [rows, outlying]: x in the outliers' columns, where the integers are zero
};

template <typename S>
void to_digits(const Product &p, int64_t r, Rows &to) {
  float *row = scratch<float>(to.steps * DEEP);
  std::fill(row + p.inputs, row + to.steps * DEEP, 0.0f);
  const S *x = static_cast<const S *>(p.x) + r * p.inputs;
  for (int64_t k = 0; k < p.inputs; ++k) row[k] = load(x[k]);
  for (int64_t o = 0; o < p.outlying; ++o) {
    to.outlying[r * p.outlying + o] = row[p.columns[o]];
    row[p.columns[o]] = 0;
  }
  float most = 0;
  for (int64_t k = 0; k < p.inputs; ++k) most = std::max(most, std::fabs(row[k]));
  const bool some = most > 1e-30f;
  const float inverse = some ? LARGEST / most : 0;
  to.sum[r] = 0;
  for (int64_t s = 0; s < to.steps; ++s) {
    int32_t sum = 0;
    Digits &d = to.digits[r * to.steps + s];
    for (int64_t k = 0; k < DEEP; ++k) {
      const int32_t v = int32_t(std::nearbyint(row[s * DEEP + k] * inverse));
      d.low[k] = int8_t(v);
      d.high[k] = int8_t((v - int8_t(v)) >> 8);
      sum += v;
    }
    to.sum[r] += sum;
  }
  to.scale[r] = some ? most / LARGEST : 0;
}

// Adds 64 products of an unsigned and a signed byte, each to one of the sums.
inline integers add_products(integers sums, bytes w, bytes x) {
#ifdef __AVX512VNNI__
  return integers(_mm512_dpbusd_epi32(__m512i(sums), __m512i(w), __m512i(x)));
#else
  typedef uint8_t unsigned_part __attribute__((vector_size(16)));
  typedef int8_t signed_part __attribute__((vector_size(16)));
  for (int i = 0; i < 4; ++i) {
    unsigned_part a;
    signed_part b;
    std::memcpy(&a, reinterpret_cast<const char *>(&w) + 16 * i, 16);
    std::memcpy(&b, reinterpret_cast<const char *>(&x) + 16 * i, 16);
    sums += __builtin_convertvector(a, integers) * __builtin_convertvector(b, integers);
  }
  return sums;
#endif
}

typedef int32_t four __attribute__((vector_size(16)));

// The total of each of four vectors, which are transposed four by four on the way.
inline four totals(integers a, integers b, integers c, integers d) {
  const auto pair = [](integers x, integers y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const integers ab = pair(a, b), cd = pair(c, d);
  const integers abcd = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                        __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  four quarter[4];
  std::memcpy(quarter, &abcd, sizeof abcd);
  return quarter[0] + quarter[1] + quarter[2] + quarter[3];
}

// R rows of x, from `row` on, against ACROSS outputs, the weights of which begin at w, in the steps `from` ... `to` - 1:
// adds the sums of products of integers to `out`.
template <int R>
void multiply(const Rows &x, int64_t row, const int8_t *const *w, int64_t inputs, int64_t from, int64_t to,
              int64_t (*out)[CHUNK]) {
  // The next outputs' weights are fetched ahead: in the order in which they lie, where they are used whole.
  const bool all = to - from == x.steps;
  const int8_t *ahead = w[0] + ACROSS * inputs;
  const int64_t ahead_step = all ? ACROSS * DEEP : DEEP, ahead_output = all ? DEEP : inputs;
  integers high[R][ACROSS] = {}, low[R][ACROSS] = {};
  bytes last[ACROSS] = {};  // of a step that isn't whole
  const int64_t whole = inputs / DEEP;
  for (int c = 0; c < ACROSS; ++c) std::memcpy(&last[c], w[c] + whole * DEEP, inputs % DEEP);
  for (int64_t s = from; s < to; ++s) {
    bytes weight[ACROSS];
#pragma GCC unroll 4
    for (int c = 0; c < ACROSS; ++c) {
      const void *values = s < whole ? static_cast<const void *>(w[c] + s * DEEP) : &last[c];
      std::memcpy(&weight[c], values, DEEP);
      weight[c] ^= int8_t(-128);  // w + 128, which is from 1 to 255
      __builtin_prefetch(ahead + s * ahead_step + c * ahead_output);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Digits &digits = x.digits[(row + r) * x.steps + s];
      bytes h, l;
      std::memcpy(&h, digits.high, DEEP);
      std::memcpy(&l, digits.low, DEEP);
#ifdef __AVX512VNNI__
      __asm__("" : "+v"(h), "+v"(l));  // else they are loaded again for every c
#endif
#pragma GCC unroll 4
      for (int c = 0; c < ACROSS; ++c) {
        high[r][c] = add_products(high[r][c], weight[c], h);
        low[r][c] = add_products(low[r][c], weight[c], l);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const four h = totals(high[r][0], high[r][1], high[r][2], high[r][3]);
    const four l = totals(low[r][0], low[r][1], low[r][2], low[r][3]);
    for (int c = 0; c < ACROSS; ++c) out[r][c] += 256 * int64_t(h[c]) + l[c];
  }
}

// Sixteen values, or if there are fewer, those and zeros.
template <typename S>
inline wide load_some(const S *x, int64_t count) {
  if (count >= WIDE) return load_wide(x);
  S some[WIDE] = {};
  std::memcpy(some, x, count * sizeof(S));
  return load_wide(some);
}

// Row `row` of the product from output `first` on: what the sums of products of integers become.
template <typename S>
void finish(const Product &p, const Rows &x, int64_t row, int64_t first, int64_t count, const float *sums) {
  const S *bias = static_cast<const S *>(p.bias);
  const bf16 *outliers = static_cast<const bf16 *>(p.outliers) + first;
  const float *outlying = x.outlying.data() + row * p.outlying;
  S *out = static_cast<S *>(p.out) + row * p.outputs + first;
  for (int64_t n = 0; n < count; n += WIDE) {
    const int64_t left = count - n;
    wide y = load_wide(sums + n) * (load_some(p.scales + first + n, left) * x.scale[row]);
    for (int64_t o = 0; o < p.outlying; ++o) y += load_some(outliers + o * p.stride + n, left) * outlying[o];
    if (bias) y += load_some(bias + first + n, left);
    float made[WIDE];
    std::memcpy(made, &y, sizeof y);
    for (int64_t i = 0; i < std::min(left, WIDE); ++i) store(out[n + i], made[i]);
  }
}

// R rows of x against the outputs from `first` on, `count` of them.
template <typename S, int R>
void product_rows(const Product &p, const Rows &x, int64_t row, int64_t first, int64_t count) {
  const bf16 *outliers = static_cast<const bf16 *>(p.outliers) + first;
  for (int64_t o = 0; o < p.outlying; ++o)
    for (int64_t n = 0; n < count; n += 32) __builtin_prefetch(outliers + o * p.stride + n);
  const int64_t block = p.rows > R ? NEAR : FAR;
  int64_t sums[R][CHUNK] = {};
  for (int64_t from = 0; from < x.steps; from += block)
    for (int64_t n = 0; n < count; n += ACROSS) {
      const int8_t *w[ACROSS];
      for (int c = 0; c < ACROSS; ++c) w[c] = p.values + std::min(first + n + c, p.outputs - 1) * p.inputs;
      const int64_t to = std::min(from + block, x.steps);
      multiply<R>(x, row, w, p.inputs, from, to, reinterpret_cast<int64_t(*)[CHUNK]>(&sums[0][n]));
    }
  for (int r = 0; r < R; ++r) {
    float made[CHUNK];
    for (int64_t i = 0; i < CHUNK; ++i) made[i] = float(sums[r][i] - 128 * x.sum[row + r]);
    finish<S>(p, x, row + r, first, count, made);
  }
}

constexpr int64_t MANY = 8;  // rows from which on matrix units are faster

// The digits of 16 rows at one step as a matrix unit takes them: [DEEP / 4, rows, 4].
struct alignas(64) Tile {
  int8_t high[DEEP / 4][TILE_ROWS][4] = {}, low[DEEP / 4][TILE_ROWS][4] = {};
};

void to_tile(const Digits &digits, int64_t row, Tile &to) {
  for (int64_t k = 0; k < DEEP / 4; ++k) {
    std::memcpy(to.high[k][row], digits.high + 4 * k, 4);
    std::memcpy(to.low[k][row], digits.low + 4 * k, 4);
  }
}

#ifdef MATRIX_UNITS
// Sums of products of integers, of 16 rows of x with 32 outputs, the weights of which begin at `values`, in so many steps:
// high and low digits' [32, 16].  Fetches the weights a few steps ahead.
void add_in_tiles(const int8_t *values, int64_t inputs, const Tile *x, int64_t steps, int32_t (*high)[TILE_ROWS],
                  int32_t (*low)[TILE_ROWS]) {
  constexpr int64_t LINE = TILE_ROWS * sizeof(int32_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const int8_t *at = values + s * DEEP;
    for (int64_t i = 0; i < 2 * TILE_ROWS; ++i) __builtin_prefetch(at + i * inputs + 4 * DEEP);
    _tile_loadd(4, at, inputs);
    _tile_loadd(6, x[s].high, LINE);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, x[s].low, LINE);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, at + TILE_ROWS * inputs, inputs);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, high, LINE);
  _tile_stored(1, low, LINE);
  _tile_stored(2, high + TILE_ROWS, LINE);
  _tile_stored(3, low + TILE_ROWS, LINE);
}
#else
void add_in_tiles(const int8_t *, int64_t, const Tile *, int64_t, int32_t (*)[TILE_ROWS], int32_t (*)[TILE_ROWS]) {}
#endif

// All rows against the outputs from `first` on, at most 32.  The sums are the same as `multiply`'s, being of integers.
template <typename S>
void product_in_tiles(const Product &p, const Rows &x, const std::vector<Tile> &tiles, int64_t first) {
  const Tiles shape;
  constexpr int64_t OUTPUTS = 2 * TILE_ROWS;
  const int64_t count = std::min(OUTPUTS, p.outputs - first), whole = p.inputs / DEEP;
  const int8_t *values = p.values + first * p.inputs;
  int64_t stride = p.inputs;
  if (count < OUTPUTS || whole < x.steps) {  // filled up with zeros
    stride = x.steps * DEEP;
    int8_t *filled = scratch<int8_t>(OUTPUTS * stride);
    std::fill(filled, filled + OUTPUTS * stride, 0);
    for (int64_t n = 0; n < count; ++n) std::copy_n(values + n * p.inputs, p.inputs, filled + n * stride);
    values = filled;
  }
  for (int64_t row = 0; row < p.rows; row += TILE_ROWS) {
    int64_t sums[TILE_ROWS][OUTPUTS] = {};
    for (int64_t from = 0; from < x.steps; from += FAR) {
      alignas(64) int32_t high[OUTPUTS][TILE_ROWS], low[OUTPUTS][TILE_ROWS];
      const Tile *at = tiles.data() + row / TILE_ROWS * x.steps + from;
      add_in_tiles(values + from * DEEP, stride, at, std::min(FAR, x.steps - from), high, low);
      for (int64_t n = 0; n < OUTPUTS; ++n)
        for (int64_t r = 0; r < TILE_ROWS; ++r) sums[r][n] += 256 * int64_t(high[n][r]) + low[n][r];
    }
    for (int64_t r = 0; r < std::min(TILE_ROWS, p.rows - row); ++r) {
      float made[OUTPUTS];
      for (int64_t n = 0; n < OUTPUTS; ++n) made[n] = float(sums[r][n]);
      finish<S>(p, x, row + r, first, count, made);
    }
  }
}

// All rows against the outputs from `first` on, at most CHUNK.
template <typename S>
void product_in_rows(const Product &p, const Rows &x, int64_t first) {
  const int64_t count = std::min(CHUNK, p.outputs - first);
  for (int64_t r = 0, left = p.rows; left > 0;) {
    const int64_t taken = left == 4 ? 2 : std::min<int64_t>(left, 3);
    if (taken == 3) product_rows<S, 3>(p, x, r, first, count);
    if (taken == 2) product_rows<S, 2>(p, x, r, first, count);
    if (taken == 1) product_rows<S, 1>(p, x, r, first, count);
    r += taken;
    left -= taken;
  }
}

template <typename S>
void product(const Product &p) {
  const bool in_tiles = p.rows >= MANY && matrix_units();
  Rows x;
  x.steps = (p.inputs + DEEP - 1) / DEEP;
  x.digits.resize(p.rows * x.steps);
  x.scale.resize(p.rows);
  x.sum.resize(p.rows);
  x.outlying.resize(p.rows * p.outlying);
  std::vector<Tile> tiles(in_tiles ? filled_up(p.rows, TILE_ROWS) / TILE_ROWS * x.steps : 0);
  in_parts(p.threads, p.rows, [&](int64_t r) {
    to_digits<S>(p, r, x);
    for (int64_t s = 0; in_tiles && s < x.steps; ++s)
      to_tile(x.digits[r * x.steps + s], r % TILE_ROWS, tiles[r / TILE_ROWS * x.steps + s]);
  });
  const int64_t outputs = in_tiles ? 2 * TILE_ROWS : CHUNK;
  in_parts(p.threads, (p.outputs + outputs - 1) / outputs, [&](int64_t i) {
    if (in_tiles) product_in_tiles<S>(p, x, tiles, i * outputs);
    else product_in_rows<S>(p, x, i * outputs);
  });
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
void add_float32(const Add *a) { add<float>(*a); }
void add_bfloat16(const Add *a) { add<bf16>(*a); }
void take_float32(const Take *a) { take(*a); }
void take_bfloat16(const Take *a) { take(*a); }
void choose_float32(const Choice *a) { choose<float>(*a); }
void choose_bfloat16(const Choice *a) { choose<bf16>(*a); }
// Whether these kernels' packed products are the fastest there are here: with narrower registers the tiles don't fit.
#ifdef __AVX512F__
int packs() { return 1; }
#else
int packs() { return 0; }
#endif
int64_t deep_float32() { return deep<float>(); }
int64_t deep_bfloat16() { return deep<bf16>(); }
void packed_float32(const PackedProduct *a) { packed_product<float>(*a); }
void packed_bfloat16(const PackedProduct *a) { matrix_units() ? tiled_product(*a) : packed_product<bf16>(*a); }
void product_float32(const Product *a) { product<float>(*a); }
void product_bfloat16(const Product *a) { product<bf16>(*a); }


// Threads on cores that are free as long as this process computes between `begin_help` and `end_help`.
void hire(const int64_t *cores, int64_t count) { crew().hire(cores, count); }
void begin_help() { crew().begin(); }
void end_help() { crew().end(); }

// Plays a tape (native/tape.py): calls, each of a kernel's address, how many words its structure has, and for each of
// these a base, a number that is added to it, and what is added for every token and for every row of the step.
void play(const int64_t *tape, int64_t length, const int64_t *bases, int64_t tokens, int64_t rows) {
  for (const int64_t *end = tape + length; tape < end;) {
    const auto kernel = reinterpret_cast<void (*)(const void *)>(tape[0]);
    int64_t words[64];
    const int64_t count = tape[1];
    tape += 2;
    for (int64_t i = 0; i < count; ++i, tape += 4) words[i] = bases[tape[0]] + tape[1] + tape[2] * tokens + tape[3] * rows;
    kernel(words);
  }
}
}
