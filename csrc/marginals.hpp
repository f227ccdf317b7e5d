// Measures each feature on its own, in one pass: the arithmetic of `measure` in accumulate.cpp, which includes
// this once for each instruction set, in a namespace of its own, with TARGET and VECTOR_BYTES defined.

// The marginals of some observations. Sums are float64, whatever the type of the observations.
template <typename Source>
struct Marginals {
    static constexpr int lanes = VECTOR_BYTES / sizeof(double);
    static constexpr int tile_vectors = VECTOR_BYTES == 64 ? 4 : 2;  // their accumulators fit the registers

    typedef double Vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(double)), may_alias));
    typedef int64_t Bits __attribute__((vector_size(VECTOR_BYTES), may_alias));

    // Intrinsics, where plain vectors would take several instructions.
#if VECTOR_BYTES == 64
    INLINE static Vector widened(const float *from) { return (Vector)_mm512_cvtps_pd(_mm256_loadu_ps(from)); }
    INLINE static Vector larger(Vector most, Vector value) {
        return (Vector)_mm512_max_pd((__m512d)most, (__m512d)value);
    }
    INLINE static Vector with_nonzero(Vector number, Vector value) {
        const auto is_nonzero = _mm512_cmp_pd_mask((__m512d)value, _mm512_setzero_pd(), _CMP_NEQ_UQ);
        return (Vector)_mm512_mask_add_pd((__m512d)number, is_nonzero, (__m512d)number, _mm512_set1_pd(1));
    }
#else
    INLINE static Vector widened(const float *from) { return (Vector)_mm256_cvtps_pd(_mm_loadu_ps(from)); }
    INLINE static Vector larger(Vector most, Vector value) {
        return (Vector)_mm256_max_pd((__m256d)most, (__m256d)value);
    }
    INLINE static Vector with_nonzero(Vector number, Vector value) {
        return number + (Vector)((Bits)(Vector{} + 1) & (Bits)(value != Vector{}));
    }
