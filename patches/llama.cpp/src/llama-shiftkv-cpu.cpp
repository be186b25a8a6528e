#include "llama-shiftkv-cpu.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__GNUC__)
#define SHIFTKV_CPU
#endif

#if defined(SHIFTKV_CPU) && defined(__x86_64__)
#define SHIFTKV_X86
#include <immintrin.h>
#endif

// what the threads' strips may take in all
static constexpr size_t STRIPS_BYTES = 32*1024*1024;

// what the keys may take as integers; they stay as they are where those of one head take more
static constexpr size_t PAIRS_BYTES = 16*1024*1024;

// keys whose numbers are converted at a time
static constexpr int64_t STRIP_KEYS = 48;

#if defined(SHIFTKV_CPU)

// of L queries (lanes) of a KV head
struct strip_data {
    const char    * keys; // of the KV head: the first, or the first block of pairs
    size_t          nb_key;
    ggml_type       type;
    ggml_to_float_t to_float; // null for F32

    int64_t d;
    int64_t n_kv;
    float   soft_cap;
    float   last_min; // the least of last

    const float * order;   // [n_kv]
    const float * queries; // [d][L], or pairs [n_pair][L]
    const float * scales;  // [L] what products of pairs are to be multiplied with
    const float * last;    // [L] a query sees the tokens before this
    const float * used;    // [L] 1, or 0 where there is no query

    float * tile;   // [STRIP_KEYS][row]
    float * logits; // [n_kv + STRIP_KEYS][L]
};

enum strip_kind { PAIRS, NARROW, WIDE };

struct strip_functions {
    int64_t n_key; // in a block of pairs

    // null where pairs are not multiplied
    void  (*pack_keys)(const char * keys, size_t nb_key, int64_t n, ggml_type type, ggml_to_float_t to_float, int64_t d, float * row, int32_t * out);
    float (*pack)     (const float * x, int64_t d, int32_t * out, int64_t step);

    void (*strips[2][3])(const strip_data & s, float * out); // of 16 and 32 lanes, by kind
};

static constexpr int64_t D_MAX    = 512;
static constexpr int64_t ROW      = 272; // of a tile, for heads of up to 256 numbers: another set of the cache for each
static constexpr int64_t ROW_WIDE = 528; // up to D_MAX

// pairs of a key or query, some of zeros
static constexpr int64_t n_pair(int64_t d) {
    return (d + 15)/16*8;
}

#pragma GCC diagnostic ignored "-Wpsabi"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized" // of _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define SHIFTKV_ISA    plain
#define SHIFTKV_TARGET
#define SHIFTKV_WIDTH  4
#define SHIFTKV_KEYS   4
#define SHIFTKV_PAIRS  0
#include "llama-shiftkv-cpu-strip.h"

#if defined(SHIFTKV_X86)

#define SHIFTKV_ISA    avx2
#define SHIFTKV_TARGET __attribute__((target("avx2,fma,f16c")))
#define SHIFTKV_WIDTH  8
#define SHIFTKV_KEYS   6
#define SHIFTKV_PAIRS  0
#include "llama-shiftkv-cpu-strip.h"

#define SHIFTKV_ISA    avx512
#define SHIFTKV_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define SHIFTKV_WIDTH  16
#define SHIFTKV_KEYS   12
#define SHIFTKV_PAIRS  0
#include "llama-shiftkv-cpu-strip.h"

#define SHIFTKV_ISA    vnni
#define SHIFTKV_TARGET __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define SHIFTKV_WIDTH  16
#define SHIFTKV_KEYS   12
#define SHIFTKV_PAIRS  1
#include "llama-shiftkv-cpu-strip.h"

#endif

static const strip_functions & get_functions() {
#if defined(SHIFTKV_X86)
    const char * isa = getenv("LLAMA_SHIFTKV_ISA"); // for tests
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if ((isa == nullptr || strcmp(isa, "vnni") == 0) && __builtin_cpu_supports("avx512vnni")) {
            return vnni::functions;
        }
        if (isa == nullptr || strcmp(isa, "avx512") == 0) {
            return avx512::functions;
        }
    }
    if (isa == nullptr || strcmp(isa, "avx2") == 0) {
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
            return avx2::functions;
        }
    }
#endif
    return plain::functions;
}

bool llama_shiftkv_cpu_supports(const ggml_tensor * k, int64_t d) {
    return d <= D_MAX && ggml_row_size(k->type, d) > 0 && d % ggml_blck_size(k->type) == 0 && (k->type == GGML_TYPE_F32 || ggml_get_type_traits(k->type)->to_float);
}

