#include "engine/matrix.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "engine/low_rank.hpp"
#include "engine/sparse_rows.hpp"
#include "kernels/sparse_group.hpp"
#include "support/file_mapping.hpp"

namespace paceline {

namespace {

// A group of a format of bitmaps with room for so many weights of a panel.
size_t with_room(size_t group, size_t weights) {
    return scale_blocks(group) | static_cast<uint64_t>(weights + 1) << kRoomShift;
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// The panels of one weight, each thread with room for sixteen rows as floats.
class Packing : public Task {
public:
    Packing(Matrix& to, const TensorSource& weight, size_t first, size_t every, size_t threads)
        : to_(to), weight_(weight), first_(first), every_(every) {
        const size_t floats = padded(weight.rows) * to.inputs;
        chunks_ = floats / kChunk + 1;
        add_phase(chunks_);
        for (size_t i = 0; i < threads; ++i)
            rows_.emplace_back(kPanel * to.inputs * sizeof(float));
    }

    std::atomic<bool> finite{true}, fits{true};

private:
    static constexpr size_t kChunk = size_t{1} << 18;

    void work(size_t, size_t chunk, size_t thread) override {
        const size_t panels = padded(weight_.rows) / kPanel;
        const auto [begin, end] = chunk_range(panels, chunk, chunks_);
        const size_t last = std::min(end * kPanel, weight_.rows);
        for (size_t panel = begin; panel < end; ++panel) pack(panel, rows_[thread].floats());
        if (begin < end) weight_.forget(begin * kPanel, last);
    }

    void pack(size_t panel, float* rows) {
        const size_t row = panel * kPanel, count = std::min(weight_.rows - row, kPanel);
        for (size_t i = 0; i < count; ++i)
            if (!weight_.read(row + i, rows + i * to_.inputs)) finite = false;
        uint8_t* panels = to_.data.bytes() + (first_ + panel * every_) * to_.panel_bytes;
        if (!to_.format->pack(rows, count, to_.inputs, panels)) fits = false;
    }

    Matrix& to_;
    const TensorSource& weight_;
    const size_t first_, every_;
    size_t chunks_;
    std::vector<Buffer> rows_;
};

// The panels of one matrix of integers.
class Loading : public Task {
public:
    Loading(Matrix& to, const GroupedRows& rows, size_t first, size_t every)
        : to_(to), rows_(rows), first_(first), every_(every), panels_(padded(rows.rows) / kPanel) {
        chunks_ = padded(rows.rows) * to.inputs / kChunk + 1;
        add_phase(chunks_);
    }

private:
    static constexpr size_t kChunk = size_t{1} << 18;

    void work(size_t, size_t chunk, size_t) override {
        const auto [begin, end] = chunk_range(panels_, chunk, chunks_);
        for (size_t panel = begin; panel < end; ++panel) {
            const size_t row = panel * kPanel;
            to_.format->load(rows_.part(row, std::min(rows_.rows - row, kPanel)), to_.group,
                             to_.data.bytes() + (first_ + panel * every_) * to_.panel_bytes);
        }
    }

    Matrix& to_;
    const GroupedRows& rows_;
    const size_t first_, every_, panels_;
    size_t chunks_;
};

// The panels of one matrix in blocks.
class BlockLoading : public Task {
public:
    BlockLoading(Matrix& to, const StoredRows& rows, size_t first, size_t every)
        : to_(to), rows_(rows), first_(first), every_(every), panels_(padded(rows.rows) / kPanel) {
        chunks_ = rows.rows * rows.row_bytes / kChunk + 1;
        add_phase(chunks_);
    }

    std::atomic<bool> finite{true};

private:
    static constexpr size_t kChunk = size_t{1} << 18;  // bytes

    void work(size_t, size_t chunk, size_t) override {
        const auto [begin, end] = chunk_range(panels_, chunk, chunks_);
        for (size_t panel = begin; panel < end; ++panel) {
            const size_t row = panel * kPanel, count = std::min(rows_.rows - row, kPanel);
            uint8_t* to = to_.data.bytes() + (first_ + panel * every_) * to_.panel_bytes;
            if (!to_.format->load_blocks(rows_.data + row * rows_.row_bytes, rows_.row_bytes,
                                         count, rows_.inputs, to))
                finite = false;
        }
        if (begin < end) rows_.forget(begin * kPanel, std::min(end * kPanel, rows_.rows));
    }

    Matrix& to_;
    const StoredRows& rows_;
    const size_t first_, every_, panels_;
    size_t chunks_;
};

}  // namespace

void StoredRows::forget(size_t first, size_t last) const {
    if (mapped) forget_pages(data + first * row_bytes, (last - first) * row_bytes);
}

Matrix::Matrix(const FormatKernels& format, size_t group, size_t panels, size_t inputs)
    : format(&format),
      product(&format.product),
      group(group),
      panels(panels),
      inputs(inputs),
      panel_bytes(format.panel_bytes(inputs, group)) {}

bool Matrix::set_byte_activations(bool on) {
    const bool able = on && format->product8.multiply;
    product = able ? &format->product8 : &format->product;
    return able;
}

void Matrix::reserve() {
    if (!data.owned()) refuse("this weight is that of another layer, and has been shared before");
    if (data) return;
    if (streamed) refuse("this weight was given before, and its layer is complete");
    if (panel_bytes && panels > SIZE_MAX / panel_bytes) throw std::bad_alloc();
    data = Buffer(bytes());
}

void Matrix::borrow(const std::string& name, const Matrix& other, size_t first) {
    if (!other.data) refuse("weight '" + name + "' is shared before the other one is stored");
    order = other.order;
    loaded = other.loaded;
    rounded = other.rounded;
    data = Buffer::view(other.data, first * panel_bytes, bytes());
}

void Matrix::pack(const std::string& name, const TensorSource& weight, size_t first, size_t every,
                  Pool& pool) {
    if (!format->pack)
        refuse("weight '" + name + "' cannot be rounded to " + format->name +
               ": only weights of a file are kept in it");
    if (group != 1)
        refuse("weight '" + name + "' can be rounded to groups of " + std::to_string(kBlockInputs) +
               " inputs only");
    if (!order.empty()) refuse("weight '" + name + "' has its inputs in order, others have not");
    loaded = rounded = true;
    reserve();
    const auto packing = std::make_shared<Packing>(*this, weight, first, every, pool.size());
    pool.run(packing, pool.size());
    weight.forget(0, weight.rows);
    if (!packing->finite) refuse("weight '" + name + "' holds NaN or infinite values");
    if (!packing->fits)
        throw NotTernary("weight '" + name + "' is not ternary: its rows must hold 0 and one "
                         "number with either sign; choose another format");
}

void Matrix::load(const std::string& name, const GroupedRows& rows,
                  std::span<const int32_t> inputs_order, size_t first, size_t every, Pool& pool) {
    if (!format->holds || !format->holds(rows))
        refuse("weight '" + name + "' cannot be kept as it is in " + format->name);
    for (size_t block = 0; format->grouped && block < (rows.inputs + kBlockInputs - 1) / kBlockInputs;
         ++block)
        if (rows.block_groups[block] != static_cast<int32_t>(block / scale_blocks(group)))
            refuse("weight '" + name + "' has groups of other sizes than its format");
    if (weight_room(group) && weight_room(group) < largest_panel(rows))
        refuse("weight '" + name + "' has more weights than its format was told to have room for");
    if (loaded && !std::ranges::equal(order, inputs_order))
        refuse("weight '" + name + "' has its inputs in another order than others");
    order.assign(inputs_order.begin(), inputs_order.end());
    loaded = true;
    reserve();
    pool.run(std::make_shared<Loading>(*this, rows, first, every), pool.size());
}

void Matrix::load_blocks(const std::string& name, const StoredRows& rows, size_t first,
                         size_t every, Pool& pool) {
    if (!format->load_blocks)
        refuse("weight '" + name + "' cannot be kept as it is in " + format->name);
    const size_t expected = format->grouped ? panel_bytes / kPanel
                                            : format->stored_row_bytes(rows.inputs);
    if (rows.row_bytes != expected || !expected)
        refuse("weight '" + name + "' has " + std::to_string(rows.row_bytes) +
               " bytes a row, expected " + std::to_string(expected) + " for " +
               std::to_string(rows.inputs) + " inputs in " + format->name);
    loaded = true;
    reserve();
    const auto loading = std::make_shared<BlockLoading>(*this, rows, first, every);
    pool.run(loading, pool.size());
    rows.forget(0, rows.rows);
    if (!loading->finite) refuse("weight '" + name + "' holds NaN or infinite values");
}

Matrix Matrix::gather(std::span<const int32_t> rows) const {
    const size_t room = weight_room(group) ? with_room(group, kPanel * inputs) : group;
    Matrix part(*format, room, padded(rows.size()) / kPanel, inputs);
    part.reserve();
    part.data.zero();
    part.order = order;
    part.product = product;
    for (size_t i = 0; i < rows.size(); ++i) {
        const size_t row = static_cast<size_t>(rows[i]);
        format->copy(data.bytes() + row / kPanel * panel_bytes, row % kPanel, inputs, room,
                     part.data.bytes() + i / kPanel * part.panel_bytes, i % kPanel);
    }
    return part;
}

void Matrix::unpack(const uint8_t* layer, size_t row, float scale, float* out) const {
    unpack_panel(panels_in(layer) + row / kPanel * panel_bytes, row % kPanel, scale, out);
}

void Matrix::unpack_panel(const uint8_t* panel, size_t row, float scale, float* out) const {
    if (order.empty()) return format->unpack(panel, row, inputs, group, scale, out);
    std::vector<float> placed(inputs);
    format->unpack(panel, row, inputs, group, scale, placed.data());
    for (size_t k = 0; k < inputs; ++k) out[order[k]] = placed[k];
}

FusedMatrix::FusedMatrix() = default;
FusedMatrix::~FusedMatrix() = default;
FusedMatrix::FusedMatrix(FusedMatrix&&) noexcept = default;
FusedMatrix& FusedMatrix::operator=(FusedMatrix&&) noexcept = default;

FusedMatrix::FusedMatrix(const FormatKernels& format, std::vector<size_t> panels, size_t inputs,
                         bool alternating)
    : panels_(std::move(panels)),
      formats_(panels_.size(), {&format, size_t{1}}),
      inputs_(inputs),
      alternating_(alternating) {
    build();
}

size_t FusedMatrix::panels() const {
    return std::accumulate(panels_.begin(), panels_.end(), size_t{0});
}

bool FusedMatrix::together() const {
    return !apart_ && std::ranges::count(formats_, formats_[0]) ==
                          static_cast<ptrdiff_t>(formats_.size());
}

void FusedMatrix::build() {
    matrices_.clear();
    holder_.assign(panels_.size(), 0);
    const bool apart = apart_ || (alternating_ && !together());
    for (size_t part = 0; part < panels_.size(); ++part) {
        const bool joins = part && !apart && formats_[part] == formats_[part - 1];
        const size_t before = joins ? matrices_.back().panels : 0;
        if (joins) matrices_.pop_back();
        matrices_.emplace_back(*formats_[part].first, formats_[part].second, before + panels_[part], inputs_);
        holder_[part] = matrices_.size() - 1;
    }
}

void FusedMatrix::set_format(const std::string& name, size_t part, const FormatKernels& format,
                             size_t group, bool apart) {
    if (!format.grouped && group != 1)
        refuse("weight '" + name + "' cannot have groups of its own in " + format.name);
    if (!scale_blocks(group)) refuse("weight '" + name + "' has groups of no inputs");
    check_empty(name);
    formats_[part] = {&format, group};
    apart_ = apart || low_rank;
    build();
}

void FusedMatrix::check_empty(const std::string& name) const {
    const bool stored = std::ranges::any_of(matrices_, [](const Matrix& m) { return m.data || m.streamed; });
    if (stored || bias) refuse("weight '" + name + "' comes too late to choose a format");
}

void FusedMatrix::add_low_rank(const std::string& name, size_t part, size_t rows, size_t rank,
                               Factor right, Factor left) {
    check_empty(name);
    if (right_of(part)) refuse("weight '" + name + "' has a low-rank term already");
    if (!rank) refuse("the low-rank term of weight '" + name + "' has the rank 0");
    if (!low_rank) low_rank = std::make_unique<LowRank>();
    const size_t begin = std::accumulate(panels_.begin(),
                                         panels_.begin() + static_cast<ptrdiff_t>(part), size_t{0});
    low_rank->parts.push_back({part, rows, rank, begin});
    low_rank->right.emplace_back(*right.format, right.group, padded(rank) / kPanel, inputs_);
    low_rank->left.emplace_back(*left.format, left.group, padded(rows) / kPanel, rank);
    apart_ = true;
    build();
}

void FusedMatrix::borrow(const std::string& name, FusedMatrix& other) {
    check_empty(name);
    if (other.low_rank) refuse("weight '" + name + "' cannot be shared with its low-rank term");
    if (panels_ != other.panels_ || inputs_ != other.inputs_)
        refuse("weight '" + name + "' is shared with a layer of another shape");
    formats_ = other.formats_;
    apart_ = other.apart_ || low_rank;
    build();
    for (size_t part = 0; part < panels_.size(); ++part) {
        if (part && holder_[part] == holder_[part - 1]) continue;
        const Place from = other.place(part);
        Matrix& to = matrices_[holder_[part]];
        const bool whole = to.panels == from.matrix->panels;
        if (!whole && from.every != 1)
            refuse("weight '" + name + "' lies between others, and has a low-rank term here");
        to.borrow(name, *from.matrix, whole ? 0 : from.first);
    }
}

Matrix* FusedMatrix::right_of(size_t part) {
    for (size_t i = 0; low_rank && i < low_rank->parts.size(); ++i)
        if (low_rank->parts[i].weight == part) return &low_rank->right[i];
    return nullptr;
}

Matrix* FusedMatrix::left_of(size_t part) {
    Matrix* right = right_of(part);
    return right ? &low_rank->left[static_cast<size_t>(right - low_rank->right.data())] : nullptr;
}

FusedMatrix::Place FusedMatrix::place(size_t part) {
    Matrix* matrix = &matrices_[holder_[part]];
    if (alternating_ && together()) return {matrix, part, panels_.size(), part};
    const auto first_of = [&](size_t begin) {
        return std::accumulate(panels_.begin() + static_cast<ptrdiff_t>(begin),
                               panels_.begin() + static_cast<ptrdiff_t>(part), size_t{0});
    };
    const auto begin = std::ranges::find(holder_, holder_[part]) - holder_.begin();
    return {matrix, first_of(static_cast<size_t>(begin)), 1, first_of(0)};
}

}  // namespace paceline
