#include "bindings/pass_input.hpp"

namespace paceline {

namespace nb = nanobind;

std::vector<int32_t> ints_of(nb::handle object) {
    Ints array;
    if (!nb::try_cast(object, array, false))
        refuse("tokens, parents and what a view has must be int32 arrays");
    return {array.data(), array.data() + array.size()};
}

Sequence& sequence_of(Engine& engine, nb::handle object) {
    Sequence* sequence = nullptr;
    if (!nb::try_cast(object, sequence) || !sequence)
        refuse("a batch has (sequence, tokens, parents) entries");
    if (sequence->engine.get() != &engine) refuse("a sequence belongs to another engine");
    return *sequence;
}

PassInput read_batch(Engine& engine, nb::list batch, const std::vector<bool>& rows) {
    PassInput input;
    if (rows.size() != batch.size())
        refuse("a batch needs to know of each entry if its rows are wanted");
    for (nb::handle item : batch) {
        if (!nb::isinstance<nb::tuple>(item) || nb::len(item) != 3)
            refuse("a batch has (sequence, tokens, parents) entries");
        const auto entry = nb::borrow<nb::tuple>(item);
        Sequence* sequence = &sequence_of(engine, entry[0]);
        for (const auto& other : input.entries)
            if (other.sequence == sequence) refuse("a sequence appears twice in the batch");
        std::vector<int32_t> ids = ints_of(entry[1]), parents = ints_of(entry[2]);
        if (ids.size() != parents.size()) refuse("tokens and parents differ in size");
        const size_t nodes = ids.size();
        input.entries.push_back({nb::object(entry[0]),
                                 sequence,
                                 std::move(ids),
                                 std::move(parents),
                                 nodes,
                                 rows[input.entries.size()],
                                 1,
                                 {},
                                 {}});
    }
    return input;
}

}  // namespace paceline
