// The arithmetic of accumulate.cpp, which includes this once for each instruction set, in a namespace of its
// own, with TARGET (the attribute that allows it), VECTOR_BYTES and TILE_ROWS defined.

template <typename Real, typename Source>
struct Sums {
    static constexpr int lanes = VECTOR_BYTES / sizeof(Real);
    static constexpr int tile_vectors = 3;  // with TILE_ROWS, as many accumulators as there are registers

    using Integer = std::conditional_t<sizeof(Real) == sizeof(double), int64_t, int32_t>;
    static constexpr Integer infinite =
        sizeof(Real) == sizeof(double) ? Integer(0x7ff0000000000000) : 0x7f800000;

    typedef Real Vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef Integer Bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef Source Loaded
        __attribute__((vector_size(lanes * sizeof(Source)), aligned(sizeof(Source)), may_alias));
    typedef double Wide
        __attribute__((vector_size(lanes * sizeof(double)), aligned(sizeof(double)), may_alias));

    // The larger magnitudes, as bits: their order puts infinities and NaN last.
    INLINE static Bits larger(Bits most, Vector values) {
        const Bits bits = (Bits)values & (Bits{} + std::numeric_limits<Integer>::max());
        return most > bits ? most : bits;
    }

    TARGET static Integer largest_of(Bits most) {
        Integer largest = 0;
        for (int lane = 0; lane < lanes; ++lane) largest = std::max<Integer>(largest, most[lane]);
        return largest;
    }

    INLINE static Vector converted(Loaded values) {
#if VECTOR_BYTES == 64
        // GCC 12 would convert each half on its own.
        if constexpr (sizeof(Real) > sizeof(Source)) return (Vector)_mm512_cvtps_pd((__m256)values);
#endif
        return __builtin_convertvector(values, Vector);
    }

    INLINE static Vector centred(Loaded values, Vector high, Vector low) {
        const Vector moved = converted(values) - high;
        if constexpr (sizeof(Real) < sizeof(double)) return moved - low;  // low is zero in float64
        return moved;
    }

    // a[start], b[start], a[start + 1], ...
    template <int start, int... k>
    INLINE static Vector interleave(Vector a, Vector b, std::integer_sequence<int, k...>) {
#ifdef __clang__
        return __builtin_shufflevector(a, b, (start + k / 2 + (k & 1) * lanes)...);
#else
        return __builtin_shuffle(a, b, Bits{Integer(start + k / 2 + (k & 1) * lanes)...});
#endif
    }