static int64_t row_of(const llama_shiftkv_cpu_job & job) {
    return job.d <= 256 ? ROW : ROW_WIDE;
}

// numbers that a thread needs room for: tile, queries, three for each lane, sums of a group, logits
static int64_t thread_size(const llama_shiftkv_cpu_job & job, int64_t n_lane) {
    return STRIP_KEYS*row_of(job) + job.d*n_lane + 3*n_lane + job.n_kv + (job.n_kv + STRIP_KEYS)*n_lane;
}

static ggml_to_float_t to_float_of(ggml_type type) {
    return type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits(type)->to_float;
}

// room for some threads: [thread_size, threads]
static ggml_tensor * new_room(ggml_context * ctx, const llama_shiftkv_cpu_job & job, int n_thread) {
    const int64_t n_lane = n_thread*thread_size(job, 32)*sizeof(float) <= STRIPS_BYTES ? 32 : 16;
    const int64_t size   = thread_size(job, n_lane);

    ggml_tensor * room = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, size, std::clamp<int64_t>(STRIPS_BYTES/(size*sizeof(float)), 1, n_thread));
    ggml_set_input(room);
    return room;
}

// adds the weights of some lanes of a group to out
static void add_lanes(const llama_shiftkv_cpu_job & job, const ggml_tensor * k, const ggml_tensor * q, const float * order, float * room, int64_t n_max,
        int64_t h, int64_t g, int64_t begin, int64_t end, float * out) {
    const auto & functions = get_functions();

    const strip_kind kind = k->type == GGML_TYPE_I32 ? PAIRS : job.d <= 256 ? NARROW : WIDE;

    strip_data s;
    s.nb_key   = k->nb[1];
    s.keys     = (const char *) k->data + h*k->nb[2];
    s.type     = k->type;
    s.to_float = to_float_of(k->type);
    s.d        = job.d;
    s.n_kv     = job.n_kv;
    s.soft_cap = job.soft_cap;
    s.order    = order;

    float row[D_MAX];
    memset(row + job.d, 0, (D_MAX - job.d)*sizeof(float));

    s.tile          = room;
    float * queries = s.tile + STRIP_KEYS*row_of(job);

    for (int64_t x0 = begin; x0 < end; ) {
        const int64_t n_lane = end - x0 > 16 && n_max == 32 ? 32 : 16;
        const int64_t n      = std::min(n_lane, end - x0);

        float * scales = queries + job.d*n_lane;
        float * last   = scales + n_lane;
        float * used   = last + n_lane;
        s.logits       = used + n_lane;

        if (n < n_lane) {
            memset(queries, 0, (job.d + 1)*n_lane*sizeof(float));
        }
        s.last_min = job.n_prompt;
        for (int64_t x = 0; x < n_lane; ++x) {
            used[x] = x < n ? 1.0f : 0.0f;
            last[x] = job.n_prompt;
            if (x < n) {
                const int64_t j    = (job.g0 + g)*job.n_per + (x0 + x) % job.n_per;
                const int64_t head = h*job.n_gqa + (x0 + x)/job.n_per;
                if (job.causal) {
                    last[x] = job.n_prompt - job.n_per*job.n_group + j + 1;
                }
                const float * from = (const float *) ((const char *) q->data + j*q->nb[1] + head*q->nb[2]);
                if (kind == PAIRS) {
                    if (job.d % 16 != 0) {
                        from = (const float *) memcpy(row, from, job.d*sizeof(float));
                    }
                    scales[x] = functions.pack(from, job.d, (int32_t *) queries + x, n_lane);
                } else {
                    for (int64_t e = 0; e < job.d; ++e) {
                        queries[e*n_lane + x] = from[e];
                    }
                }
            }
            s.last_min = std::min(s.last_min, last[x]);
        }
        s.queries = queries;
        s.scales  = scales;
        s.last    = last;
        s.used    = used;

        functions.strips[n_lane == 32][kind](s, out);
        x0 += n;
    }
}

