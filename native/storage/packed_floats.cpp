#include "storage/packed_floats.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>

#include "storage/huffman.hpp"

namespace paceline {

namespace {

constexpr size_t kSlack = 1024;  // what a block may take for a moment beyond its final size

size_t chunk_count(size_t count) { return (count + kChunkNumbers - 1) / kChunkNumbers; }

size_t numbers_in(size_t count, size_t chunk) {
    return std::min(kChunkNumbers, count - chunk * kChunkNumbers);
}

// Detects every change of a single 8-byte word, and others with a probability of 1 - 2^-64 or so:
// each step is a bijection of the state for a given word, and of the word for a given state.
uint64_t checksum(const uint8_t* bytes, size_t size) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ULL;
    const auto mix = [](uint64_t state, uint64_t word) {
        return std::rotl((state ^ word) * kOdd, 29);
    };
    uint64_t lanes[4] = {1, 2, 3, 4};
    size_t i = 0;
    for (; i + 32 <= size; i += 32)
        for (size_t lane = 0; lane < 4; ++lane) {
            uint64_t word;
            std::memcpy(&word, bytes + i + 8 * lane, 8);
            lanes[lane] = mix(lanes[lane], word);
        }
    uint64_t state = size;
    for (const uint64_t lane : lanes) state = mix(state, lane);
    for (; i < size; ++i) state = mix(state, bytes[i]);
    return state ^ state >> 32;
}

template <class Word>
void split(const uint8_t* numbers, size_t count, uint8_t* planes) {
    for (size_t i = 0; i < count; ++i) {
        Word word;
        std::memcpy(&word, numbers + i * sizeof(Word), sizeof(Word));
        word = std::rotl(word, 1);
        for (size_t plane = 0; plane < sizeof(Word); ++plane)
            planes[plane * count + i] =
                static_cast<uint8_t>(word >> 8 * (sizeof(Word) - 1 - plane));
    }
}

void join2(const uint8_t* const* planes, size_t count, uint8_t* numbers) {
    const uint8_t *high = planes[0], *low = planes[1];
    for (size_t i = 0; i < count; ++i) {
        const auto word = static_cast<uint16_t>(high[i] << 8 | low[i]);
        const auto turned = static_cast<uint16_t>(word >> 1 | word << 15);
        std::memcpy(numbers + 2 * i, &turned, 2);
    }
}

void join4(const uint8_t* const* planes, size_t count, uint8_t* numbers) {
    const uint8_t *p0 = planes[0], *p1 = planes[1], *p2 = planes[2], *p3 = planes[3];
    for (size_t i = 0; i < count; ++i) {
        const uint32_t word = uint32_t{p0[i]} << 24 | uint32_t{p1[i]} << 16 | uint32_t{p2[i]} << 8 |
                              uint32_t{p3[i]};
        const uint32_t turned = word >> 1 | word << 31;
        std::memcpy(numbers + 4 * i, &turned, 4);
    }
}

// Run `work(chunk, thread)` for every chunk, each on any of the threads. It must not throw.
template <class Work>
void for_chunks(size_t chunks, size_t threads, const Work& work) {
    std::atomic<size_t> next{0};
    const auto drive = [&](size_t thread) {
        for (size_t chunk; (chunk = next.fetch_add(1)) < chunks;) work(chunk, thread);
    };
    std::vector<std::thread> others;
    for (size_t thread = 1; thread < threads; ++thread) {
        try {
            others.emplace_back(drive, thread);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: fewer do the work
        }
    }
    drive(0);
    for (std::thread& other : others) other.join();
}

// Append a plane to `out`; return its size.
size_t pack_plane(const uint8_t* plane, size_t count, bool first, std::vector<uint8_t>& out) {
    const size_t begin = out.size();
    if (!first && std::all_of(plane, plane + count, [&](uint8_t byte) { return byte == *plane; }))
        out.push_back(*plane);
    else if (!huffman_encode(plane, count, out))
        out.insert(out.end(), plane, plane + count);
    return out.size() - begin;
}

// Return where the bytes of a plane are, decoded into `room` where they are not as they were.
const uint8_t* unpack_plane(const uint8_t* data, size_t size, bool first, size_t count,
                            uint8_t* room) {
    if (size == count) return data;
    if (size == 1 && !first) {
        std::memset(room, *data, count);
        return room;
    }
    return huffman_decode(data, size, room, count) ? room : nullptr;
}

// Expand the numbers whose bits are in the bytes `begin` to `end` of the mask.
template <class Word>
void expand(const uint8_t* mask, size_t begin, size_t end, const uint8_t* numbers, uint8_t* out,
            size_t count) {
    const size_t from = 8 * begin, to = std::min(8 * end, count);
    std::memset(out + from * sizeof(Word), 0, (to - from) * sizeof(Word));
    for (size_t at = begin; at < end; at += 8) {
        uint64_t bits = 0;
        std::memcpy(&bits, mask + at, std::min<size_t>(8, end - at));
        for (; bits; bits &= bits - 1, numbers += sizeof(Word))
            std::memcpy(out + (8 * at + std::countr_zero(bits)) * sizeof(Word), numbers,
                        sizeof(Word));
    }
}

}  // namespace

