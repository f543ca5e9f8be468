#include "engine/weight_stream.hpp"

#include <algorithm>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace paceline {

namespace {

long process_number() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

}  // namespace

WeightStream::WeightStream(const std::string& path, size_t budget, size_t layers)
    : budget_(budget), file_(path, layers + 1), layers_(layers) {
#if defined(__GLIBC__)
    // Else the allocator keeps what layers leave, once it has seen a few large ones freed.
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 20);
#endif
}

WeightStream::~WeightStream() {
    if (forked()) {  // they are threads of another process
        for (std::thread& reader : readers_) reader.detach();
        return;
    }
    {
        std::lock_guard lock(guard_);
        closing_ = true;
    }
    work_.notify_all();
    for (std::thread& reader : readers_) reader.join();
}

size_t WeightStream::largest() const {
    size_t bytes = 0;
    for (const Layer& layer : layers_) bytes = std::max(bytes, layer.bytes);
    return bytes;
}

size_t WeightStream::held() const {
    size_t bytes = 0;
    for (const Layer& layer : layers_) bytes += layer.streamed ? 0 : layer.bytes;
    return bytes;
}

size_t WeightStream::streamed_layers() const {
    return static_cast<size_t>(std::ranges::count_if(layers_, &Layer::streamed));
}

size_t WeightStream::streamed_bytes() const {
    size_t bytes = 0;
    for (const Layer& layer : layers_) bytes += layer.streamed ? layer.bytes : 0;
    return bytes;
}

void WeightStream::place(size_t layer, std::vector<Matrix*> matrices, size_t others) {
    layers_[layer] = {std::move(matrices), 0, false, 0};
    layers_[layer].bytes = LayerFile::room(layers_[layer].matrices);
    if (others + held() + kSlots * largest() > budget_) write(layer);
}

void WeightStream::write(size_t layer) {
    file_.write(layer, layers_[layer].matrices);
    layers_[layer].streamed = true;
}

void WeightStream::place_rows(Matrix& matrix) {
    rows_ = &matrix;
    file_.write(layers_.size(), std::span(&rows_, 1), LayerFile::kRowPiece);
}

// Brings an entry of the file back into memory.
void WeightStream::load(size_t entry, std::span<Matrix* const> matrices) {
    const AlignedBuffer memory = file_.read(entry);
    for (Matrix* matrix : matrices) {
        matrix->streamed = false;
        matrix->reserve();
        std::memcpy(matrix->data.bytes(), memory.bytes() + matrix->place, matrix->bytes());
    }
}

bool WeightStream::finish(size_t others) {
    const size_t fewest = others + kSlots * largest();
    const size_t rows = rows_ ? rows_->bytes() : 0;
    const bool fits = others + rows + held() + streamed_bytes() <= budget_;
    if (!fits && fewest > budget_)
        throw std::invalid_argument(
            "the memory for weights is " + std::to_string(budget_) + " bytes, expected at least " +
            std::to_string(fewest) + ": what is no part of a layer takes " + std::to_string(others) +
            ", and two layers " + std::to_string(kSlots * largest()));
    if (fits && rows_) load(layers_.size(), std::span(&rows_, 1));
    for (size_t layer = 0; fits && layer < layers_.size(); ++layer)
        if (layers_[layer].streamed) load(layer, layers_[layer].matrices);
    for (size_t layer = layers_.size(); !fits && layer-- > 0;)
        if (!layers_[layer].streamed && others + held() + kSlots * largest() > budget_)
            write(layer);
    if (!fits) start();
#if defined(__GLIBC__)
    malloc_trim(0);  // layers that were packed and written
#endif
    return !fits;
}

void WeightStream::start() {
    size_t bytes = 0;
    for (const Layer& layer : layers_) bytes = std::max(bytes, layer.streamed ? layer.bytes : 0);
    for (Slot& slot : slots_) slot.memory = AlignedBuffer(bytes);
    process_ = process_number();
    for (size_t i = 0; i < kReaders; ++i) readers_.emplace_back([this] { serve(); });
}

