// What one instruction set offers, as plain data and function pointers.
//
// Sizes: n tokens of a pass, K inputs of a matrix. Every float row is padded with zeros to a
// multiple of 16. All results are the same for any n and any split of the work.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

constexpr size_t kPanel = 16;  // output rows that one panel holds, side by side
constexpr size_t kCacheBlock = 64;   // positions of a block of the cache
constexpr size_t kSpan = 256;        // positions whose softmax is computed apart from the others
constexpr size_t kLargestHead = 1024;
constexpr size_t kBlockInputs = 32;  // inputs that share a scale in the integer formats

inline size_t padded(size_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

enum class CacheFormat { fp32, fp16, int8, count };
enum class Activation { none, silu, gelu, gelu_tanh, relu, relu2 };

// y = w @ x for a matrix in panels: [rows / 16] panels, each `panel_bytes` long.
struct Product {
    const uint8_t* panels = nullptr;
    size_t panel_bytes = 0;
    size_t group = 1;  // blocks of kBlockInputs inputs that share a scale, where formats leave it open
    size_t inputs = 0;        // K
    const void* x = nullptr;  // what `arrange` made of the n rows
    size_t n = 0;
    const float* bias = nullptr;  // one for each row, padded; or null
    Activation activation = Activation::none;
    bool gated = false;    // panels alternate: gate, up, gate, up; out = activation(gate) * up
    bool times_out = false;  // out = result * what is there: a gate whose panels lie apart
    float softcap = 0.0f;  // 0: none
    float* out = nullptr;  // [n][stride]
    size_t stride = 0;
    size_t rows = 0;  // columns of `out` that are written
};

struct NormJob {
    const float* weight;  // padded
    const float* bias;    // padded, or null
    size_t size;
    float eps;
    bool centred;  // layer norm; otherwise root mean square
};

// A node of a kernel call whose nodes belong to several sequences.
struct SharedNode {
    const float* queries;  // head h: queries[h * D]
    size_t column;         // its own, the last that it sees
    float* states;         // [query of the kv head][spans][state]
    size_t spans;
};

// Queries first .. first + count - 1 of one kv head of a sequence: node-major (node, head in group)
// pairs. Columns are committed rows, then a node's ancestors by depth.
struct Attention {
    const uint8_t* const* pages;  // the rows of the tree lie behind the committed ones
    size_t last_page;
    size_t offset;          // of this head's block in a page
    size_t head_dim;        // D
    size_t length;          // committed rows; node i of the tree is row length + i
    const int32_t* seen;    // their positions, if not 0 .. length - 1; or null
    size_t root;            // position of node 0
    const int32_t* parents;
    const int32_t* depths;
    size_t nodes;
    bool chain;            // every node is the parent of the next
    size_t window;         // positions seen, the own included; 0: all
    size_t sinks;          // first positions, which are seen behind a window, too
    float softcap;         // 0: none
    const float* queries;  // node i, head h: queries[i * stride + h * D]
    size_t query_stride;
    float* out;            // node i, head h: out[i * out_stride + h * D]
    size_t out_stride;
    size_t first_head;     // query heads of this kv head: first_head .. first_head + group
    size_t group;
    size_t first, count;
    size_t spans;   // that the columns reach into
    float* states;  // [query][spans][state]: what each span gives, for `combine`; or null
    // The nodes, where they belong to several sequences that share the pages of a span; or null.
    // Then `length` and `root` are 0, and `states` are those of the guests.
    const SharedNode* shared_nodes;
};

// How keys and values are kept, in blocks of `kCacheBlock` positions of one head.
struct CacheKernels {
    size_t (*block_bytes)(size_t head_dim);
    // One position's key and value.
    void (*put)(uint8_t* block, size_t place, size_t head_dim, const float* key,
                const float* value);
    // `count` positions; they lie in one panel, before and after.
    void (*copy)(const uint8_t* from, size_t from_place, uint8_t* to, size_t to_place,
                 size_t count, size_t head_dim);
    // Spans first .. last - 1; without `states` all of them.
    void (*attend)(const Attention&, size_t first, size_t last, void* scratch);
    // Adds the attention that each query of a chain gives to each column to `mass` [columns];
    // `scratch` holds `mass_bytes(job)`.
    void (*add_mass)(const Attention&, double* mass, void* scratch);
    // Scores of a query [D] with the 16 rows from `row` on, a multiple of 16.
    void (*score_run)(const Attention&, size_t row, const float* query, float* scores);
};

// Rows of integers as a file holds them: input k of row r is (code - zero) * scale.
//
// In two grains, the scale of a group is `steps` times the number of its row, rounded to fp16. With
// levels, a code names one of them, and there is no zero point.
struct GroupedRows {
    size_t rows, inputs, groups;
    int bits;                     // of a code
    const uint8_t* codes;         // [rows][inputs]; not read by `holds`
    const float* scales;          // [rows][groups]; in two grains, [rows]
    const uint16_t* zeros;        // [rows][groups]; null: all are half the range
    const int32_t* block_groups;  // the group of every kBlockInputs inputs
    const uint8_t* steps = nullptr;  // [rows][groups], or null: there is one grain
    const int8_t* levels = nullptr;  // [1 << bits], or null

    int zero(size_t row, size_t group) const {
        return zeros ? zeros[row * groups + group] : 1 << (bits - 1);
    }
    // Those from row `first` on.
    GroupedRows part(size_t first, size_t count) const {
        GroupedRows some = *this;
        some.rows = count;
        some.codes += first * inputs;
        some.scales += first * (steps ? 1 : groups);
        if (zeros) some.zeros += first * groups;
        if (steps) some.steps += first * groups;
        return some;
    }
};

// How one weight format is multiplied with activations.
struct ProductKernels {
    // Bytes that n rows take after `arrange`; 0 when the row itself is read.
    size_t (*arranged_bytes)(size_t n, size_t inputs);
    // Lays n rows out for the product; part `part` of `parts` of the work. `order` says which
    // input comes at each place; null: they stay in order. Float formats take no other.
    void (*arrange)(const float* rows, size_t stride, size_t n, size_t inputs,
                    const int32_t* order, void* out, size_t part, size_t parts);
    // Panels first .. last - 1; `scratch` holds `scratch_bytes(n)`.
    void (*multiply)(const Product&, size_t first, size_t last, void* scratch);
    size_t (*scratch_bytes)(size_t n);
};

// How one weight format is stored and multiplied.
struct FormatKernels {
    const char* name;
    const char* head;  // format of embedding and head where none is named
    bool for_heads;    // whether embedding and head may have this format
    bool grouped;      // whether any number of blocks may share a scale; in others, `group` is 1
    size_t (*panel_bytes)(size_t inputs, size_t group);
    // Packs up to 16 rows [rows][inputs] into one panel, in groups of one block; missing rows are
    // zero. False: the format cannot hold these weights. Null: its weights come from a file only.
    bool (*pack)(const float* weights, size_t rows, size_t inputs, uint8_t* panel);
    // Whether `load` keeps these integers and scales as they are. Null, as `load`: it keeps none.
    bool (*holds)(const GroupedRows&);
    // Puts up to 16 rows that the format holds into one panel; missing rows are zero.
    void (*load)(const GroupedRows&, size_t group, uint8_t* panel);
    // Bytes that a GGUF file holds for a row; 0 if its blocks do not divide the inputs. Null, as
    // `load_blocks`, if the format is no GGUF type.
    size_t (*stored_row_bytes)(size_t inputs);
    // Puts `count` rows, up to 16, of a file into one panel, bit for bit; missing rows are zero.
    // False: a scale is not finite.
    bool (*load_blocks)(const uint8_t* rows, size_t row_stride, size_t count, size_t inputs,
                        uint8_t* panel);
    // Row `lane` of a panel times `scale`.
    void (*unpack)(const uint8_t* panel, size_t lane, size_t inputs, size_t group, float scale,
                   float* out);
    // Row `lane` of a panel, bit for bit, to row `to_lane` of another.
    void (*copy)(const uint8_t* panel, size_t lane, size_t inputs, size_t group, uint8_t* to,
                 size_t to_lane);
    ProductKernels product;
    // The same with activations of 8 bits. Without functions, there is none.
    ProductKernels product8;
};

// Words that a token has for a block of a coarse product: eight of four activations each, a byte
// for each; then floats: -7.5 times their sum, their scale, and the size of the block.
constexpr size_t kScreenWords = 11;

// Coarse logits of n tokens and a bound of what each misses; see head_screen.cpp.
struct ScreenProduct {
    const uint8_t* panels;
    size_t inputs;
    const int32_t* x;  // tiles of `width` tokens, the last of fewer: [blocks][kScreenWords][tokens]
    size_t n;
    float* out;        // [n][stride]
    uint16_t* bounds;  // [n][stride], the upper halves of floats
    size_t stride;     // rows of the head
};

// Sixteen rows to be copied. A block's error is what its weights miss, plus `drift` times their
// size for activations that differ, plus `rounding` times it for sums.
struct ScreenPack {
    const float* weights;  // [rows][inputs]
    size_t rows, inputs;
    float drift, rounding;
    float* scratch;  // sixteen floats for each block
};

// One row of coarse logits, and which of them are looked for: those whose score may reach a
// threshold. A score is the logit over the temperature, plus noise.
struct ScreenRow {
    const float* values;
    const uint16_t* bounds;
    float temperature, threshold;
    bool noise;
    uint64_t start;  // of the noise

    float bound(size_t at) const {
        const uint32_t bits = static_cast<uint32_t>(bounds[at]) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof(value));
        return value;
    }
};