#endif
    INLINE static Vector widened(const double *from) { return *(const Unaligned *)from; }

    // Sums of as many features as a vector has lanes, or of one feature in as many shares.
    struct Sums {
        Vector first{}, squares{}, absolute{}, nonzero{}, most{};

        INLINE void add(const Source *from, Vector origin) {
            const Vector value = widened(from), moved = value - origin,
                         magnitude = (Vector)((Bits)value & (Bits{} + std::numeric_limits<int64_t>::max()));
            first += moved;
            squares += moved * moved;
            absolute += magnitude;
            nonzero = with_nonzero(nonzero, value);
            most = larger(most, magnitude);
        }
    };

    // Sums of one feature, for values that do not fill a vector.
    struct Single {
        double first = 0, squares = 0, absolute = 0, nonzero = 0, most = 0;

        void add(double value, double origin) {
            const double moved = value - origin, magnitude = std::fabs(value);
            first += moved;
            squares += moved * moved;
            absolute += magnitude;
            nonzero += value != 0;
            most = std::max(most, magnitude);
        }

        // Add sums whose lanes all belong to this feature.
        TARGET void take(const Sums &sums) {
            for (int lane = 0; lane < lanes; ++lane) {
                first += sums.first[lane];
                squares += sums.squares[lane];
                absolute += sums.absolute[lane];
                nonzero += sums.nonzero[lane];
                most = std::max<double>(most, sums.most[lane]);
            }
        }

        void put(const MarginalsJob &job, double *to, int64_t feature) const {
            const int64_t features = job.features;
            to[feature] = first;
            to[features + feature] = squares;
            to[2 * features + feature] = absolute;
            to[3 * features + feature] = nonzero;
            to[4 * features + feature] = most;
        }
    };

    // Write the sums of features from `feature` on, for rows whose features are neighbours in memory; return
    // the sum of magnitudes.
    template <int vectors>
    INLINE static Vector put_tile(const MarginalsJob &job, const Source *const *rows, int64_t count,
                                  int64_t feature, double *to) {
        Sums tile[vectors];
        Vector origin[vectors], magnitudes{};
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) origin[v] = *(const Unaligned *)(job.origin + feature + v * lanes);
        for (int64_t row = 0; row < count; ++row)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) tile[v].add(rows[row] + feature + v * lanes, origin[v]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            double *at = to + feature + v * lanes;
            *(Unaligned *)at = tile[v].first;
            *(Unaligned *)(at + job.features) = tile[v].squares;
            *(Unaligned *)(at + 2 * job.features) = tile[v].absolute;
            *(Unaligned *)(at + 3 * job.features) = tile[v].nonzero;
            *(Unaligned *)(at + 4 * job.features) = tile[v].most;
            magnitudes += tile[v].absolute;
        }
        return magnitudes;
    }

    // Write the sums of some rows, in place of the numbers in `to`. Return the sum of all magnitudes, which is
    // finite only if every value is.
    TARGET static double put_rows(const MarginalsJob &job, const Source *const *rows, int64_t count,
                                  double *to) {
        int64_t feature = 0;
        Vector found{};
        if (job.feature_stride == 1) {
            // Tiles read the rows a piece at a time, in an order that processors do not predict.
            for (int64_t row = 0; row < count; ++row)
                for (int64_t j = 0; j < job.features; j += 64 / sizeof(Source))
                    __builtin_prefetch(rows[row] + j);
            for (; feature + tile_vectors * lanes <= job.features; feature += tile_vectors * lanes)
                found += put_tile<tile_vectors>(job, rows, count, feature, to);
            for (; feature + lanes <= job.features; feature += lanes)
                found += put_tile<1>(job, rows, count, feature, to);
        }
        double magnitudes = 0;
        for (int lane = 0; lane < lanes; ++lane) magnitudes += found[lane];
        for (; feature < job.features; ++feature) {
            Single single;
            for (int64_t row = 0; row < count; ++row)
                single.add(rows[row][feature * job.feature_stride], job.origin[feature]);
            single.put(job, to, feature);
            magnitudes += single.absolute;
        }
        return magnitudes;
    }

    // Like put_rows, for samples whose positions are neighbours in memory.
    TARGET static double put_maps(const MarginalsJob &job, int64_t sample, int64_t samples, double *to) {
        double magnitudes = 0;
        for (int64_t feature = 0; feature < job.features; ++feature) {
            Sums sums;
            Single single;
            const Vector origin = Vector{} + job.origin[feature];
            for (int64_t i = sample; i < sample + samples; ++i) {
                const Source *from =
                    (const Source *)job.values + i * job.sample_stride + feature * job.feature_stride;
                int64_t position = 0;
                for (; position + lanes <= job.positions; position += lanes) sums.add(from + position, origin);
                for (; position < job.positions; ++position) single.add(from[position], job.origin[feature]);
            }
            single.take(sums);
            single.put(job, to, feature);
            magnitudes += single.absolute;
        }
        return magnitudes;
    }

    static bool is_finite(const MarginalsJob &job, const Source *row) {
        for (int64_t feature = 0; feature < job.features; ++feature)
            if (!std::isfinite(row[feature * job.feature_stride])) return false;
        return true;
    }

    // Add up observations `start` to `stop` - 1 row by row, without those that do not count.
    TARGET static void add_rows(const MarginalsJob &job, int64_t start, int64_t stop, double *put, double *sums,
                                int64_t *counts) {
        const Source *rows[rows_at_once];
        // Wide rows are cut less often along the features, so that whole pages are read in turn.
        const int64_t together = std::min(rows_at_once, std::max<int64_t>(values_at_once / job.features, 8));
        while (start < stop) {
            int64_t count = 0;
            for (; start < stop && count < together; ++start) {
                if (job.valid && !job.valid[start]) continue;
                const int64_t sample = start / job.positions, position = start % job.positions;
                rows[count++] =
                    (const Source *)job.values + sample * job.sample_stride + position * job.position_stride;
            }
            if (!std::isfinite(put_rows(job, rows, count, put))) {
                const int64_t offered = count;
                count = std::remove_if(rows, rows + count,
                                       [&](const Source *row) { return !is_finite(job, row); }) -
                        rows;
                counts[1] += offered - count;
                put_rows(job, rows, count, put);
            }
            counts[0] += count;
            add_up(job, put, sums);
        }
    }

    // Add the sums of one piece to the sums of others.
    TARGET static void add_up(const MarginalsJob &job, const double *from, double *to) {
        for (int64_t i = 0; i < 4 * job.features; ++i) to[i] += from[i];
        for (int64_t i = 4 * job.features; i < 5 * job.features; ++i) to[i] = std::max(to[i], from[i]);
    }

    // Measure the share of one slot.
    TARGET static void share(MarginalsTeam &team, int64_t slot) {
        const MarginalsJob &job = *team.job;
        double *put = job.workspace + 2 * slot * 5 * job.features, *sums = put + 5 * job.features;
        std::memset(sums, 0, 5 * job.features * sizeof(double));
        int64_t *counts = team.counts[slot];
        counts[0] = counts[1] = 0;
        const int64_t rows = job.samples * job.positions;
        if (job.position_stride == 1 && job.feature_stride != 1 && job.positions >= lanes && !job.valid) {
            const int64_t together = std::max<int64_t>(1, rows_at_once / job.positions);
            const int64_t end = job.samples * (slot + 1) / job.slots;
            for (int64_t sample = job.samples * slot / job.slots; sample < end; sample += together) {
                const int64_t samples = std::min(together, end - sample);
                if (std::isfinite(put_maps(job, sample, samples, put))) {
                    counts[0] += samples * job.positions;
                    add_up(job, put, sums);
                } else {
                    add_rows(job, sample * job.positions, (sample + samples) * job.positions, put, sums,
                             counts);
                }
            }
        } else {
            add_rows(job, rows * slot / job.slots, rows * (slot + 1) / job.slots, put, sums, counts);
        }
    }

    TARGET static void work(void *data) {
        MarginalsTeam &team = *static_cast<MarginalsTeam *>(data);
        for (int64_t slot; (slot = team.slot++) < team.job->slots;) share(team, slot);
    }

    // Add up the shares of all slots in their order, so that sums do not depend on which thread was faster.
    TARGET static void collect(MarginalsTeam &team) {
        const MarginalsJob &job = *team.job;
        double *total = job.workspace + 5 * job.features;
        for (int64_t slot = 0; slot < job.slots; ++slot) {
            if (slot) add_up(job, total + 2 * slot * 5 * job.features, total);
            for (int i = 0; i < 2; ++i) job.counts[i] += team.counts[slot][i];
        }
        std::memcpy(job.totals, total, 5 * job.features * sizeof(double));
    }
};
