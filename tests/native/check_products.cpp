// Every weight format: what it stores, and its products with activations of 16 and of 8 bits.
#include <stdexcept>

#include "checks.hpp"
#include "kernels/sparse_group.hpp"

namespace check {

namespace {

using paceline::FormatKernels;
using paceline::kPanel;
using paceline::padded;
using paceline::Product;
using paceline::ProductKernels;

struct Weights {
    size_t panels, inputs, group, panel_bytes;
    Memory<uint8_t> data;
};

bool is_rows(const FormatKernels& format) { return format.grouped && format.load_blocks; }
bool is_blocks(const FormatKernels& format) { return format.load_blocks && !format.grouped; }
bool is_sparse(const std::string& name) {
    return name.starts_with("pairs") || name.starts_with("bitmap");
}

// Random codes in rows, behind random bytes whose numbers in half precision are small.
void load_rows(const FormatKernels& format, size_t rows, size_t inputs, size_t group, Random& random,
               uint8_t* to) {
    const size_t bytes = format.panel_bytes(inputs, group) / kPanel;
    const std::string name = format.name;
    const auto bits = static_cast<size_t>(name[name.find_first_of("2345678")] - '0');
    const size_t header = bytes - (inputs + 63) / 64 * 8 * bits;
    std::vector<uint8_t> stored(rows * bytes);
    for (size_t i = 0; i < stored.size(); ++i)  // whatever lies there: exponents stay below half
        stored[i] = static_cast<uint8_t>(random.bits() & (i % bytes < header ? 0xbb : 0xff));
    format.load_blocks(stored.data(), bytes, rows, inputs, to);
}

// Random bytes as one row of a file, whose scales are finite.
std::vector<uint8_t> stored_row(const FormatKernels& format, size_t inputs, Random& random) {
    const size_t unit = format.stored_row_bytes(32) ? 32 : 256;
    const size_t unit_bytes = format.stored_row_bytes(unit);
    Memory<uint8_t> panel(format.panel_bytes(unit, 1));
    std::vector<uint8_t> row(format.stored_row_bytes(inputs));
    for (size_t at = 0; at < row.size(); at += unit_bytes) do {
            for (size_t i = 0; i < unit_bytes; ++i)
                row[at + i] = static_cast<uint8_t>(random.bits());
        } while (!format.load_blocks(row.data() + at, unit_bytes, 1, unit, panel.data()));
    return row;
}

// Puts random integers and scales that a format of groups holds into a panel.
void load_groups(const FormatKernels& format, size_t rows, size_t inputs, size_t group,
                 Random& random, uint8_t* to) {
    const std::string name = format.name;
    const bool sparse = is_sparse(name), nested = name[0] != 'g' && !sparse;
    const int bits = name[name.find_first_of("23456789")] - '0';
    const size_t blocks = (inputs + paceline::kBlockInputs - 1) / paceline::kBlockInputs;
    const size_t shared = paceline::scale_blocks(group), groups = (blocks + shared - 1) / shared;
    std::vector<uint8_t> codes(rows * inputs), steps(rows * groups);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(size_t{1} << bits));
    for (uint8_t& step : steps) step = static_cast<uint8_t>(random.below(64));
    if (sparse)  // one of every two neighbours stays
        for (size_t i = 0; i < codes.size(); ++i)
            if ((i % inputs + random.below(2)) % 2 || i % 2)
                codes[i] = static_cast<uint8_t>(1 << (bits - 1));
    std::vector<float> scales(rows * (nested ? 1 : groups));
    for (float& scale : scales) scale = static_cast<float>(random.below(2048)) * 0x1p-14f;
    std::vector<uint16_t> zeros(rows * groups);
    for (uint16_t& zero : zeros) zero = static_cast<uint16_t>(random.below(size_t{1} << bits));
    std::vector<int8_t> levels(size_t{1} << bits);
    for (int8_t& level : levels) level = static_cast<int8_t>(random.bits());
    std::vector<int32_t> starts(blocks);
    for (size_t i = 0; i < blocks; ++i) starts[i] = static_cast<int32_t>(i / shared);
    paceline::GroupedRows from{rows, inputs, groups, bits, codes.data(), scales.data(), nullptr,
                               starts.data()};
    if (name.ends_with("zero")) from.zeros = zeros.data();
    if (nested) from.steps = steps.data();
    if (name[0] == 'l') from.levels = levels.data();
    if (!format.holds(from)) throw std::runtime_error(name + " does not hold its integers");
    format.load(from, group, to);
}

Weights make_weights(const FormatKernels& format, size_t panels, size_t inputs, Random& random) {
    const size_t small[] = {4, 8, 16, 32};
    size_t group = is_rows(format)  ? small[random.below(4)]
                   : format.grouped ? 1 + random.below(4)
                                    : 1;
    if (std::string(format.name).starts_with("bitmap"))
        group |= static_cast<uint64_t>(kPanel * inputs) << paceline::kRoomShift;
    const size_t bytes = format.panel_bytes(inputs, group);
    Weights weights{panels, inputs, group, bytes, Memory<uint8_t>(panels * bytes + 64)};
    const Kind kinds[] = {Kind::plain, Kind::outliers, Kind::tiny, Kind::steps, Kind::zeros};
    const bool ternary = std::strcmp(format.name, "ternary") == 0;
    for (size_t panel = 0; panel < panels; ++panel) {
        uint8_t* to = weights.data.data() + panel * bytes;
        const size_t rows = panel + 1 == panels ? 1 + random.below(kPanel) : kPanel;
        if (is_blocks(format)) {
            std::vector<uint8_t> stored;
            for (size_t row = 0; row < rows; ++row) {
                const auto one = stored_row(format, inputs, random);
                stored.insert(stored.end(), one.begin(), one.end());
            }
            format.load_blocks(stored.data(), stored.size() / rows, rows, inputs, to);
            continue;
        }
        if (is_rows(format)) {
            load_rows(format, rows, inputs, group, random, to);
            continue;
        }
        if (format.grouped) {
            load_groups(format, rows, inputs, group, random, to);
            continue;
        }
        Memory<float> values = random_rows(random, rows, inputs, inputs, kinds[random.below(5)]);
        if (ternary)
            for (size_t i = 0; i < values.size(); ++i)
                values[i] = static_cast<float>(static_cast<int>(random.below(3)) - 1) * 0.25f;
        format.pack(values.data(), rows, inputs, to);
    }
    return weights;
}

std::vector<int32_t> shuffled(size_t count, Random& random) {
    std::vector<int32_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    return order;
}

// One product, arranged and multiplied in parts.
void multiply(const ProductKernels& product, const Weights& weights, bool may_shuffle,
              const std::string& name, Random& random, Record& record) {
    if (!product.multiply) return;
    const size_t sizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 17, 24, 29, 33};
    const size_t n = sizes[random.below(15)], inputs = weights.inputs;
    const size_t stride = padded(inputs) + kPanel * random.below(2);
    const Kind kind = static_cast<Kind>(random.below(static_cast<size_t>(Kind::count)));
    const Memory<float> rows = random_rows(random, n, inputs, stride, kind);
    const bool shuffle = may_shuffle && random.one_in(3);
    const std::vector<int32_t> order = shuffled(inputs, random);
    Memory<uint8_t> arranged(product.arranged_bytes(n, inputs) + 64, 0x55);
    const bool as_it_is = product.arranged_bytes(n, inputs) == 0;
    const size_t parts = 1 + random.below(3);
    for (size_t part = 0; part < parts && !as_it_is; ++part)
        product.arrange(rows.data(), stride, n, inputs, shuffle ? order.data() : nullptr,
                        arranged.data(), part, parts);

