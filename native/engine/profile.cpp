#include "engine/profile.hpp"

#include "engine/pass.hpp"

namespace paceline {

void Pass::start_clock() {
    clock_.starts.assign(model_.threads(), std::vector<double>(steps_.size(), 0.0));
    clock_.busy = clock_.starts;
}

void Pass::run_timed(size_t step, size_t chunk, size_t thread) {
    const double start = now();
    if (clock_.starts[thread][step] == 0.0) clock_.starts[thread][step] = start;
    run(steps_[step], chunk, thread);
    clock_.busy[thread][step] += now() - start;
}

// When the first thread began with a step: then the step before it was done.
double Pass::start_of_step(size_t step) const {
    double first = 0.0;
    for (const auto& starts : clock_.starts)
        if (starts[step] != 0.0 && (first == 0.0 || starts[step] < first)) first = starts[step];
    return first;
}

// What a step reads and multiplies.
Spent Pass::moved(const Step& step) const {
    Spent spent;
    if (step.work == &Pass::multiply) {
        for (size_t i = 0; i < products_[step.index].parts; ++i) {
            const PendingProduct& linear = products_[step.index + i];
            const Matrix& matrix = *linear.matrix;
            spent.bytes += static_cast<double>(matrix.panels * matrix.panel_bytes);
            spent.macs +=
                static_cast<double>(linear.job.n * matrix.panels * kPanel * matrix.inputs);
        }
    } else if (step.work == &Pass::multiply_screen) {
        spent.bytes += static_cast<double>(model_.screen->bytes());
        spent.macs += static_cast<double>(headed_.size() * model_.screen->panels() * kPanel *
                                          shape_.hidden);
    } else if (step.work == &Pass::wait_for_layer) {
        spent.bytes += static_cast<double>(model_.stream->bytes(step.index));
    } else if (step.work == &Pass::attend) {
        const LayerShape& shape = shape_.layers[step.index];
        for (const Branch& branch : batch_) {
            size_t rows = 0;  // of all heads
            for (size_t head = 0; head < shape.kv_heads; ++head)
                rows += branch.nodes + (view_.positions ? view_.positions->size()
                                                        : branch.cache->held(step.index, head));
            const size_t block = branch.cache->block_bytes(step.index);
            spent.bytes += static_cast<double>(rows * block) / kCacheBlock;
            spent.macs += static_cast<double>(2 * branch.nodes * rows * shape.query_size()) /
                          static_cast<double>(shape.kv_heads);
        }
        for (const SharedSpan& shared_span : shared_spans_) {
            const size_t stride = batch_[0].cache->stride(step.index);
            spent.bytes -= static_cast<double>((shared_span.branches.size() - 1) * stride) * kSpan /
                           kCacheBlock;
        }
    }
    return spent;
}

void Pass::account(Profile& profile) const {
    const double end = now();
    for (size_t step = 0; step < steps_.size(); ++step) {
        const Spent more = moved(steps_[step]);
        Spent& spent = profile[static_cast<size_t>(steps_[step].part)];
        const bool last = step + 1 == steps_.size();
        spent.seconds += (last ? end : start_of_step(step + 1)) - start_of_step(step);
        for (const auto& thread : clock_.busy) spent.busy += thread[step];
        spent.bytes += more.bytes;
        spent.macs += more.macs;
    }
}

}  // namespace paceline