bool WeightStream::forked() const { return !readers_.empty() && process_ != process_number(); }

void WeightStream::begin(const std::vector<size_t>& layers) {
    if (forked())
        throw FileError("a model whose weights stream cannot be used in a forked process; open it "
                        "again there");
    last_.clear();
    for (const size_t layer : layers)
        if (layers_[layer].streamed) last_.push_back(layer);
    std::unique_lock lock(guard_);
    uint64_t turn = released_;
    for (size_t i = 0; i < last_.size() && turn < planned() && layer_at(turn) == last_[i]; ++i)
        ++turn;
    if (!failure_.empty()) turn = released_;
    if (turn < planned() || !failure_.empty()) cancel_from(turn, lock);
    order_.insert(order_.end(), last_.begin() + static_cast<ptrdiff_t>(turn - released_),
                  last_.end());
    for (size_t i = 0; i < last_.size(); ++i) layers_[last_[i]].turn = released_ + i;
    work_.notify_all();
}

// Forgets the turns from `turn` on, once nobody reads any more.
void WeightStream::cancel_from(uint64_t turn, std::unique_lock<std::mutex>& lock) {
    pausing_ = true;
    news_.wait(lock, [&] { return busy_ == 0; });
    pausing_ = false;
    failure_.clear();
    order_.resize(turn - released_);
    if (claimed_ >= turn) piece_ = 0;
    claimed_ = std::min(claimed_, turn);
    loaded_ = std::min(loaded_, turn);
}

const uint8_t* WeightStream::address(size_t layer) const {
    const Layer& at = layers_[layer];
    return at.streamed ? slots_[at.turn % kSlots].memory.bytes() : nullptr;
}

bool WeightStream::wait(size_t layer) {
    std::unique_lock lock(guard_);
    const uint64_t turn = layers_[layer].turn;
    news_.wait(lock, [&] { return loaded_ > turn || !failure_.empty(); });
    return loaded_ > turn;
}

bool WeightStream::unpack(const Matrix& matrix, size_t row, float scale, float* out) {
    try {
        file_.unpack(matrix, row, scale, out);
        return true;
    } catch (const std::exception& failed) {
        std::lock_guard lock(guard_);
        failure_ = failed.what();
        return false;
    }
}

void WeightStream::release() {
    {
        std::lock_guard lock(guard_);
        order_.pop_front();
        ++released_;
    }
    work_.notify_all();
}

void WeightStream::end() {
    std::lock_guard lock(guard_);
    if (!failure_.empty()) throw FileError(failure_);
    order_.insert(order_.end(), last_.begin(),
                  last_.begin() + static_cast<ptrdiff_t>(std::min(last_.size(), kSlots)));
    work_.notify_all();
}

void WeightStream::serve() {
    std::unique_lock lock(guard_);
    while (true) {
        work_.wait(lock, [&] { return closing_ || can_claim(); });
        if (closing_) return;
        read_piece(lock);
    }
}

// Reads the next piece that nobody has begun with.
void WeightStream::read_piece(std::unique_lock<std::mutex>& lock) {
    const uint64_t turn = claimed_;
    const size_t layer = layer_at(turn), piece = piece_++;
    Slot& to = slot(turn);
    if (piece == 0) to.pieces = 0;
    if (piece_ == file_.pieces(layer)) {
        ++claimed_;
        piece_ = 0;
    }
    ++busy_;
    lock.unlock();
    std::string error;
    try {
        file_.read(layer, piece, to.memory.bytes() + piece * LayerFile::kPiece);
    } catch (const std::exception& failed) {
        error = failed.what();
    }
    lock.lock();
    --busy_;
    if (!error.empty()) failure_ = error;
    ++to.pieces;
    while (failure_.empty() && loaded_ < claimed_ &&
           slot(loaded_).pieces == file_.pieces(layer_at(loaded_)))
        ++loaded_;
    news_.notify_all();
}

}  // namespace paceline
