// Attention of decode steps over paged K/V on CPU, reading keys and values where they lie; see attention_native.py.
//
//   q      [sequences, kv_heads * group, key_dim]        one query for each sequence
//   pages  [pages, page_elements]                        a page: [kv_heads, page_size, key_dim], then V likewise
//   table  [sequences, table_width]                      page ids of each sequence, in order
//   out    [sequences, kv_heads * group, value_dim]
//
// One task is one K/V head of one sequence. It goes page by page with a running softmax: what a page adds is scaled to
// the largest score so far, so nothing of a sequence's length is ever kept. Sums are float32 whatever the pages hold.
// Standard C++ with OpenMP, no header of torch: it compiles in a second or two.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void narrow(float x, float* out) { *out = x; }

inline void narrow(float x, bfloat16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // To the nearest, ties to even; a NaN stays one.
    out->bits = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) for x <= 0, within 2e-7 of itself; vectorises, unlike std::exp.
inline float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer: the shift leaves no bit for a fraction
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t power = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

constexpr int kMaxGroup = 32;    // query heads that share a K/V head
constexpr int kMaxDim = 512;
constexpr int kMaxPage = 512;    // tokens; refused above in Python

struct Step {
    const int64_t* table;
    int64_t table_width;
    const int64_t* ends;  // [sequences]: keys [0, end) are visible, unless a window hides the first of them
    int64_t kv_heads, group, key_dim, value_dim, page_size, page_elements;
    int64_t window;  // 0: none
    float scaling;
    float softcap;  // 0: none
    const float* sinks;  // [kv_heads * group] or null
};

// DIM 0: the dimension is known at run time only. Known ones keep a row in registers.
template <typename T, int DIM>
void one_head(const Step& step, const T* q, const T* pages, const int64_t* table, int64_t end, int64_t head, T* out) {
    const int64_t key_dim = DIM ? DIM : step.key_dim, value_dim = DIM ? DIM : step.value_dim;
    const int64_t size = step.page_size, group = step.group;
    const int64_t first = step.window && end > step.window ? end - step.window : 0;
    alignas(64) float query[kMaxGroup][DIM ? DIM : kMaxDim];
    alignas(64) float sum[kMaxGroup][DIM ? DIM : kMaxDim];
    alignas(64) float score[kMaxPage];
    float largest[kMaxGroup], total[kMaxGroup];
    for (int64_t g = 0; g < group; ++g) {
        for (int64_t d = 0; d < key_dim; ++d) query[g][d] = widen(q[g * key_dim + d]) * step.scaling;
        for (int64_t d = 0; d < value_dim; ++d) sum[g][d] = 0.0f;
        largest[g] = step.sinks ? step.sinks[head * group + g] : -std::numeric_limits<float>::infinity();
        total[g] = step.sinks ? 1.0f : 0.0f;
    }
    for (int64_t page = first / size; page * size < end; ++page) {
        const T* memory = pages + table[page] * step.page_elements;
        const T* keys = memory + head * size * key_dim;
        const T* values = memory + step.kv_heads * size * key_dim + head * size * value_dim;
        const int64_t low = first > page * size ? first - page * size : 0;
        const int64_t high = end < (page + 1) * size ? end - page * size : size;
        for (int64_t g = 0; g < group; ++g) {
            float new_largest = largest[g];
            for (int64_t t = low; t < high; ++t) {
                const T* key = keys + t * key_dim;
                float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < key_dim; ++d) dot += query[g][d] * widen(key[d]);
                score[t] = step.softcap != 0.0f ? step.softcap * std::tanh(dot / step.softcap) : dot;
            }
            for (int64_t t = low; t < high; ++t) new_largest = score[t] > new_largest ? score[t] : new_largest;
            if (new_largest > largest[g]) {
                const float shrink = exp_of_negative(largest[g] - new_largest);
                total[g] *= shrink;
                for (int64_t d = 0; d < value_dim; ++d) sum[g][d] *= shrink;
                largest[g] = new_largest;
            }
            float added = 0.0f;
#pragma omp simd reduction(+ : added)
            for (int64_t t = low; t < high; ++t) {
                score[t] = exp_of_negative(score[t] - new_largest);
                added += score[t];
            }
            total[g] += added;
            for (int64_t t = low; t < high; ++t) {
                const T* value = values + t * value_dim;
                const float weight = score[t];
#pragma omp simd
                for (int64_t d = 0; d < value_dim; ++d) sum[g][d] += weight * widen(value[d]);
            }
        }
    }
    for (int64_t g = 0; g < group; ++g)
        for (int64_t d = 0; d < value_dim; ++d) narrow(sum[g][d] / total[g], out + g * value_dim + d);
}

template <typename T, int DIM>
void all_heads(const Step& step, const T* q, const T* pages, T* out, int64_t sequences, int threads) {
    const int64_t heads = step.kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < sequences * heads; ++task) {
        const int64_t n = task / heads, head = task % heads;
        one_head<T, DIM>(step, q + task * step.group * step.key_dim, pages, step.table + n * step.table_width,
                         step.ends[n], head, out + task * step.group * step.value_dim);
    }
}

template <typename T>
void attend(const Step& step, const void* q, const void* pages, void* out, int64_t sequences, int threads) {
    const T* queries = static_cast<const T*>(q);
    const T* memory = static_cast<const T*>(pages);
    T* result = static_cast<T*>(out);
    const int64_t dim = step.key_dim == step.value_dim ? step.key_dim : 0;
    if (dim == 64) all_heads<T, 64>(step, queries, memory, result, sequences, threads);
    else if (dim == 128) all_heads<T, 128>(step, queries, memory, result, sequences, threads);
    else all_heads<T, 0>(step, queries, memory, result, sequences, threads);
}

}  // namespace

extern "C" void prfaas_paged_attention(const void* q, const void* pages, void* out, const int64_t* table,
                                       int64_t table_width, const int64_t* ends, int64_t sequences, int64_t kv_heads,
                                       int64_t group, int64_t key_dim, int64_t value_dim, int64_t page_size,
                                       int64_t window, float scaling, float softcap, const float* sinks,
                                       int32_t is_bfloat16, int32_t threads) {
    const Step step{table,     table_width, ends,    kv_heads, group,   key_dim, value_dim,
                    page_size, kv_heads * page_size * (key_dim + value_dim), window, scaling, softcap, sinks};
    if (is_bfloat16) attend<bfloat16>(step, q, pages, out, sequences, threads);
    else attend<float>(step, q, pages, out, sequences, threads);
}
