// Sums of centred observations and of their products, for x86-64 processors with AVX2 or AVX-512.
//
// Adds sum_i (x_i - o) and the upper triangle of sum_i (x_i - o)(x_i - o)' to float64 sums. Observations are
// read from the memory of the layer's output. Some rows at a time are centred, checked for NaN and infinities
// and stored as panels; a panel has as many features as a vector register has lanes. A tile of the triangle
// then stays in registers while it takes up all rows, so that memory is touched once. Products are made in
// float64, or in float32 over at most `chunk_rows` rows before they are added in float64.
//
// This file plans the work and picks the instruction set; the arithmetic is in accumulate.hpp. The fallback in
// PyTorch is in src/spectralmetrics/sums/accumulate.py, which calls this file through
// src/spectralmetrics/sums/compiled.py if it can.

#include <cpuid.h>
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#define PUBLIC __attribute__((visibility("default")))

extern "C" {

// One call; mirrored in compiled.py. Strides count elements. Observation i = (sample, position), positions
// fastest, has its feature j at values[sample * sample_stride + position * position_stride + j *
// feature_stride].
struct Job {
    const void *values;          // float, or double if values_are_double
    const unsigned char *valid;  // per observation, 0 to skip it; null if all count
    const double *origin;        // (features)
    double *first;               // (features), added to
    double *second;              // (features, features), upper triangle added to, lower left in any state
    int64_t *count;              // added to: observations that count
    int64_t *non_finite;         // added to: observations left out for a NaN or an infinity
    void *workspace;             // workspace_bytes() bytes, 64-byte aligned, any content
    int64_t samples, positions, features;
    int64_t sample_stride, position_stride, feature_stride;
    int32_t values_are_double, products_are_float;  // not both
    int32_t threads;
    int32_t instructions;  // 1 AVX2, 2 AVX-512; at most best_instructions()
};

// One call of `measure`; mirrored in compiled.py, and strides as in Job.
struct MarginalsJob {
    const void *values;          // float, or double if values_are_double
    const unsigned char *valid;  // per observation, 0 to skip it; null if all count
    const double *origin;        // (features)
    double *totals;     // (5, features): sums of x - o, its squares, |x|, of x != 0, and the largest |x|
    int64_t *counts;    // (2), added to: observations that count, and observations left out
    double *workspace;  // (slots, 10, features), any content
    int64_t samples, positions, features;
    int64_t sample_stride, position_stride, feature_stride;
    int32_t values_are_double;
    int32_t slots;         // shares of the rows, one for each thread; at most most_slots
    int32_t instructions;  // as in Job
};

// Calls a function with the same argument on several threads at once, as GOMP_parallel of OpenMP does.
typedef void Parallel(void (*)(void *), void *, unsigned threads, unsigned flags);
}

namespace {

constexpr int64_t chunk_rows = 256;        // rows of a panel that fits the first cache
constexpr int64_t packed_at_once = 32;     // rows that a thread claims while packing
constexpr int64_t block_panels = 24;       // panels that fit the second cache
constexpr int64_t rows_ahead = 4;          // rows that are fetched while another one is packed
constexpr int64_t features_by_rows = 256;  // most features for which threads may have sums of their own
constexpr int64_t most_by_rows = 512;      // the same, if the rows are enough for all threads
constexpr int64_t chunks_per_slot = 4;     // with fewer, adding up such sums costs too much
constexpr int64_t most_slots = 48;
constexpr int64_t most_sums_bytes = 1 << 25;  // memory of all such sums

// The position of an observation.
struct Place {
    int64_t sample, position;

    Place(const Job &job, int64_t row) : sample(row / job.positions), position(row % job.positions) {}

    void advance(const Job &job, int64_t rows) {  // not beyond the next sample's first
        position += rows;
        if (position == job.positions) {
            position = 0;
            ++sample;
        }
    }

    int64_t offset(const Job &job) const { return sample * job.sample_stride + position * job.position_stride; }
};

using Counter = std::atomic<int64_t>;

// Two counters for each kind of work on some rows: one counts the pieces that threads claim, one those done.
struct alignas(64) Chunk {
    Counter packing{0}, packed{0}, scaling{0}, scaled{0}, multiplying{0}, multiplied{0};
    Counter largest{0};  // bits of the largest magnitude
};

// Data that the threads share. Even one thread alone does all the work.
struct Team {
    const Job *job;
    int64_t rows, chunks;
    int64_t panels, stride;  // of panels, in elements
    int64_t slots;           // shares of the rows, each but the first with sums of its own; 0 to share tiles
    int64_t buffers;         // of packed rows
    Counter slot{0}, slots_done{0}, stripe{0};
    Counter kept{0}, lost{0}, overflowed{0};
    Chunk *states;
    char *high, *low, *packed, *sums;
    int64_t packed_bytes, sums_bytes;
};

void wait(const Counter &counter, int64_t target) {
    for (int spins = 0; counter.load(std::memory_order_acquire) < target; ++spins) {
        if (spins < 4096)
            __builtin_ia32_pause();
        else
            sched_yield();
    }
}

constexpr int64_t rows_at_once = 128;        // rows whose marginals are summed before they are checked
constexpr int64_t values_at_once = 1 << 16;  // values that fit the second cache

// Data that the threads share when they measure marginals.
struct MarginalsTeam {
    const MarginalsJob *job;
    Counter slot{0};
    int64_t counts[most_slots][2];
};

#define INLINE __attribute__((always_inline)) TARGET inline

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#include "accumulate.hpp"
#include "marginals.hpp"
#undef TARGET
#undef VECTOR_BYTES
#undef TILE_ROWS
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#include "accumulate.hpp"
#include "marginals.hpp"
}  // namespace avx512

