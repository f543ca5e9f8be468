// What is compared between instruction sets: each check computes with one set's kernels, from inputs
// that a seed determines, and records the results.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "inputs.hpp"
#include "kernels/kernels.hpp"
#include "kernels/top_k.hpp"

namespace check {

// Results of one check, with names for messages.
class Record {
public:
    struct Part {
        std::string name;
        std::vector<uint8_t> bytes;
    };

    void bytes(std::string name, const void* from, size_t size) {
        const auto* begin = static_cast<const uint8_t*>(from);
        parts_.push_back({std::move(name), {begin, begin + size}});
    }
    // All values that are no number count as one: which of them results is not defined.
    void floats(std::string name, const float* from, size_t count) {
        std::vector<uint32_t> bits(count);
        for (size_t i = 0; i < count; ++i) {
            std::memcpy(&bits[i], from + i, sizeof(float));
            if ((bits[i] & 0x7fffffff) > 0x7f800000) bits[i] = 0x7fc00000;
        }
        bytes(std::move(name), bits.data(), count * sizeof(uint32_t));
    }
    const std::vector<Part>& parts() const { return parts_; }

private:
    std::vector<Part> parts_;
};

// What one instruction set offers.
struct Tables {
    const paceline::Kernels* kernels;
    paceline::TopRow top_row;
    const char* isa() const { return kernels->isa; }
};

// One check: `seed` chooses sizes and values.
struct Check {
    const char* name;
    void (*run)(const Tables&, uint64_t seed, Record&);
    size_t seeds;
};

void check_products(const Tables&, uint64_t seed, Record&);
void check_attention(const Tables&, uint64_t seed, Record&);
void check_rows(const Tables&, uint64_t seed, Record&);
void check_screen(const Tables&, uint64_t seed, Record&);

}  // namespace check