PackedFloats pack_floats(const uint8_t* numbers, size_t count, size_t width, size_t threads) {
    const size_t chunks = chunk_count(count);
    threads = std::clamp<size_t>(threads, 1, std::max<size_t>(chunks, 1));
    PackedFloats packed;
    packed.sizes.resize(chunks * width);
    packed.checksums.resize(chunks);
    std::vector<std::vector<uint8_t>> parts(chunks);
    std::vector<uint8_t> room(threads * width * std::min(count, kChunkNumbers));
    for_chunks(chunks, threads, [&](size_t chunk, size_t thread) {
        const uint8_t* from = numbers + chunk * kChunkNumbers * width;
        const size_t held = numbers_in(count, chunk);
        parts[chunk].reserve(held * width + kSlack);
        uint8_t* planes = room.data() + thread * width * std::min(count, kChunkNumbers);
        width == 2 ? split<uint16_t>(from, held, planes) : split<uint32_t>(from, held, planes);
        packed.checksums[chunk] = checksum(from, held * width);
        for (size_t plane = 0; plane < width; ++plane)
            packed.sizes[chunk * width + plane] = static_cast<uint32_t>(
                pack_plane(planes + plane * held, held, plane == 0, parts[chunk]));
    });
    size_t total = 0;
    for (const auto& part : parts) total += part.size();
    packed.data.reset(new uint8_t[total]);
    packed.size = total;
    uint8_t* at = packed.data.get();
    for (auto& part : parts) {
        at = std::copy(part.begin(), part.end(), at);
        std::vector<uint8_t>().swap(part);
    }
    return packed;
}

std::optional<size_t> unpack_floats(const uint8_t* data, size_t size, const uint32_t* sizes,
                                    const uint64_t* checksums, uint8_t* numbers, size_t count,
                                    size_t width, size_t threads) {
    const size_t chunks = chunk_count(count);
    std::vector<size_t> begins(chunks);
    uint64_t end = 0;
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
        begins[chunk] = end;
        for (size_t plane = 0; plane < width; ++plane) end += sizes[chunk * width + plane];
        if (end > size) return chunk;
    }
    if (end != size) return chunks ? chunks - 1 : 0;

    threads = std::clamp<size_t>(threads, 1, std::max<size_t>(chunks, 1));
    const size_t room = width * std::min(count, kChunkNumbers);
    std::unique_ptr<uint8_t[]> rooms(new uint8_t[threads * room]);
    std::atomic<size_t> damaged{chunks};
    for_chunks(chunks, threads, [&](size_t chunk, size_t thread) {
        const size_t held = numbers_in(count, chunk);
        const uint8_t* at = data + begins[chunk];
        const uint8_t* planes[4];
        bool whole = true;
        for (size_t plane = 0; whole && plane < width; ++plane) {
            const size_t bytes = sizes[chunk * width + plane];
            uint8_t* into = rooms.get() + thread * room + plane * held;
            planes[plane] = unpack_plane(at, bytes, plane == 0, held, into);
            whole = planes[plane] != nullptr;
            at += bytes;
        }
        uint8_t* out = numbers + chunk * kChunkNumbers * width;
        if (whole) {
            width == 2 ? join2(planes, held, out) : join4(planes, held, out);
            whole = checksum(out, held * width) == checksums[chunk];
        }
        size_t before = damaged.load();
        while (!whole && chunk < before && !damaged.compare_exchange_weak(before, chunk)) {
        }
    });
    if (damaged.load() < chunks) return damaged.load();
    return std::nullopt;
}

bool expand_mask(const uint8_t* mask, const uint8_t* numbers, size_t kept, uint8_t* out,
                 size_t count, size_t width, size_t threads) {
    const size_t bytes = (count + 7) / 8, part = kChunkNumbers / 8;
    const size_t parts = chunk_count(count);
    std::vector<size_t> before(parts + 1, 0);  // numbers in the parts before each
    for (size_t i = 0; i < parts; ++i) {
        before[i + 1] = before[i];
        for (size_t at = i * part; at < std::min(bytes, (i + 1) * part); ++at)
            before[i + 1] += std::popcount(mask[at]);
    }
    if (before[parts] != kept || (count % 8 && mask[bytes - 1] >> count % 8)) return false;
    for_chunks(parts, std::clamp<size_t>(threads, 1, std::max<size_t>(parts, 1)),
               [&](size_t i, size_t) {
                   const size_t begin = i * part, end = std::min(bytes, begin + part);
                   const uint8_t* from = numbers + before[i] * width;
                   width == 2 ? expand<uint16_t>(mask, begin, end, from, out, count)
                              : expand<uint32_t>(mask, begin, end, from, out, count);
               });
    return true;
}

}  // namespace paceline
