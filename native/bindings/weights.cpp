// Bindings that give a model its weights.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings/engine.hpp"
#include "engine/sparse_rows.hpp"
#define PACELINE_ISA portable  // names are the same for all
#include "kernels/formats/row_formats.hpp"
#include "kernels/formats/sparse_formats.hpp"
#include "kernels/sparse_group.hpp"
#include "support/file_mapping.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

using Codes = arrays::Input<uint8_t, 2>;
using Zeros = arrays::Input<uint16_t, 2>;
using Levels = arrays::Input<int8_t, 1>;
using Weight = nb::ndarray<nb::ro, nb::device::cpu>;

constexpr size_t kMappedBytes = size_t{1} << 16;  // smaller weights are not worth giving back

// bf16 comes as its bits, uint16.
TensorSource::Type type_of(const std::string& name, const Weight& weight) {
    if (weight.dtype() == nb::dtype<float>()) return TensorSource::Type::fp32;
    if (weight.dtype() == nb::dtype<uint16_t>()) return TensorSource::Type::bf16;
    if (weight.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
        weight.dtype().bits == 16 && weight.dtype().lanes == 1)
        return TensorSource::Type::fp16;
    refuse("weight '" + name + "' has an unknown type, expected float32, float16 or uint16");
}

// Only pages of a file that nobody writes may be given back: others would lose what they hold.
bool shows_a_file(Engine& engine, const Weight& weight) {
    ptrdiff_t first = 0, last = weight.itemsize();
    if (!weight.size()) return false;
    for (size_t axis = 0; axis < weight.ndim(); ++axis) {
        const ptrdiff_t reach = (static_cast<ptrdiff_t>(weight.shape(axis)) - 1) *
                                weight.stride(axis) * static_cast<ptrdiff_t>(weight.itemsize());
        (reach < 0 ? first : last) += reach;
    }
    const auto* data = static_cast<const uint8_t*>(weight.data());
    return first == 0 && static_cast<size_t>(last) >= kMappedBytes &&
           is_read_only_file(data, static_cast<size_t>(last), engine.mapped_file);
}

void set_weight(Engine& engine, const std::string& name, Weight weight, bool mapped) {
    if (weight.ndim() != 1 && weight.ndim() != 2)
        refuse("weight '" + name + "' has " + std::to_string(weight.ndim()) +
               " axes, expected 1 or 2");
    const bool matrix = weight.ndim() == 2;
    const ptrdiff_t size = weight.itemsize();
    const TensorSource source{.data = static_cast<const uint8_t*>(weight.data()),
                              .type = type_of(name, weight),
                              .rows = matrix ? weight.shape(0) : 1,
                              .columns = weight.shape(matrix),
                              .row_step = matrix ? weight.stride(0) * size : 0,
                              .column_step = weight.stride(matrix) * size,
                              .matrix = matrix,
                              .mapped = mapped && shows_a_file(engine, weight)};
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        engine.model.set(name, source);
    });
}

// Of scales in two grains.
struct Nested {
    std::optional<Codes> steps;
    std::optional<Levels> levels;
};

// Arrays that describe integers with scales; `codes` may be null where they are not read.
GroupedRows grouped_rows(int bits, const uint8_t* codes, size_t inputs, const Matrix32& scales,
                         const std::optional<Zeros>& zeros, const Nested& nested,
                         const std::vector<int32_t>* block_groups) {
    const size_t rows = scales.shape(0);
    const size_t groups = nested.steps ? nested.steps->shape(1) : scales.shape(1);
    if (bits < 1 || bits > 8)
        refuse("codes have " + std::to_string(bits) + " bits, expected 1 to 8");
    const auto expect = [&](const auto& array, size_t columns, const char* what) {
        if (array && (array->shape(0) != rows || array->shape(1) != columns))
            refuse(std::string(what) + " and scales differ in size");
    };
    expect(zeros, groups, "zero points");
    expect(nested.steps, groups, "steps");
    if (nested.steps && scales.shape(1) != 1) refuse("rows have one scale beside their steps");
    if (nested.levels && (!nested.steps || zeros || nested.levels->size() != size_t{1} << bits))
        refuse("levels are one for each code, with steps and without zero points");
    if (block_groups) {
        if (block_groups->size() != (inputs + kBlockInputs - 1) / kBlockInputs)
            refuse("block_groups has " + std::to_string(block_groups->size()) +
                   " entries, expected one for every " + std::to_string(kBlockInputs) + " inputs");
        for (size_t i = 0; i < block_groups->size(); ++i)
            if ((*block_groups)[i] < 0 || static_cast<size_t>((*block_groups)[i]) >= groups)
                refuse("a block belongs to none of the groups");
    }
    return {.rows = rows,
            .inputs = inputs,
            .groups = groups,
            .bits = bits,
            .codes = codes,
            .scales = scales.data(),
            .zeros = zeros ? zeros->data() : nullptr,
            .block_groups = block_groups ? block_groups->data() : nullptr,
            .steps = nested.steps ? nested.steps->data() : nullptr,
            .levels = nested.levels ? nested.levels->data() : nullptr};
}

