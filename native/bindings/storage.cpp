// Bindings of numbers that are stored in fewer bytes without loss.

#include <nanobind/nanobind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/arrays.hpp"
#include "bindings/checks.hpp"
#include "storage/packed_floats.hpp"
#include "support/memory.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

using Bytes = arrays::Input<uint8_t, 1>;

constexpr size_t kMaxThreads = 1024, kMaxNumbers = size_t{1} << 48;

size_t check_width(size_t width) {
    if (width != 2 && width != 4)
        refuse("numbers have " + std::to_string(width) + " bytes, expected 2 or 4");
    return width;
}

nb::tuple bound_pack(Bytes numbers, size_t width, size_t threads) {
    check_width(width);
    size_in_range("threads", threads, 1, kMaxThreads);
    if (numbers.size() % width) refuse("the bytes are no whole numbers");
    const size_t count = numbers.size() / width;
    PackedFloats packed;
    {
        nb::gil_scoped_release unlocked;
        packed = pack_floats(numbers.data(), count, width, threads);
    }
    return nb::make_tuple(arrays::owned(std::move(packed.data), packed.size), arrays::copied(packed.sizes),
                          arrays::copied(packed.checksums));
}

arrays::Array1<uint8_t> bound_unpack(Bytes data, arrays::Input<uint32_t, 1> sizes,
                                     arrays::Input<uint64_t, 1> checksums, size_t count,
                                     size_t width, size_t threads) {
    check_width(width);
    size_in_range("threads", threads, 1, kMaxThreads);
    size_in_range("the count of numbers", count, 0, kMaxNumbers);
    const size_t chunks = (count + kChunkNumbers - 1) / kChunkNumbers;
    if (checksums.size() != chunks || sizes.size() != chunks * width)
        refuse(std::to_string(count) + " numbers have " + std::to_string(chunks) +
               " chunks, and there are " + std::to_string(checksums.size()) + " checksums and " +
               std::to_string(sizes.size()) + " sizes");
    if (data.size() < count / 8)
        refuse(std::to_string(data.size()) + " bytes cannot hold " + std::to_string(count) +
               " numbers");
    check_memory("the numbers", static_cast<double>(count) * static_cast<double>(width));
    std::unique_ptr<uint8_t[]> numbers(new uint8_t[count * width]);
    std::optional<size_t> damaged;
    {
        nb::gil_scoped_release unlocked;
        damaged = unpack_floats(data.data(), data.size(), sizes.data(), checksums.data(),
                                numbers.get(), count, width, threads);
    }
    if (damaged)
        refuse("chunk " + std::to_string(*damaged) + " of " + std::to_string(chunks) +
               " is damaged");
    return arrays::owned(std::move(numbers), count * width);
}

arrays::Array1<uint8_t> bound_expand(Bytes mask, Bytes numbers, size_t count, size_t width,
                                     size_t threads) {
    check_width(width);
    size_in_range("threads", threads, 1, kMaxThreads);
    size_in_range("the count of numbers", count, 0, kMaxNumbers);
    if (mask.size() != (count + 7) / 8 || numbers.size() % width)
        refuse("a bitmap of " + std::to_string(mask.size()) + " bytes does not fit " +
               std::to_string(count) + " numbers");
    check_memory("the numbers", static_cast<double>(count) * static_cast<double>(width));
    std::unique_ptr<uint8_t[]> out(new uint8_t[count * width]);
    bool fits;
    {
        nb::gil_scoped_release unlocked;
        fits = expand_mask(mask.data(), numbers.data(), numbers.size() / width, out.get(), count,
                           width, threads);
    }
    if (!fits) refuse("the bitmap does not have a bit for each number that is kept");
    return arrays::owned(std::move(out), count * width);
}

}  // namespace

void bind_storage(nb::module_& m) {
    m.def("pack_floats", &bound_pack, nb::arg("numbers"), nb::arg("width"), nb::arg("threads") = 1,
          nb::sig("def pack_floats(numbers: NDArray[np.uint8], width: int, threads: int = 1) -> "
                  "tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.uint64]]"),
          "Return floating-point numbers of `width` bytes, 2 or 4, in fewer bytes: the bytes, the\n"
          "sizes of the planes [chunks * width] and the checksums [chunks].");
    m.def("unpack_floats", &bound_unpack, nb::arg("data"), nb::arg("sizes"), nb::arg("checksums"),
          nb::arg("count"), nb::arg("width"), nb::arg("threads") = 1,
          nb::sig("def unpack_floats(data: NDArray[np.uint8], sizes: NDArray[np.uint32], "
                  "checksums: NDArray[np.uint64], count: int, width: int, threads: int = 1) -> "
                  "NDArray[np.uint8]"),
          "Return the bytes of `count` numbers that `pack_floats` packed; a ValueError where they\n"
          "are damaged.");
    m.def("expand_mask", &bound_expand, nb::arg("mask"), nb::arg("numbers"), nb::arg("count"),
          nb::arg("width"), nb::arg("threads") = 1,
          nb::sig("def expand_mask(mask: NDArray[np.uint8], numbers: NDArray[np.uint8], "
                  "count: int, width: int, threads: int = 1) -> NDArray[np.uint8]"),
          "Return the bytes of `count` numbers: the given ones where the bits of `mask` are set,\n"
          "lowest first, zeros elsewhere.");
}

}  // namespace paceline
