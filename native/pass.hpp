// One forward pass: what each thread does, and where the threads meet.
#pragma once

#include <vector>

#include "model.hpp"

class Pass {
public:
    // Checks the batch, makes room in the caches and in the workspace.
    Pass(Model& model, const std::vector<Branch>& batch, float* logits);
    // The work of one thread.
    void run(size_t thread);
    size_t threads() const { return threads_; }
    // After all threads are done: the caches remember their trees.
    void remember();

private:
    void check(const Branch& branch);
    void reserve();
    // What a phase does; each ends with all threads having met.
    void embed(size_t thread);
    void attention_block(size_t thread, size_t layer);
    void mlp_block(size_t thread, size_t layer);
    void head(size_t thread);
    // Parts of phases.
    void multiply(size_t thread, const Matrix& matrix, const float* rows, size_t stride,
                  Product job);
    void norm_rows(size_t thread, const Norm& norm, const float* rows, float* out, size_t size,
                   size_t stride);
    void rotate(size_t thread, size_t layer);
    void attend(size_t thread, size_t layer);
    void merge(const Norm& post, size_t row);
    void norm_head(const Norm& norm, float* head, size_t dim) const;
    NormJob norm_job(const Norm& norm, size_t size) const;
    size_t attention_tile(const LayerShape& layer, size_t nodes) const;
    void meet() {
        if (threads_ > 1) model_.pool_->meet();
    }

    Model& model_;
    const Shape& shape_;
    const Kernels& kernels_;
    Workspace& work_;
    const std::vector<Branch>& batch_;
    float* logits_;
    size_t n_ = 0, threads_ = 1;
    size_t hidden_, wide_ = 0, qkv_ = 0, attended_ = 0;  // strides of the workspace's rows
    std::vector<int32_t> depths_;                         // of all nodes
    std::vector<size_t> branch_of_;                       // of all nodes
    std::vector<size_t> first_;                           // first node of each branch
    std::vector<bool> chain_;                             // of each branch
};