#include "draw.hpp"

template <typename Source>
void measure_in_shares(const MarginalsJob &job, Parallel *parallel) {
    MarginalsTeam team;
    team.job = &job;
    const bool is_wide = job.instructions == 2;
    void (*work)(void *) = is_wide ? avx512::Marginals<Source>::work : avx2::Marginals<Source>::work;
    if (parallel && job.slots > 1)
        parallel(work, &team, job.slots, 0);
    else
        work(&team);
    (is_wide ? avx512::Marginals<Source>::collect : avx2::Marginals<Source>::collect)(team);
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Lay out the workspace; return its size.
int64_t plan(const Job &job, Team &team) {
    const int64_t size = job.products_are_float ? sizeof(float) : sizeof(double);
    const int64_t lanes = (job.instructions == 2 ? 64 : 32) / size;
    team.job = &job;
    team.rows = job.samples * job.positions;
    team.chunks = (team.rows + chunk_rows - 1) / chunk_rows;
    team.panels = (job.features + lanes - 1) / lanes;
    team.stride = (chunk_rows + 1) * lanes;  // neighbouring panels fall into different sets of the cache
    team.packed_bytes = aligned(team.panels * team.stride * size);
    team.sums_bytes = aligned((job.features + 1) * job.features * sizeof(double));
    team.slots = std::min({int64_t(job.threads), team.chunks / chunks_per_slot, most_slots});
    const int64_t sums = std::max<int64_t>(team.slots - 1, 0) * team.sums_bytes;
    const int64_t widest = team.slots < job.threads ? features_by_rows : most_by_rows;
    if (team.slots < 2 || job.features > widest || sums > most_sums_bytes) team.slots = 0;
    const int64_t states = team.slots ? 0 : team.chunks * sizeof(Chunk);
    const int64_t origin = aligned(team.panels * lanes * size);
    // Several threads: one packs the next rows while others multiply. One thread stays within the second cache.
    team.buffers = team.slots ? team.slots : job.threads > 1 ? 2 : 1;
    char *memory = static_cast<char *>(job.workspace);
    team.states = reinterpret_cast<Chunk *>(memory);
    team.high = memory + states;
    team.low = team.high + origin;
    team.packed = team.low + origin;
    team.sums = team.packed + team.buffers * team.packed_bytes;
    return states + 2 * origin + team.buffers * team.packed_bytes + (team.slots ? sums : 0);
}

// The origin in the products' type, and the rest that its rounding lost.
template <typename Real>
void split_origin(const Team &team) {
    std::memset(team.high, 0, team.packed - team.high);
    Real *high = reinterpret_cast<Real *>(team.high), *low = reinterpret_cast<Real *>(team.low);
    for (int64_t j = 0; j < team.job->features; ++j) {
        high[j] = Real(team.job->origin[j]);
        low[j] = Real(team.job->origin[j] - high[j]);
    }
}

template <typename Real, typename Source>
void run(Team &team, Parallel *parallel) {
    split_origin<Real>(team);
    void (*work)(void *) = avx2::Sums<Real, Source>::work;
    if (team.job->instructions == 2) work = avx512::Sums<Real, Source>::work;
    if (parallel && team.job->threads > 1)
        parallel(work, &team, team.job->threads, 0);
    else
        work(&team);
}

}  // namespace

extern "C" {

// Increase this with every change of the declarations here.
PUBLIC int interface_version() { return 4; }

PUBLIC int best_instructions() {
    // Not by __builtin_cpu_supports: linked with the run-time library of Zig it returns 0 for everything.
    constexpr unsigned fma = bit_FMA | bit_OSXSAVE;
    constexpr unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512VL | bit_AVX512BW;
    unsigned eax, ebx, ecx, edx, unused, saved;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & fma) != fma) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2)) return 0;
    // The system must save the registers too: bits 1 and 2 stand for AVX, bits 5 to 7 for AVX-512.
    asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    if ((saved & 0x06) != 0x06) return 0;
    return (ebx & wide) == wide && (saved & 0xe0) == 0xe0 ? 2 : 1;
}

PUBLIC int64_t workspace_bytes(const Job *job) {
    Team team;
    return plan(*job, team);
}

PUBLIC void accumulate(const Job *job, Parallel *parallel) {
    Team team;
    plan(*job, team);
    for (int64_t chunk = 0; chunk < (team.slots ? 0 : team.chunks); ++chunk) new (team.states + chunk) Chunk;
    if (job->products_are_float)
        run<float, float>(team, parallel);
    else if (job->values_are_double)
        run<double, double>(team, parallel);
    else
        run<double, float>(team, parallel);
    *job->count += team.kept;
    *job->non_finite += team.lost;
    if (team.overflowed) job->second[0] = INFINITY;  // reading the sums reports it
}

PUBLIC void measure(const MarginalsJob *job, Parallel *parallel) {
    if (job->values_are_double)
        measure_in_shares<double>(*job, parallel);
    else
        measure_in_shares<float>(*job, parallel);
}

// The positions of the drawn observations, see draw.hpp.
PUBLIC void draw_places(uint32_t seed, int64_t total, int64_t number, int64_t turn, int64_t *places) {
    draw_from_arcs(seed, total, number, turn, [=](int64_t arc, int64_t place) { places[arc] = place; });
}

// The same observations themselves, from contiguous rows of equal length in bytes.
PUBLIC void draw_rows(uint32_t seed, int64_t total, int64_t number, int64_t turn, const char *rows,
                      int64_t bytes, char *drawn) {
    draw_from_arcs(seed, total, number, turn, [=](int64_t arc, int64_t place) {
        std::memcpy(drawn + arc * bytes, rows + place * bytes, bytes);
    });
}
}
