// Random inputs of kernels: the same on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace check {

// splitmix64
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {
        uint64_t x = state_ += 0x9e3779b97f4a7c15ULL;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
        return x ^ x >> 31;
    }
    size_t below(size_t limit) { return static_cast<size_t>(bits() % limit); }
    bool one_in(size_t count) { return below(count) == 0; }
    // About normal: a sum of four uniforms, exact in every build.
    float normal() {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += static_cast<int32_t>(bits() >> 41);
        return static_cast<float>(sum - (1 << 24)) * 0x1p-22f;
    }

private:
    uint64_t state_;
};

// What a row of floats is made of.
enum class Kind { plain, outliers, tiny, huge, zeros, steps, not_numbers, count };

inline float value_of(Random& random, Kind kind) {
    const float value = random.normal();
    switch (kind) {
        case Kind::outliers: return random.one_in(64) ? value * 300.0f : value;
        case Kind::tiny: return random.one_in(4) ? value * 0x1p-130f : value * 0x1p-110f;
        case Kind::huge: return value * 0x1p40f;
        case Kind::zeros: return random.one_in(2) ? -0.0f : 0.0f;
        case Kind::steps: return static_cast<float>(static_cast<int>(random.below(9)) - 4) * 0.5f;
        case Kind::not_numbers:
            if (!random.one_in(50)) return value;
            return random.one_in(2) ? std::numeric_limits<float>::quiet_NaN()
                                    : std::numeric_limits<float>::infinity();
        default: return value;
    }
}

// Memory that kernels may read and write, at an address that they expect.
template <class T>
class Memory {
public:
    explicit Memory(size_t count = 0, T fill = T{}) : bytes_(count * sizeof(T) + 64), count_(count) {
        for (size_t i = 0; i < count; ++i) data()[i] = fill;
    }
    T* data() {
        const auto at = reinterpret_cast<uintptr_t>(bytes_.data());
        return reinterpret_cast<T*>(bytes_.data() + (64 - at % 64) % 64);
    }
    const T* data() const { return const_cast<Memory*>(this)->data(); }
    T& operator[](size_t i) { return data()[i]; }
    size_t size() const { return count_; }

private:
    std::vector<uint8_t> bytes_;
    size_t count_;
};

// Rows of `inputs` floats, `stride` apart; behind the inputs, zeros.
inline Memory<float> random_rows(Random& random, size_t rows, size_t inputs, size_t stride,
                                 Kind kind) {
    Memory<float> out(rows * stride);
    for (size_t row = 0; row < rows; ++row)
        for (size_t k = 0; k < inputs; ++k) out[row * stride + k] = value_of(random, kind);
    return out;
}

}  // namespace check
