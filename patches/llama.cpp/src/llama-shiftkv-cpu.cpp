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

// keys whose numbers are converted at a time
static constexpr int64_t STRIP_KEYS = 48;

#if defined(SHIFTKV_CPU)

// of L queries (lanes) of a KV head
struct strip_data {
    const char    * keys; // of the KV head: the first
    size_t          nb_key;
    ggml_type       type;
    ggml_to_float_t to_float; // null for F32

    int64_t d;
    int64_t n_kv;
    float   soft_cap;
    float   last_min; // the least of last

    const float * order;   // [n_kv]
    const float * queries; // [d][L]
    const float * last;    // [L] a query sees the tokens before this
    const float * used;    // [L] 1, or 0 where there is no query

    float * tile;   // [STRIP_KEYS][row]
    float * logits; // [n_kv + STRIP_KEYS][L]
};

struct strip_functions {
    void (*of_16)     (const strip_data & s, float * out);
    void (*of_32)     (const strip_data & s, float * out);
    void (*of_16_wide)(const strip_data & s, float * out);
    void (*of_32_wide)(const strip_data & s, float * out);
};

static constexpr int64_t ROW      = 272; // of a tile, for heads of up to 256 numbers: another set of the cache for each
static constexpr int64_t ROW_WIDE = 528; // up to 512

#pragma GCC diagnostic ignored "-Wpsabi"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of _mm512_undefined_ps()
#endif

#define SHIFTKV_ISA    plain
#define SHIFTKV_TARGET
#define SHIFTKV_WIDTH  4
#define SHIFTKV_KEYS   4
#include "llama-shiftkv-cpu-strip.h"

#if defined(SHIFTKV_X86)

#define SHIFTKV_ISA    avx2
#define SHIFTKV_TARGET __attribute__((target("avx2,fma,f16c")))
#define SHIFTKV_WIDTH  8
#define SHIFTKV_KEYS   6
#include "llama-shiftkv-cpu-strip.h"

#define SHIFTKV_ISA    avx512
#define SHIFTKV_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define SHIFTKV_WIDTH  16
#define SHIFTKV_KEYS   12
#include "llama-shiftkv-cpu-strip.h"

#endif

static const strip_functions & get_functions() {
#if defined(SHIFTKV_X86)
    const char * isa = getenv("LLAMA_SHIFTKV_ISA"); // for tests
    if (isa == nullptr || strcmp(isa, "avx512") == 0) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
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
    return d <= 512 && ggml_row_size(k->type, d) > 0 && d % ggml_blck_size(k->type) == 0 && (k->type == GGML_TYPE_F32 || ggml_get_type_traits(k->type)->to_float);
}

static int64_t row_of(const llama_shiftkv_cpu_job & job) {
    return job.d <= 256 ? ROW : ROW_WIDE;
}

// numbers that a thread needs room for: tile, queries, two for each lane, sums of a group, logits
static int64_t thread_size(const llama_shiftkv_cpu_job & job, int64_t n_lane) {
    return STRIP_KEYS*row_of(job) + job.d*n_lane + 2*n_lane + job.n_kv + (job.n_kv + STRIP_KEYS)*n_lane;
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

    const bool wide = row_of(job) == ROW_WIDE;

    strip_data s;
    s.nb_key   = k->nb[1];
    s.keys     = (const char *) k->data + job.c0*k->nb[1] + h*ggml_row_size(k->type, job.d);
    s.type     = k->type;
    s.to_float = ggml_get_type_traits(k->type)->to_float;
    if (k->type == GGML_TYPE_F32) {
        s.to_float = nullptr;
    }
    s.d        = job.d;
    s.n_kv     = job.n_kv;
    s.soft_cap = job.soft_cap;
    s.order    = order;

    s.tile          = room;
    float * queries = s.tile + STRIP_KEYS*row_of(job);

    for (int64_t x0 = begin; x0 < end; ) {
        const int64_t n_lane = end - x0 > 16 && n_max == 32 ? 32 : 16;
        const int64_t n      = std::min(n_lane, end - x0);

        float * last = queries + job.d*n_lane;
        float * used = last + n_lane;
        s.logits     = used + n_lane;

        memset(queries, 0, job.d*n_lane*sizeof(float));
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
                for (int64_t e = 0; e < job.d; ++e) {
                    queries[e*n_lane + x] = from[e];
                }
            }
            s.last_min = std::min(s.last_min, last[x]);
        }
        s.queries = queries;
        s.last    = last;
        s.used    = used;

        if (n_lane == 32) {
            (wide ? functions.of_32_wide : functions.of_32)(s, out);
        } else {
            (wide ? functions.of_16_wide : functions.of_16)(s, out);
        }
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

ggml_tensor * llama_shiftkv_cpu_sums(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, llama_shiftkv_cpu_job &, int) {
    return nullptr;
}

ggml_tensor * llama_shiftkv_cpu_votes(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, llama_shiftkv_cpu_job &, int) {
    return nullptr;
}

#endif
