// The attention that cached rows receive, summed when nodes are committed.
#pragma once

#include "engine/model.hpp"

namespace paceline {

// Keeps the nodes of `path` of a sequence's last pass, as KVCache::commit does. Where the sequence
// tracks attention, adds what each of them gave to the rows that it saw: node by node, so that the
// sums do not depend on the tree, the batch, the chunk or the number of threads. Where it tracks
// queries, keeps theirs.
void commit_path(Model& model, KVCache& cache, const int32_t* path, size_t count);

}  // namespace paceline