    Product job;
    job.panels = weights.data.data();
    job.panel_bytes = weights.panel_bytes;
    job.inputs = inputs;
    job.group = weights.group;
    job.x = as_it_is ? static_cast<const void*>(rows.data()) : arranged.data();
    job.n = n;
    job.gated = weights.panels % 2 == 0 && random.one_in(3);
    job.activation = static_cast<paceline::Activation>(random.below(6));
    job.softcap = random.one_in(4) ? 30.0f : 0.0f;
    job.times_out = random.one_in(4);
    const size_t width = weights.panels / (job.gated ? 2 : 1) * kPanel;
    job.rows = width - random.below(kPanel);
    job.stride = width;
    const Memory<float> bias = random_rows(random, 1, weights.panels * kPanel,
                                           weights.panels * kPanel, Kind::plain);
    if (random.one_in(2)) job.bias = bias.data();
    Memory<float> out(n * width, 0.5f);
    job.out = out.data();
    Memory<uint8_t> scratch(product.scratch_bytes(n) + 64, 0x55);
    const size_t middle = job.gated ? 0 : random.below(weights.panels);
    if (middle) product.multiply(job, 0, middle, scratch.data());
    product.multiply(job, middle, weights.panels, scratch.data());
    record.floats(name + " x " + std::to_string(n), out.data(), out.size());
}

void check_format(const FormatKernels& format, Random random, Record& record) {
    const size_t any[] = {7, 32, 33, 64, 96, 200, 288, 512, 544};
    size_t inputs = is_blocks(format) ? 256 * (1 + random.below(3)) : any[random.below(9)];
    if (is_sparse(format.name)) inputs = (inputs + 3) / 4 * 4;
    const Weights weights = make_weights(format, 1 + random.below(9), inputs, random);
    const std::string name = format.name;
    record.bytes(name + " panels", weights.data.data(), weights.panels * weights.panel_bytes);

    const size_t lane = random.below(kPanel);
    std::vector<float> row(inputs);
    format.unpack(weights.data.data(), lane, inputs, weights.group, 0.75f, row.data());
    record.floats(name + " unpacked", row.data(), inputs);
    Memory<uint8_t> copied(weights.panel_bytes);
    format.copy(weights.data.data(), lane, inputs, weights.group, copied.data(), kPanel - 1 - lane);
    record.bytes(name + " copied", copied.data(), copied.size());

    const bool floats = name[0] == 'f' || name[0] == 'b';  // they take no order
    for (int i = 0; i < 2; ++i) {
        multiply(format.product, weights, !floats, name, random, record);
        multiply(format.product8, weights, true, name + " bytes", random, record);
    }
}

}  // namespace

void check_products(const Tables& tables, uint64_t seed, Record& record) {
    for (const FormatKernels* const* format = tables.kernels->formats; *format; ++format)
        check_format(**format, Random(seed * 1000003), record);
}

}  // namespace check