struct ScreenKernels {
    size_t (*width)();
    size_t (*panel_bytes)(size_t inputs);
    // False: the weights are too large or too small for bounds.
    bool (*pack)(const ScreenPack&, uint8_t* panel);
    void (*multiply)(const ScreenProduct&, size_t first, size_t last);
    // Among logits first .. last - 1 the one of the largest lower bound.
    size_t (*best)(const ScreenRow&, size_t first, size_t last);
    // Those of first .. last - 1 that may reach the threshold; returns how many.
    size_t (*survivors)(const ScreenRow&, size_t first, size_t last, int32_t* out);
};

struct Kernels {
    const char* isa;
    const FormatKernels* const* formats;  // the last is followed by null
    void (*norm)(const NormJob&, const float* x, float* out);
    void (*add)(float* x, const float* y, size_t size);  // size is padded
    const CacheKernels* caches[static_cast<size_t>(CacheFormat::count)];
    // Scratch that `attend` needs for `queries` queries.
    size_t (*attention_bytes)(const Attention&, size_t queries);
    // Scratch that `add_mass` needs.
    size_t (*mass_bytes)(const Attention&);
    size_t (*state_floats)(size_t head_dim);
    // The values of one query from its `states`.
    void (*combine)(const Attention&, size_t query);
    // The sum of `bytes` / 4 floats, read as fast as they come: to measure the memory.
    float (*read)(const float* from, size_t bytes);
    const ScreenKernels* screen;
};

}  // namespace paceline
