#include "engine/profile.hpp"

#include "engine/pass.hpp"

namespace paceline {

void Pass::start_clock() {
    clock_.starts.assign(phases_.size(), 0.0);
    clock_.busy.assign(model_.threads(), std::vector<double>(phases_.size(), 0.0));
}

// The first chunk of a phase begins when the phase before it is done.
void Pass::work_timed(size_t phase, size_t chunk, size_t thread) {
    const double start = now();
    if (chunk == 0) clock_.starts[phase] = start;
    run(phases_[phase], chunk, thread);
    clock_.busy[thread][phase] += now() - start;
}

// What a phase reads and multiplies.
Spent Pass::moved(const Phase& phase) const {
    Spent spent;
    if (phase.work == &Pass::multiply) {
        for (size_t i = 0; i < products_[phase.index].parts; ++i) {
            const PendingProduct& linear = products_[phase.index + i];
            const Matrix& matrix = *linear.matrix;
            spent.bytes += static_cast<double>(matrix.panels * matrix.panel_bytes);
            spent.macs +=
                static_cast<double>(linear.job.n * matrix.panels * kPanel * matrix.inputs);
        }
    } else if (phase.work == &Pass::multiply_screen) {
        spent.bytes += static_cast<double>(model_.screen->bytes());
        spent.macs += static_cast<double>(headed_.size() * model_.screen->panels() * kPanel *
                                          shape_.hidden);
    } else if (phase.work == &Pass::attend) {
        const LayerShape& shape = shape_.layers[phase.index];
        for (const Branch& branch : batch_) {
            const size_t rows = seen(phase.index, branch) + branch.nodes;
            const size_t stride = branch.cache->stride(phase.index);
            spent.bytes += static_cast<double>(rows * stride) / kCacheBlock;
            spent.macs += static_cast<double>(2 * branch.nodes * rows * shape.query_size());
        }
        for (const SharedSpan& shared_span : shared_spans_) {
            const size_t stride = batch_[0].cache->stride(phase.index);
            spent.bytes -= static_cast<double>((shared_span.branches.size() - 1) * stride) * kSpan /
                           kCacheBlock;
        }
    }
    return spent;
}

void Pass::account(Profile& profile) const {
    const double end = now();
    for (size_t phase = 0; phase < phases_.size(); ++phase) {
        const Spent more = moved(phases_[phase]);
        Spent& spent = profile[static_cast<size_t>(phases_[phase].part)];
        const bool last = phase + 1 == phases_.size();
        spent.seconds += (last ? end : clock_.starts[phase + 1]) - clock_.starts[phase];
        for (const auto& thread : clock_.busy) spent.busy += thread[phase];
        spent.bytes += more.bytes;
        spent.macs += more.macs;
    }
}

}  // namespace paceline