const std::vector<int32_t> no_numbers;

std::vector<int32_t> numbers_of(const Ints& array) {
    return {array.data(), array.data() + array.size()};
}

// The same with the room for the weights of a panel, for formats that keep those alone which are not
// zero; at least one byte, as none means that there is no such format.
uint64_t sparse_group(int bits, Codes codes, Matrix32 scales, std::optional<Zeros> zeros,
                      Ints block_groups, size_t group) {
    if (codes.shape(0) != scales.shape(0)) refuse("codes and scales differ in rows");
    const std::vector<int32_t> groups = numbers_of(block_groups);
    const GroupedRows rows =
        grouped_rows(bits, codes.data(), codes.shape(1), scales, zeros, {}, &groups);
    if (!scale_blocks(group) || weight_room(group)) refuse("a group has no such number of blocks");
    nb::gil_scoped_release unlocked;
    return group | static_cast<uint64_t>(largest_panel(rows) + 1) << kRoomShift;
}

bool format_holds(const std::string& format, int bits, Matrix32 scales, std::optional<Zeros> zeros,
                  std::optional<Codes> steps, std::optional<Levels> levels,
                  std::optional<Codes> codes, std::optional<Ints> block_groups) {
    const FormatKernels& kernels = find_format(*runnable().back(), format);
    if (codes.has_value() != block_groups.has_value() ||
        (codes && codes->shape(0) != scales.shape(0)))
        refuse("codes come with as many scales, and with the group of each block");
    const std::vector<int32_t> groups = block_groups ? numbers_of(*block_groups) : no_numbers;
    const GroupedRows rows =
        grouped_rows(bits, codes ? codes->data() : nullptr, codes ? codes->shape(1) : 0, scales,
                     zeros, {steps, levels}, codes ? &groups : nullptr);
    nb::gil_scoped_release unlocked;
    return kernels.holds && kernels.holds(rows);
}

// Bits of a weight in rows of so many inputs.
double format_bits(const std::string& format, size_t inputs, size_t group) {
    const FormatKernels& kernels = find_format(*runnable().back(), format);
    if (!inputs || !scale_blocks(group)) refuse("rows and groups need inputs");
    return 8.0 * static_cast<double>(kernels.panel_bytes(inputs, group)) /
           static_cast<double>(kPanel * inputs);
}

void load_weight(Engine& engine, const std::string& name, int bits, Codes codes, Matrix32 scales,
                 std::optional<Zeros> zeros, Ints block_groups, std::optional<Ints> order,
                 std::optional<Codes> steps, std::optional<Levels> levels) {
    const size_t inputs = codes.shape(1);
    if (codes.shape(0) != scales.shape(0)) refuse("codes and scales differ in rows");
    const std::vector<int32_t> groups = numbers_of(block_groups);
    const GroupedRows rows = grouped_rows(bits, codes.data(), inputs, scales, zeros,
                                          {steps, levels}, &groups);
    std::vector<int32_t> places;
    if (order) {
        places.assign(order->data(), order->data() + order->size());
        std::vector<bool> taken(inputs);
        for (const int32_t k : places) {
            if (k < 0 || static_cast<size_t>(k) >= inputs || taken[static_cast<size_t>(k)])
                refuse("order names no input, or one twice");
            taken[static_cast<size_t>(k)] = true;
        }
        if (places.size() != inputs) refuse("order and codes differ in inputs");
    }
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        for (size_t i = 0; i < codes.size(); ++i)
            if (codes.data()[i] >> bits) refuse("a code has more than its bits");
        engine.model.load(name, rows, places);
    });
}

void load_blocks(Engine& engine, const std::string& name, Codes data, size_t inputs,
                 bool mapped) {
    mapped = mapped && data.nbytes() >= kMappedBytes &&
             is_read_only_file(data.data(), data.nbytes(), engine.mapped_file);
    const StoredRows rows{.data = data.data(),
                          .rows = data.shape(0),
                          .row_bytes = data.shape(1),
                          .inputs = inputs,
                          .mapped = mapped};
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        engine.model.load_blocks(name, rows);
    });
}

