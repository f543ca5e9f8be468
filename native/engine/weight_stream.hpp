// Decoder layers that do not fit into a number of bytes: they stay in a file, and threads of their
// own read each one into memory before a pass comes to it, while it computes an earlier one.
//
// The layers of a pass take turns in a few slots of memory, in their order. Behind a pass, the first
// layers of the next one are read ahead, on the guess that it runs the same layers. What stays in
// memory is what every pass reads anyway (embedding, head, norms) and the first layers: a pass reads
// layers in a cycle, where keeping a fixed part and streaming the rest reads the fewest bytes.
//
// Based on FlexGen (Sheng et al. 2023, arXiv:2303.06865): a layer is read once for all sequences of
// a batch and all nodes of their trees, and the next one is read meanwhile.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine/layer_file.hpp"

namespace paceline {

class WeightStream {
public:
    // At most `budget` bytes of weights shall be in memory; others go to a new file at `path`.
    // Throws FileError if it cannot be created.
    WeightStream(const std::string& path, size_t budget, size_t layers);
    ~WeightStream();
    WeightStream(const WeightStream&) = delete;
    WeightStream& operator=(const WeightStream&) = delete;

    // While the model is loaded: takes a layer whose matrices are complete, and writes them to the
    // file unless they fit. `others`: bytes of weights outside of layers, so far. Throws FileError.
    void place(size_t layer, std::vector<Matrix*> matrices, size_t others);
    bool placed(size_t layer) const { return !layers_[layer].matrices.empty(); }
    // Takes a matrix of which each pass reads a few rows, and writes it. Throws FileError.
    void place_rows(Matrix& matrix);
    // All layers are placed. False: all weights fit, and are in memory; then the stream is not
    // needed. Throws FileError, and std::invalid_argument with the smallest budget that is enough.
    bool finish(size_t others);

    // A pass runs these layers, in increasing order. Those in memory are left out.
    // Throws FileError in a forked process, which has no threads that read.
    void begin(const std::vector<size_t>& layers);
    // Where a layer of the pass is while it is held; null: its matrices are in memory.
    const uint8_t* address(size_t layer) const;
    bool streams(size_t layer) const { return layers_[layer].streamed; }
    // Waits until a layer is in memory. False: it cannot be read.
    bool wait(size_t layer);
    // The pass has come past the layer that it waited for last.
    void release();
    // The pass is over. Throws FileError if a layer could not be read; a later pass tries again.
    void end();

    // Row `row` of a matrix of `place_rows` times `scale`, in floats; several threads may. False: it
    // cannot be read, as `wait`.
    bool unpack(const Matrix& matrix, size_t row, float scale, float* out);

    // What lies in the file beside a matrix, to which its place is relative. Throws FileError.
    AlignedBuffer read(const Matrix& matrix) const { return file_.read(matrix.entry); }
    size_t bytes(size_t layer) const { return layers_[layer].bytes; }

    size_t budget() const { return budget_; }
    size_t streamed_layers() const;
    size_t streamed_bytes() const;  // that a pass over all layers reads
    int descriptor() const { return file_.descriptor(); }

private:
    struct Layer {
        std::vector<Matrix*> matrices;
        size_t bytes = 0;
        bool streamed = false;
        uint64_t turn = 0;  // in the present pass
    };
    // Memory for a layer, and how many of its pieces have been read.
    struct Slot {
        AlignedBuffer memory;
        size_t pieces = 0;
    };
    static constexpr size_t kSlots = 2, kReaders = 2;

    void write(size_t layer);
    void load(size_t entry, std::span<Matrix* const> matrices);
    size_t largest() const;
    size_t held() const;
    void start();
    bool forked() const;
    void serve();
    bool can_claim() const {
        return !pausing_ && failure_.empty() && claimed_ < planned() && claimed_ < released_ + kSlots;
    }
    void read_piece(std::unique_lock<std::mutex>& lock);
    void cancel_from(uint64_t turn, std::unique_lock<std::mutex>& lock);
    uint64_t planned() const { return released_ + order_.size(); }
    size_t layer_at(uint64_t turn) const { return order_[turn - released_]; }
    Slot& slot(uint64_t turn) { return slots_[turn % kSlots]; }

    const size_t budget_;
    LayerFile file_;
    std::vector<Layer> layers_;
    Matrix* rows_ = nullptr;  // of `place_rows`
    Slot slots_[kSlots];

    // Layers are numbered through all passes, by turns. Those before `released_` are done with,
    // those before `loaded_` are in their slots, those before `claimed_` are being read.
    mutable std::mutex guard_;
    std::condition_variable work_, news_;
    std::deque<size_t> order_;  // the layers of turns from `released_` on
    uint64_t released_ = 0, loaded_ = 0, claimed_ = 0;
    size_t piece_ = 0;  // the next one of turn `claimed_`
    size_t busy_ = 0;   // threads that read
    bool pausing_ = false, closing_ = false;
    std::string failure_;
    std::vector<size_t> last_;  // layers of the last pass
    std::vector<std::thread> readers_;
    long process_ = 0;  // that they run in
};

}  // namespace paceline