// the least mass of the smallest set that holds a share of all of it, as bits: those of positive numbers are in the numbers' order.
// the sums of the numbers by their upper bits show where it is, then those by the next ones
static uint32_t find_least(const float * mass, int64_t n, double share) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        total += mass[i];
    }

    double   above  = 0.0; // the mass of numbers with a higher prefix
    uint32_t prefix = 0;
    int      shift  = 31;

    for (const int n_bit : { 11, 11, 9 }) {
        double   sums[2048] = {};
        uint32_t n_sums     = 1u << n_bit;
        for (int64_t i = 0; i < n; ++i) {
            uint32_t bits;
            memcpy(&bits, mass + i, sizeof(bits));
            if (bits >> shift == prefix) {
                sums[(bits >> (shift - n_bit)) & (n_sums - 1)] += mass[i];
            }
        }
        shift -= n_bit;

        // rounding may leave a little less than the share: then all of them
        uint32_t found = 0;
        for (uint32_t i = n_sums; i-- > 0; ) {
            if (sums[i] > 0.0) {
                found = i;
                if (above + sums[i] >= share*total) {
                    break;
                }
                above += sums[i];
            }
        }
        prefix = (prefix << n_bit) | found;
    }
    return std::max<uint32_t>(prefix, 1); // what has no mass is in no set
}

static void compute_pairs(ggml_tensor * dst, int ith, int nth, void *) {
    const auto & functions = get_functions();
    const auto * k         = dst->src[0];

    float row[D_MAX] = {};

    const int64_t n = dst->ne[1]*dst->ne[2];
    for (int64_t u = n*ith/nth; u < n*(ith + 1)/nth; ++u) {
        const int64_t h = u/dst->ne[1];
        const int64_t i = u % dst->ne[1]*functions.n_key;
        const char  * first = (const char *) k->data + h*k->nb[2] + i*k->nb[1];
        const int64_t n_key = std::min(functions.n_key, k->ne[1] - i);
        functions.pack_keys(first, k->nb[1], n_key, k->type, to_float_of(k->type), k->ne[0], row,
                (int32_t *) ((char *) dst->data + u*dst->nb[1]));
    }
}

static void compute_sums(ggml_tensor * dst, int ith, int, void * data) {
    auto & job = *(llama_shiftkv_cpu_job *) data;

    const auto * order = (const float *) dst->src[2]->data;
    auto       * room  = dst->src[3];
    if (ith >= room->ne[1]) {
        return;
    }
    float       * own   = (float *) ((char *) room->data + ith*room->nb[1]);
    const int64_t n_max = room->ne[0] == thread_size(job, 32) ? 32 : 16;

    for (int64_t u; (u = job.next++) < job.n_head_kv*job.n_part; ) {
        const int64_t h = u/job.n_part;
        const int64_t p = u % job.n_part;

        float * out = (float *) ((char *) dst->data + u*dst->nb[1]);
        memset(out, 0, job.n_kv*sizeof(float));
        add_lanes(job, dst->src[0], dst->src[1], order, own, n_max, h, 0, job.n_lane()*p/job.n_part, job.n_lane()*(p + 1)/job.n_part, out);
    }
}

// bits of the keys in each group's set: [n_kv/32, n_group, n_head_kv]
static void compute_sets(ggml_tensor * dst, int ith, int, void * data) {
    auto & job = *(llama_shiftkv_cpu_job *) data;

    const auto * order = (const float *) dst->src[2]->data;
    auto       * room  = dst->src[3];
    if (ith >= room->ne[1]) {
        return;
    }
    float       * mass  = (float *) ((char *) room->data + ith*room->nb[1]);
    float       * own   = mass + job.n_kv;
    const int64_t n_max = room->ne[0] == thread_size(job, 32) ? 32 : 16;

    for (int64_t u; (u = job.next++) < job.n_head_kv*job.n_group; ) {
        const int64_t h = u/job.n_group;
        const int64_t g = u % job.n_group;

        memset(mass, 0, job.n_kv*sizeof(float));
        add_lanes(job, dst->src[0], dst->src[1], order, own, n_max, h, g, 0, job.n_lane(), mass);

        const auto * last = (const float *) ((const char *) dst->src[4]->data + h*dst->src[4]->nb[1]);
        const float  n_q  = 1 + job.n_per;
        for (int64_t i = 0; i < job.n_kv; ++i) {
            mass[i] = order[i] < job.n_prompt - 1 ? mass[i]/(job.n_gqa*n_q) + last[i]/n_q : 0.0f;
        }

        const uint32_t least = find_least(mass, job.n_kv, job.share);

        auto * out = (uint32_t *) ((char *) dst->data + u*dst->nb[1]);
        for (int64_t i0 = 0; i0 < job.n_kv; i0 += 32) {
            uint32_t word = 0;
            for (int64_t i = i0; i < std::min(i0 + 32, job.n_kv); ++i) {
                uint32_t bits;
                memcpy(&bits, mass + i, sizeof(bits));
                word |= (uint32_t) (bits >= least) << (i - i0);
            }
            out[i0/32] = word;
        }
    }
}