bool is_in_rows(const std::string& name) {
#define NAME(name, Type) #name,
    const char* const names[] = {ROW_FORMATS(NAME)};
#undef NAME
    return std::ranges::find(names, name) != std::end(names);
}

// Kernels of small groups have scales of whole fours of inputs, and sixteen of these at a time.
bool has_kernels(const std::string& format, size_t group) {
    const size_t groups[] = {4, 8, 16, 32, 64};
    return !is_in_rows(format) || !format.starts_with("fine") ||
           std::ranges::find(groups, group) != std::end(groups);
}

void set_format(Engine& engine, const std::string& name, const std::string& format, bool apart,
                size_t group) {
    if (!has_kernels(format, group))
        refuse("weight '" + name + "' has groups of " + std::to_string(group) + " inputs, expected "
               "4, 8, 16, 32 or 64 in " + format);
    locked(engine, [&] {
        engine.model.weights.set_format(name, find_format(engine.model.kernels, format),
                                        group, apart);
    });
}

void add_low_rank(Engine& engine, const std::string& name, size_t rank,
                  const std::string& right_format, size_t right_group,
                  const std::string& left_format, size_t left_group) {
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        const auto factor = [&](const std::string& format, size_t group) {
            const FormatKernels& kernels = find_format(engine.model.kernels, format);
            if (!scale_blocks(group) || is_in_rows(format) || (!kernels.grouped && group != 1))
                refuse("format " + format + " cannot hold a factor with such groups");
            return FusedMatrix::Factor{&kernels, group};
        };
        if (rank > size_t{1} << 20) refuse("a low-rank term has the rank " + std::to_string(rank));
        engine.model.weights.add_low_rank(name, rank, factor(right_format, right_group),
                                          factor(left_format, left_group));
    });
}

void share_weights(Engine& engine, const std::string& name, const std::string& other) {
    locked(engine, [&] {
        if (engine.ready) refuse("the model is already loaded");
        if (engine.model.stream) refuse("weights that stream from a file are not shared");
        engine.model.weights.share(name, other);
    });
}

bool has_low_rank(Engine& engine, const std::string& name) {
    return locked(engine, [&] { return engine.model.weights.has_low_rank(name); });
}

Logits get_weight(Engine& engine, const std::string& name) {
    const auto [rows, inputs] =
        locked(engine, [&] { return engine.model.weights.extent_of(name); });
    auto values = std::make_unique<float[]>(rows * inputs);
    locked(engine, [&, width = inputs] {
        engine.model.get(name, [&](size_t row, const std::vector<float>& from) {
            std::copy(from.begin(), from.end(), values.get() + row * width);
        });
    });
    return arrays::owned(std::move(values), rows, inputs);
}

bool is_sparse(const std::string& name) {
#define NAME(name) #name,
    const char* const names[] = {SPARSE_FORMATS(NAME)};
#undef NAME
    return std::ranges::find(names, name) != std::end(names);
}

// Name, format of the head beside it, whether a head may have it, bits of a weight, and what
// weights it holds.
std::vector<std::tuple<std::string, std::string, bool, double, std::string>> weight_formats() {
    constexpr size_t kInputs = 4096;
    std::vector<std::tuple<std::string, std::string, bool, double, std::string>> formats;
    for (const FormatKernels* const* at = runnable().back()->formats; *at; ++at) {
        const double bytes = static_cast<double>((*at)->panel_bytes(kInputs, 1));
        const char* kind = is_sparse((*at)->name)    ? "sparse"
                           : is_in_rows((*at)->name) ? "rows"
                           : (*at)->grouped          ? "groups"
                           : (*at)->load_blocks      ? "blocks"
                                                     : "floats";
        formats.emplace_back((*at)->name, (*at)->head, (*at)->for_heads,
                             8 * bytes / static_cast<double>(kPanel * kInputs), kind);
    }
    return formats;
}

void finish_loading(Engine& engine) {
    locked(engine, [&] {
        engine.model.finish();
        engine.ready = true;
        engine.mapped_file = {};
    });
}

