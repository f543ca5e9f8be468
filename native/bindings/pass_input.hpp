// What a pass is given from Python.

#pragma once

#include <optional>
#include <span>
#include <vector>

#include "bindings/engine.hpp"
#include "engine/pass.hpp"

namespace paceline {

// What a pass reads: copies, because other Python threads could change the arrays meanwhile.
struct PassInput {
    struct Entry {
        nanobind::object owner;  // keeps `sequence` alive
        Sequence* sequence;
        std::vector<int32_t> tokens, parents;
        size_t nodes;
        bool rows;                   // whether its logits are wanted
        size_t mixed = 1;            // tokens that each node mixes
        std::vector<float> weights;  // [nodes, mixed]; empty: each is 1
        std::vector<float> states;   // [nodes, hidden]; empty: embeddings
    };
    std::vector<Entry> entries;
    std::optional<std::vector<int32_t>> layers, positions, tokens, exits;

    View view() const {
        const auto part = [](const auto& values) -> std::optional<std::span<const int32_t>> {
            if (!values) return std::nullopt;
            return std::span<const int32_t>(*values);
        };
        return {part(layers), part(positions), part(tokens), part(exits)};
    }

    std::vector<Branch> branches() const {
        std::vector<Branch> branches;
        for (const Entry& entry : entries)
            branches.push_back({&entry.sequence->open(), entry.tokens.data(), entry.parents.data(),
                                entry.nodes, entry.rows, entry.mixed,
                                entry.weights.empty() ? nullptr : entry.weights.data(),
                                entry.states.empty() ? nullptr : entry.states.data()});
        return branches;
    }
};

// The values of an int32 array. It is not converted: that would hide a mistake, and cost time.
std::vector<int32_t> ints_of(nanobind::handle object);

// The sequence of an entry. Throws std::invalid_argument for what is none of this engine.
Sequence& sequence_of(Engine& engine, nanobind::handle object);

// A list of (sequence, tokens, parents) entries; `rows` says whose logits are wanted.
PassInput read_batch(Engine& engine, nanobind::list batch, const std::vector<bool>& rows);

}  // namespace paceline