static void compute_votes(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & job  = *(const llama_shiftkv_cpu_job *) data;
    const auto * sets = dst->src[1]; // after what it is a view of
    const auto * base = dst->src[2];

    const int64_t n = job.n_head_kv*sets->ne[0];
    for (int64_t iw = n*ith/nth; iw < n*(ith + 1)/nth; ++iw) {
        const int64_t h  = iw/sets->ne[0];
        const int64_t i0 = iw % sets->ne[0]*32;

        const int64_t n_key = std::min<int64_t>(32, job.n_kv - i0);

        float votes[32] = {};
        memcpy(votes, (const char *) base->data + h*base->nb[1] + i0*sizeof(float), n_key*sizeof(float));
        for (int64_t g = 0; g < job.n_group; ++g) {
            const uint32_t word = *(const uint32_t *) ((const char *) sets->data + h*sets->nb[2] + g*sets->nb[1] + i0/32*sizeof(uint32_t));
            for (int i = 0; i < 32; ++i) {
                votes[i] += (word >> i) & 1;
            }
        }
        memcpy((char *) dst->data + h*dst->nb[1] + i0*sizeof(float), votes, n_key*sizeof(float));
    }
}

// words of a KV head's keys as pairs: of a block, and how many blocks
static std::pair<int64_t, int64_t> pairs_size(int64_t d, int64_t n_kv) {
    const int64_t n_key = get_functions().n_key;
    return { (n_pair(d) + 1)*n_key, (n_kv + n_key - 1)/n_key };
}

static bool has_pairs(int64_t d, int64_t n_kv) {
    const auto [n_word, n_block] = pairs_size(d, n_kv);
    return get_functions().pack && d >= 8 && n_word*n_block*sizeof(int32_t) <= PAIRS_BYTES;
}

int64_t llama_shiftkv_cpu_n_head(int64_t d, int64_t n_kv, int64_t n_head_kv) {
    const auto [n_word, n_block] = pairs_size(d, n_kv);
    return has_pairs(d, n_kv) ? std::min<int64_t>(PAIRS_BYTES/(n_word*n_block*sizeof(int32_t)), n_head_kv) : n_head_kv;
}

ggml_tensor * llama_shiftkv_cpu_pairs(ggml_context * ctx, ggml_tensor * k) {
    if (!has_pairs(k->ne[0], k->ne[1])) {
        return k;
    }
    const auto [n_word, n_block] = pairs_size(k->ne[0], k->ne[1]);
    return ggml_custom_4d(ctx, GGML_TYPE_I32, n_word, n_block, k->ne[2], 1, &k, 1, compute_pairs, GGML_N_TASKS_MAX, nullptr);
}

ggml_tensor * llama_shiftkv_cpu_sums(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, ggml_tensor * order, llama_shiftkv_cpu_job & job, int n_thread) {
    ggml_tensor * args[] = { k, q, order, new_room(ctx, job, n_thread) };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, job.n_kv, job.n_part, job.n_head_kv, 1, args, 4, compute_sums, GGML_N_TASKS_MAX, &job);
}

ggml_tensor * llama_shiftkv_cpu_votes(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, ggml_tensor * order, ggml_tensor * last, ggml_tensor * base, ggml_tensor * to, llama_shiftkv_cpu_job & job, int n_thread) {
    ggml_tensor * args[] = { k, q, order, new_room(ctx, job, n_thread), last };
    ggml_tensor * sets   = ggml_custom_4d(ctx, GGML_TYPE_I32, (job.n_kv + 31)/32, job.n_group, job.n_head_kv, 1, args, 5, compute_sets, GGML_N_TASKS_MAX, &job);

    ggml_tensor * summands[] = { sets, base };
    return ggml_custom_inplace(ctx, to, summands, 2, compute_votes, GGML_N_TASKS_MAX, &job);
}

#else

bool llama_shiftkv_cpu_supports(const ggml_tensor *, int64_t) {
    return false;
}

int64_t llama_shiftkv_cpu_n_head(int64_t, int64_t, int64_t n_head_kv) {
    return n_head_kv;
}

ggml_tensor * llama_shiftkv_cpu_pairs(ggml_context *, ggml_tensor * k) {
    return k;
}

ggml_tensor * llama_shiftkv_cpu_sums(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, llama_shiftkv_cpu_job &, int) {
    return nullptr;
}

ggml_tensor * llama_shiftkv_cpu_votes(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, llama_shiftkv_cpu_job &, int) {
    return nullptr;
}

#endif