size_t set_byte_activations(Engine& engine, const std::vector<std::string>& names) {
    ByteKinds kinds{};
    const std::pair<const char*, bool*> known[] = {{"qkv", &kinds.qkv},
                                                   {"output", &kinds.output},
                                                   {"up", &kinds.up},
                                                   {"down", &kinds.down},
                                                   {"head", &kinds.head}};
    for (const std::string& name : names) {
        const auto* kind = std::ranges::find(known, name, [](const auto& each) {
            return std::string(each.first);
        });
        if (kind == std::end(known)) refuse("no products are called '" + name + "'");
        *kind->second = true;
    }
    return locked(engine, [&] {
        if (!engine.ready) refuse("the model is not loaded");
        return engine.model.weights.set_byte_activations(kinds);
    });
}

void stream_weights(Engine& engine, const std::string& path, size_t budget) {
    locked(engine, [&] {
        if (!engine.model.weights.empty() || engine.ready)
            refuse("weights were stored before they were told to stream");
        engine.model.stream_weights(path, budget);
    });
}

void extend_rope(Engine& engine, size_t index, Matrix32 cosines, Matrix32 sines) {
    const bool same = cosines.shape(0) == sines.shape(0) && cosines.shape(1) == sines.shape(1);
    const auto uses = [&](const LayerShape& layer) {
        return layer.rope >= 0 && static_cast<size_t>(layer.rope) == index &&
               layer.rope_dim / 2 == cosines.shape(1);
    };
    const auto& layers = engine.model.shape.layers;
    if (!same || std::none_of(layers.begin(), layers.end(), uses))
        refuse("cosines and sines must both be [positions, dim / 2]");
    locked(engine,
           [&] { engine.model.extend_rope(index, cosines.data(), sines.data(), cosines.size()); });
}

}  // namespace

void bind_loading(nb::class_<Engine>& model) {
    model
        .def(
            "set", &set_weight, nb::arg("name"), nb::arg("weight").noconvert(),
            nb::arg("mapped") = false,
            nb::sig("def set(self, name: str, weight: NDArray[Any], mapped: bool = False) -> None"),
            "Store a weight under its canonical name, e.g. `layers.3.q`. `mapped`: it shows a\n"
            "file, whose pages may be given back to the system once they are read.")
        .def("get", &get_weight, nb::arg("name"), nb::sig("def get(self, name: str) -> Floats"),
             "Return a matrix as it is stored, float32 [out, in].")
        .def("set_format", &set_format, nb::arg("name"), nb::arg("weight_format"),
             nb::arg("apart") = false, nb::arg("group") = 1,
             nb::sig("def set_format(self, name: str, weight_format: str, apart: bool = False, "
                     "group: int = 1) -> None"),
             "Choose the format of a matrix, before those that are multiplied with it have values.\n"
             "`apart`: it is not stored together with them, as their inputs come in other orders.\n"
             "`group` blocks of `BLOCK_INPUTS` inputs share a scale, where the format leaves it\n"
             "open.")
        .def("add_low_rank", &add_low_rank, nb::arg("name"), nb::arg("rank"),
             nb::arg("right_format"), nb::arg("right_group"), nb::arg("left_format"),
             nb::arg("left_group"),
             nb::sig("def add_low_rank(self, name: str, rank: int, right_format: str, "
                     "right_group: int, left_format: str, left_group: int) -> None"),
             "Add to a matrix of a layer the product of two of integers, which `load` takes as\n"
             "`NAME.left` [out, rank] and `NAME.right` [rank, in]; after `set_format` of those that\n"
             "are multiplied with it, before any of them has values.")
        .def("share", &share_weights, nb::arg("name"), nb::arg("other"),
             nb::sig("def share(self, name: str, other: str) -> None"),
             "Let a matrix of a layer, and those that are multiplied with it, be those of another\n"
             "layer, which has them already: in the same memory, with low-rank terms of its own.")
        .def("has_low_rank", &has_low_rank, nb::arg("name"),
             nb::sig("def has_low_rank(self, name: str) -> bool"),
             "Return whether a product of two matrices is added to a matrix.")
        .def("load", &load_weight, nb::arg("name"), nb::arg("bits"), nb::arg("codes").noconvert(),
             nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(),
             nb::arg("block_groups").noconvert(), nb::arg("order").noconvert().none(),
             nb::arg("steps").noconvert() = nb::none(),
             nb::arg("levels").noconvert() = nb::none(),
             nb::sig("def load(self, name: str, bits: int, codes: NDArray[np.uint8], "
                     "scales: Floats, zeros: NDArray[np.uint16] | None, block_groups: Tokens, "
                     "order: Tokens | None, steps: NDArray[np.uint8] | None = None, "
                     "levels: NDArray[np.int8] | None = None) -> None"),
             "Store a matrix of integers as it is: codes [out, in] with scales and zero points\n"
             "[out, groups], the group of every `BLOCK_INPUTS` inputs, and which input comes at\n"
             "each place. With `steps` [out, groups] a scale is that of its row [out, 1] times them,\n"
             "in fp16; with `levels` [2 ** bits], codes name numbers.")
        .def("load_blocks", &load_blocks, nb::arg("name"), nb::arg("data").noconvert(),
             nb::arg("inputs"), nb::arg("mapped") = false,
             nb::sig("def load_blocks(self, name: str, data: NDArray[np.uint8], inputs: int, "
                     "mapped: bool = False) -> None"),
             "Store a matrix of a GGUF file as it is, after `set_format` with its type in lower\n"
             "case, or rows that a format of `rows` takes: uint8 [out, bytes of a row]. `mapped`:\n"
             "as for `set`.")
        .def("finish", &finish_loading, "Check that no weight is missing; then passes can run.")
        .def("stream_weights", &stream_weights, nb::arg("path"), nb::arg("budget"),
             nb::sig("def stream_weights(self, path: str, budget: int) -> None"),
             "Keep at most `budget` bytes of weights in memory, and read other layers from a new\n"
             "file at `path` in each pass; before any weight is stored. The file has no name while\n"
             "it is open.")
        .def("set_byte_activations", &set_byte_activations, nb::arg("kinds"),
             nb::sig("def set_byte_activations(self, kinds: list[str]) -> int"),
             "Multiply with activations rounded to 8 bits in blocks of 32 in products of these kinds\n"
             "(`qkv`, `output`, `up`, `down`, `head`) where their formats can, and in no others.\n"
             "Return the number of matrices that do. `finish` comes first.")
        .def("extend_rope", &extend_rope, nb::arg("index"), nb::arg("cosines"), nb::arg("sines"),
             nb::sig("def extend_rope(self, index: int, cosines: Floats, sines: Floats) -> None"),
             "Append angles [positions, dim / 2] to a rotary embedding of `ropes`.");
}

