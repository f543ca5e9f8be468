// Keys of a prompt in clusters, for one kv head: what choices of single positions need of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

// Rows of the clustered positions lie a second time in `pages`, cluster by cluster, so that a cluster
// is read without what lies between its positions.
struct Clusters {
    size_t fixed;     // positions: 0 .. fixed - 1, whole panels of a prompt
    size_t count;     // clusters, in the order of the coarse ones
    size_t tops;      // coarse clusters; 0: none
    float* centroids;      // means of keys, [panel of 16 clusters][D][16]
    float* top_centroids;  // means of centroids, likewise
    int32_t* labels;       // [fixed]: cluster of each position
    int32_t* rows;         // [fixed]: row of each position
    int32_t* places;       // [fixed]: position of each row
    int32_t* starts;       // [count + 1]: first row of each cluster
    int32_t* parents;      // [count]: coarse cluster, increasing
    const uint8_t* const* pages;
};

// Points [panel of 16][D][16], in an even number of panels, to cluster by direction.
struct Points {
    const float* values;
    size_t size, dim;
};

}  // namespace paceline
