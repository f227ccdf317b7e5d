// Draws observations from an output by the numbers that torch.rand gives for a seed. It does not call PyTorch,
// whose calls would take most of the time of a small layer. Included by accumulate.cpp.

// The generator of PyTorch on a CPU (mt19937); it makes one number at a time, since few are needed.
class Generator {
public:
    explicit Generator(uint32_t seed) {
        state[0] = seed;
        for (uint32_t i = 1; i < size; ++i) state[i] = 1812433253u * (state[i - 1] ^ (state[i - 1] >> 30)) + i;
    }

    // The next number of torch.rand in float64.
    double operator()() {
        const uint64_t high = bits();
        return double((high << 32 | bits()) & ((uint64_t(1) << 53) - 1)) * 0x1p-53;
    }

private:
    static constexpr int size = 624, ahead = 397;
    uint32_t state[size];
    int next = 0;

    uint32_t bits() {
        const int after = (next + 1) % size;
        const uint32_t both = (state[next] & 0x80000000u) | (state[after] & 0x7fffffffu);
        state[next] = state[(next + ahead) % size] ^ (both >> 1) ^ (both & 1 ? 0x9908b0dfu : 0);
        uint32_t found = state[next];
        next = after;
        found ^= found >> 11;
        found ^= (found << 7) & 0x9d2c5680u;
        found ^= (found << 15) & 0xefc60000u;
        return found ^ (found >> 18);
    }
};

// A ring of `total` observations that begins at `turn` is cut into arcs, and one is drawn from each.
template <typename Take>
void draw_from_arcs(uint32_t seed, int64_t total, int64_t number, int64_t turn, Take take) {
    Generator generator(seed);
    for (int64_t arc = 0; arc < number; ++arc) {
        const int64_t start = arc * total / number, stop = (arc + 1) * total / number;
        take(arc, (start + int64_t(generator() * double(stop - start)) + turn) % total);
    }
}