void bind_formats(nb::module_& m) {
    m.attr("BLOCK_INPUTS") = kBlockInputs;
    m.def("weight_formats", &weight_formats,
          nb::sig("def weight_formats() -> list[tuple[str, str, bool, float, str]]"),
          "Return the formats of weights: name, format of embedding and head where none is named,\n"
          "whether these may have it, bits of a weight in groups of `BLOCK_INPUTS`, and what it\n"
          "holds: `floats` that are rounded to it, `blocks` of a GGUF file, or integers in\n"
          "`groups` of any multiple of `BLOCK_INPUTS`, of which `sparse` keeps no zeros, or codes in\n"
          "`rows` that Python packed.");
    m.def("format_bits", &format_bits, nb::arg("name"), nb::arg("inputs"), nb::arg("group") = 1,
          nb::sig("def format_bits(name: str, inputs: int, group: int = 1) -> float"),
          "Return the bits of a weight in rows of so many inputs; `group` as in `set_format`.");
    m.def("format_holds", &format_holds, nb::arg("name"), nb::arg("bits"),
          nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(),
          nb::arg("steps").noconvert() = nb::none(), nb::arg("levels").noconvert() = nb::none(),
          nb::arg("codes").noconvert() = nb::none(),
          nb::arg("block_groups").noconvert() = nb::none(),
          nb::sig("def format_holds(name: str, bits: int, scales: Floats, "
                  "zeros: NDArray[np.uint16] | None, steps: NDArray[np.uint8] | None = None, "
                  "levels: NDArray[np.int8] | None = None, codes: NDArray[np.uint8] | None = None, "
                  "block_groups: Tokens | None = None) -> bool"),
          "Return whether a format keeps integers with scales and zero points [out, groups], or\n"
          "with scales in two grains, as they are. Sparse formats need the codes [out, in], and the\n"
          "group of every `BLOCK_INPUTS` inputs.");
    m.def("sparse_group", &sparse_group, nb::arg("bits"), nb::arg("codes").noconvert(),
          nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(),
          nb::arg("block_groups").noconvert(), nb::arg("group"),
          nb::sig("def sparse_group(bits: int, codes: NDArray[np.uint8], scales: Floats, "
                  "zeros: NDArray[np.uint16] | None, block_groups: Tokens, group: int) -> int"),
          "Return the `group` that `set_format` takes for a bitmap of integers whose scales are\n"
          "shared by `group` blocks: it says, too, how many of them are not zero.");
}

}  // namespace paceline