    // Transpose a square of vectors, in log2(lanes) perfect shuffles.
    INLINE static void transpose(Vector *square) {
        const std::make_integer_sequence<int, lanes> all;
#pragma GCC unroll 4
        for (int stage = 1; stage < lanes; stage *= 2) {
            Vector shuffled[lanes];
#pragma GCC unroll 8
            for (int i = 0; i < lanes / 2; ++i) {
                shuffled[2 * i] = interleave<0>(square[i], square[i + lanes / 2], all);
                shuffled[2 * i + 1] = interleave<lanes / 2>(square[i], square[i + lanes / 2], all);
            }
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) square[i] = shuffled[i];
        }
    }

    // Pack rows whose features are neighbours in memory.
    TARGET static Integer pack_rows(const Team &team, Real *packed, int64_t start, int64_t rows) {
        const Job &job = *team.job;
        const Vector *high = (const Vector *)team.high, *low = (const Vector *)team.low;
        const int64_t whole = job.features / lanes, rest = job.features % lanes;
        Bits most{};
        Place place(job, start);
        for (int64_t row = 0; row < rows; ++row, place.advance(job, 1)) {
            const Source *from = (const Source *)job.values + place.offset(job);
            Real *to = packed + row * lanes;
            if (job.valid && !job.valid[start + row]) {
                for (int64_t panel = 0; panel < team.panels; ++panel)
                    *(Vector *)(to + panel * team.stride) = Vector{};
                continue;
            }
            for (int64_t panel = 0; panel < whole; ++panel) {
                __builtin_prefetch(from + rows_ahead * job.position_stride + panel * lanes);
                const Vector values = centred(*(const Loaded *)(from + panel * lanes), high[panel], low[panel]);
                most = larger(most, values);
                *(Vector *)(to + panel * team.stride) = values;
            }
            if (rest) {
                Loaded last{};
                for (int lane = 0; lane < rest; ++lane) last[lane] = from[whole * lanes + lane];
                const Vector values = centred(last, high[whole], low[whole]);
                most = larger(most, values);
                *(Vector *)(to + whole * team.stride) = values;
            }
        }
        return largest_of(most);
    }

    // Pack rows of any other layout, in particular with one feature of consecutive rows side by side.
    TARGET static Integer pack_maps(const Team &team, Real *packed, int64_t start, int64_t rows) {
        const Job &job = *team.job;
        const Real *high = (const Real *)team.high, *low = (const Real *)team.low;
        Bits most{};
        for (int64_t panel = 0; panel < team.panels; ++panel) {
            const int64_t feature = panel * lanes, width = std::min<int64_t>(lanes, job.features - feature);
            const Source *features = (const Source *)job.values + feature * job.feature_stride;
            Place place(job, start);
            for (int64_t row = 0; row < rows; row += lanes) {
                Vector square[lanes];
                const bool together = job.position_stride == 1 && place.position + lanes <= job.positions;
                if (together && row + lanes <= rows && width == lanes && !job.valid) {
                    const Source *from = features + place.offset(job);
#pragma GCC unroll 16
                    for (int lane = 0; lane < lanes; ++lane) {
                        square[lane] = centred(*(const Loaded *)(from + lane * job.feature_stride),
                                               Vector{} + high[feature + lane], Vector{} + low[feature + lane]);
                        most = larger(most, square[lane]);
                    }
                    place.advance(job, lanes);
                    transpose(square);
                } else {
                    for (int lane = 0; lane < lanes; ++lane) {
                        square[lane] = Vector{};
                        if (row + lane >= rows) continue;
                        const Source *from = features + place.offset(job);
                        place.advance(job, 1);
                        if (job.valid && !job.valid[start + row + lane]) continue;
                        Loaded values{};
                        for (int j = 0; j < width; ++j) values[j] = from[j * job.feature_stride];
                        square[lane] = centred(values, *(const Vector *)(high + feature),
                                               *(const Vector *)(low + feature));
                        most = larger(most, square[lane]);
                    }
                }
                Vector *to = (Vector *)(packed + panel * team.stride + row * lanes);
#pragma GCC unroll 16
                for (int lane = 0; lane < lanes; ++lane) to[lane] = square[lane];
            }
        }
        return largest_of(most);
    }

    // True if a row was finite before it was centred.
    static bool was_finite(const Job &job, int64_t row) {
        const Source *values = (const Source *)job.values + Place(job, row).offset(job);
        for (int64_t j = 0; j < job.features; ++j)
            if (!std::isfinite(values[j * job.feature_stride])) return false;
        return true;
    }

    // Set rows that hold a NaN or an infinity to zero; return the largest magnitude of the others. A row that
    // only overflowed when it was centred still counts, and sets `overflowed`.
    TARGET static Integer clear(Team &team, Real *packed, int64_t start, int64_t rows, int64_t &cleared) {
        Integer largest = 0;
        for (int64_t row = 0; row < rows; ++row) {
            Vector *values = (Vector *)(packed + row * lanes);
            Bits most{};
            for (int64_t panel = 0; panel < team.panels; ++panel)
                most = larger(most, values[panel * team.stride / lanes]);
            const Integer bits = largest_of(most);
            if (bits < infinite) {
                largest = std::max(largest, bits);
                continue;
            }
            if (was_finite(*team.job, start + row))
                team.overflowed = 1;
            else
                ++cleared;
            for (int64_t panel = 0; panel < team.panels; ++panel)
                values[panel * team.stride / lanes] = Vector{};
        }
        return largest;
    }

    // Centre rows into panels of `lanes` features; rows that do not count become zero. Return the largest
    // magnitude.
    TARGET static Integer pack(Team &team, Real *packed, int64_t start, int64_t rows) {
        const Job &job = *team.job;
        Integer largest;
        if (job.feature_stride == 1)
            largest = pack_rows(team, packed, start, rows);
        else
            largest = pack_maps(team, packed, start, rows);
        int64_t offered = rows, cleared = 0;
        if (job.valid) offered -= std::count(job.valid + start, job.valid + start + rows, 0);
        if (largest >= infinite) largest = clear(team, packed, start, rows, cleared);
        team.kept += offered - cleared;
        team.lost += cleared;
        return largest;
    }

    // The power of two that brings magnitudes near one; 1 where products in float32 need no scaling.
    static double scale_for(Integer largest) {
        if (sizeof(Real) == sizeof(double) || largest == 0) return 1;
        Real magnitude;
        std::memcpy(&magnitude, &largest, sizeof magnitude);
        int exponent;
        (void)std::frexp(magnitude, &exponent);
        if (-4 <= exponent && exponent <= 50) return 1;
        return std::ldexp(1.0, -std::min(std::max(exponent, -120), 120));  // must be a float
    }

    TARGET static void rescale(const Team &team, Real *packed, int64_t rows, double scale) {
        for (int64_t panel = 0; panel < team.panels; ++panel) {
            Vector *values = (Vector *)(packed + panel * team.stride);
            for (int64_t row = 0; row < rows; ++row) values[row] *= Real(scale);
        }
    }

    // Add TILE_ROWS x (vectors * lanes) sums of products over the rows, for the features from i and from j.
    template <int vectors>
    INLINE static void add_tile(const Team &team, const Real *packed, int64_t rows, int64_t i, int64_t j,
                                double *sums, double weight) {
        const Real *left = packed + i / lanes * team.stride + i % lanes,
                   *right = packed + j / lanes * team.stride;
        const int64_t features = team.job->features;
        sums += i * features + j;
        for (int r = 0; r < TILE_ROWS; ++r)
            for (int c = 0; c < vectors * lanes; c += 64 / sizeof(double))
                __builtin_prefetch(sums + r * features + c, 1);
        Vector tile[TILE_ROWS][vectors];
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; ++v) tile[r][v] = Vector{};
        for (int64_t row = 0; row < rows; ++row) {
            Vector columns[vectors];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; ++v)
                columns[v] = *(const Vector *)(right + v * team.stride + row * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 3
                for (int v = 0; v < vectors; ++v) tile[r][v] += left[row * lanes + r] * columns[v];
        }
        const int64_t height = features - i, width = features - j;
        if (height >= TILE_ROWS && width >= vectors * lanes) {
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 3
                for (int v = 0; v < vectors; ++v)
                    *(Wide *)(sums + r * features + v * lanes) +=
                        weight * __builtin_convertvector(tile[r][v], Wide);
            return;
        }
        Real spilled[TILE_ROWS][vectors * lanes];
        std::memcpy(spilled, tile, sizeof spilled);
        for (int r = 0; r < std::min<int64_t>(height, TILE_ROWS); ++r)
            for (int c = 0; c < std::min<int64_t>(width, vectors * lanes); ++c)
                sums[r * features + c] += weight * spilled[r][c];
    }

    // Add the products of one panel with the panels `from` to `to` - 1, which lie to its right or are itself.
    TARGET static void multiply(const Team &team, const Real *packed, int64_t rows, int64_t panel, int64_t from,
                                int64_t to, double *sums, double weight) {
        const int64_t begin = panel * lanes, end = std::min(begin + lanes, team.job->features);
        int vectors;
        for (int64_t other = from; other < to; other += vectors) {
            const int64_t left = to - other;
            vectors = left == 4 ? 2 : int(std::min<int64_t>(left, tile_vectors));
            for (int64_t i = begin; i < end; i += TILE_ROWS) {
                if (vectors == 3)
                    add_tile<3>(team, packed, rows, i, other * lanes, sums, weight);
                else if (vectors == 2)
                    add_tile<2>(team, packed, rows, i, other * lanes, sums, weight);
                else
                    add_tile<1>(team, packed, rows, i, other * lanes, sums, weight);
            }
        }
    }

    // Add up each feature of one panel.
    TARGET static void add_up(const Team &team, const Real *packed, int64_t rows, int64_t panel, double *sums,
                              double scale) {
        const Vector *values = (const Vector *)(packed + panel * team.stride);
        Vector total[4] = {};
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4)
            for (int i = 0; i < 4; ++i) total[i] += values[row + i];
        for (; row < rows; ++row) total[0] += values[row];
        total[0] = (total[0] + total[1]) + (total[2] + total[3]);
        const int64_t feature = panel * lanes;
        for (int lane = 0; lane < std::min<int64_t>(lanes, team.job->features - feature); ++lane)
            sums[feature + lane] += total[0][lane] / scale;
    }

    // Few features: each slot sums its own share of the rows, the first one in the result. The sums of the
    // other slots are added to it at the end.
    TARGET static void work_by_rows(Team &team) {
        const int64_t features = team.job->features;
        for (int64_t slot; (slot = team.slot++) < team.slots; ++team.slots_done) {
            Real *packed = (Real *)(team.packed + slot * team.packed_bytes);
            double *second = team.job->second, *first = team.job->first;
            if (slot) {
                second = (double *)(team.sums + (slot - 1) * team.sums_bytes);
                first = second + features * features;
                for (int64_t row = 0; row <= features; ++row) {
                    const int64_t begin = row < features ? row / lanes * lanes : 0;  // tiles add from here on
                    std::memset(second + row * features + begin, 0, (features - begin) * sizeof(double));
                }
            }
            const int64_t begin = team.chunks * slot / team.slots, end = team.chunks * (slot + 1) / team.slots;
            for (int64_t start = begin * chunk_rows; start < std::min(end * chunk_rows, team.rows);
                 start += chunk_rows) {
                const int64_t rows = std::min(team.rows - start, chunk_rows);
                const double scale = scale_for(pack(team, packed, start, rows));
                if (scale != 1) rescale(team, packed, rows, scale);
                for (int64_t panel = 0; panel < team.panels; ++panel) {
                    multiply(team, packed, rows, panel, panel, team.panels, second, 1 / (scale * scale));
                    add_up(team, packed, rows, panel, first, scale);
                }
            }
        }
        wait(team.slots_done, team.slots);
        // A row of the second moment at a time; the last one is the first moment.
        for (int64_t row; (row = team.stripe++) <= features;) {
            double *to = row < features ? team.job->second + row * features : team.job->first;
            for (int64_t slot = 0; slot < team.slots - 1; ++slot) {
                const double *from = (const double *)(team.sums + slot * team.sums_bytes) + row * features;
                for (int64_t j = row < features ? row : 0; j < features; ++j) to[j] += from[j];
            }
        }
    }

    // Many features: all threads pack the same rows, then each adds to other parts of the sums.
    TARGET static void work_by_tiles(Team &team) {
        const int64_t blocks = (team.panels + block_panels - 1) / block_panels;
        int64_t products = 0;  // pairs of a block and a panel to its left or in it
        for (int64_t block = 0; block < blocks; ++block)
            products += std::min((block + 1) * block_panels, team.panels);
        for (int64_t chunk = 0; chunk < team.chunks; ++chunk) {
            Chunk &state = team.states[chunk];
            Real *packed = (Real *)(team.packed + chunk % team.buffers * team.packed_bytes);
            const int64_t start = chunk * chunk_rows, rows = std::min(team.rows - start, chunk_rows);
            const int64_t pieces = (rows + packed_at_once - 1) / packed_at_once;
            for (int64_t piece; (piece = state.packing++) < pieces; ++state.packed) {
                const int64_t from = piece * packed_at_once, size = std::min(rows - from, packed_at_once);
                const int64_t largest = pack(team, packed + from * lanes, start + from, size);
                int64_t seen = state.largest;
                while (largest > seen && !state.largest.compare_exchange_weak(seen, largest)) {
                }
            }
            wait(state.packed, pieces);
            const double scale = scale_for(Integer(state.largest));
            if (scale != 1) {
                for (int64_t piece; (piece = state.scaling++) < pieces; ++state.scaled) {
                    const int64_t from = piece * packed_at_once;
                    rescale(team, packed + from * lanes, std::min(rows - from, packed_at_once), scale);
                }
                wait(state.scaled, pieces);
            }
            if (chunk) wait(team.states[chunk - 1].multiplied, products);
            for (int64_t product; (product = state.multiplying++) < products; ++state.multiplied) {
                int64_t block = 0, panel = product, end = std::min(block_panels, team.panels);
                while (panel >= end) {
                    panel -= end;
                    end = std::min((++block + 1) * block_panels, team.panels);
                }
                const int64_t begin = std::max(panel, block * block_panels);
                multiply(team, packed, rows, panel, begin, end, team.job->second, 1 / (scale * scale));
                if (begin == panel) add_up(team, packed, rows, panel, team.job->first, scale);
            }
        }
    }

    TARGET static void work(void *data) {
        Team &team = *static_cast<Team *>(data);
        if (team.slots)
            work_by_rows(team);
        else
            work_by_tiles(team);
    }
};
