#include "bindings/model_config.hpp"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <string>
#include <utility>

#include "bindings/checks.hpp"

namespace paceline {

namespace nb = nanobind;

namespace {

// Far beyond any model, and small enough that no product of two sizes overflows.
constexpr size_t kMaxLayers = size_t{1} << 14, kMaxHeads = size_t{1} << 16;
constexpr size_t kMaxWidth = size_t{1} << 22, kMaxVocabulary = size_t{1} << 24;
constexpr size_t kMaxContext = size_t{1} << 31;

// Attribute `name` of a Python object as a `T`.
template <class T>
T attribute(nb::handle object, const char* name) {
    T value;
    const nb::object given = object.attr(name);
    if (!nb::try_cast(given, value))
        refuse(std::string(name) + " is " + nb::cast<std::string>(nb::repr(given)) +
               ", expected another type");
    return value;
}

size_t size_attribute(nb::handle object, const char* name, size_t low, size_t high) {
    const auto value = attribute<int64_t>(object, name);
    return static_cast<size_t>(
        in_range(name, value, static_cast<int64_t>(low), static_cast<int64_t>(high)));
}

float number_attribute(nb::handle object, const char* name) {
    const auto value = attribute<float>(object, name);
    if (!std::isfinite(value)) refuse(std::string(name) + " is not a finite number");
    return value;
}

// A soft cap or a clip; 0 stands for None.
float cap_attribute(nb::handle object, const char* name) {
    if (object.attr(name).is_none()) return 0.0f;
    const float cap = number_attribute(object, name);
    if (cap <= 0.0f) refuse(std::string(name) + " is not positive");
    return cap;
}

Activation activation_of(const std::string& name) {
    constexpr std::pair<const char*, Activation> kKnown[] = {{"silu", Activation::silu},
                                                             {"gelu", Activation::gelu},
                                                             {"gelu_tanh", Activation::gelu_tanh},
                                                             {"relu", Activation::relu},
                                                             {"relu2", Activation::relu2}};
    for (const auto& [text, activation] : kKnown)
        if (name == text) return activation;
    refuse("activation '" + name + "' has no kernel");
}

QKNorm qk_norm_of(const std::string& name) {
    if (name == "head") return QKNorm::head;
    if (name == "width") return QKNorm::width;
    if (name == "rotated") return QKNorm::rotated;
    refuse("qk_norm '" + name + "' has no kernel");
}

LayerShape layer_of(nb::handle layer, std::vector<nb::object>& ropes) {
    LayerShape shape{};
    shape.heads = size_attribute(layer, "heads", 0, kMaxHeads);
    shape.kv_heads = size_attribute(layer, "kv_heads", 0, kMaxHeads);
    shape.head_dim = size_attribute(layer, "head_dim", 1, kLargestHead);
    shape.intermediate = size_attribute(layer, "intermediate", 0, kMaxWidth);
    if (shape.kv_heads ? shape.heads % shape.kv_heads || !shape.heads : shape.heads > 0)
        refuse("heads must be a multiple of kv_heads, or both 0");
    if (!layer.attr("window").is_none())
        shape.window = size_attribute(layer, "window", 1, kMaxContext);
    shape.sinks = size_attribute(layer, "sinks", 0, shape.window ? kMaxContext : 0);
    nb::object rope = layer.attr("rope");
    shape.rope = -1;
    if (rope.is_none()) return shape;
    shape.rope_dim = size_attribute(rope, "dim", 2, shape.head_dim);
    shape.rope_adjacent = attribute<bool>(rope, "adjacent");
    shape.query_growth = number_attribute(rope, "query_growth");
    shape.query_length = size_attribute(rope, "query_length", 1, kMaxContext);
    if (shape.rope_dim % 2) refuse("the rotated part of a head must be even");
    const auto known = std::find_if(ropes.begin(), ropes.end(),
                                    [&](const nb::object& other) { return other.equal(rope); });
    shape.rope = static_cast<int>(known - ropes.begin());
    if (known == ropes.end()) ropes.push_back(rope);
    return shape;
}

}  // namespace

Shape shape_of(nb::handle config, std::vector<nb::object>& ropes) {
    Shape shape{};
    shape.vocabulary = size_attribute(config, "vocab_size", 1, kMaxVocabulary);
    shape.hidden = size_attribute(config, "hidden_size", 1, kMaxWidth);
    shape.context = size_attribute(config, "context", 1, kMaxContext);
    const nb::object layers = config.attr("layers");
    if (!nb::isinstance<nb::sequence>(layers)) refuse("layers is no sequence of layers");
    for (nb::handle layer : layers) {
        shape.layers.push_back(layer_of(layer, ropes));
        size_in_range("the number of layers", shape.layers.size(), 1, kMaxLayers);
    }
    size_in_range("the number of layers", shape.layers.size(), 1, kMaxLayers);
    if (std::ranges::none_of(shape.layers, [](const LayerShape& each) { return each.heads; }))
        refuse("no layer has attention");
    const auto norm = attribute<std::string>(config, "norm");
    if (norm != "rms" && norm != "layer" && norm != "plain")
        refuse("norm '" + norm + "' has no kernel");
    shape.centred_norm = norm != "rms";
    shape.weighted_norm = norm != "plain";
    shape.norm_eps = number_attribute(config, "norm_eps");
    shape.norm_offset = number_attribute(config, "norm_offset");
    shape.activation = activation_of(attribute<std::string>(config, "activation"));
    shape.gated = attribute<bool>(config, "gated");
    shape.parallel = attribute<bool>(config, "parallel");
    shape.pre_norm = attribute<bool>(config, "pre_norm");
    shape.qk_norm = qk_norm_of(attribute<std::string>(config, "qk_norm"));
    shape.tied = attribute<bool>(config, "tied");
    shape.learned_positions = attribute<bool>(config, "learned_positions");
    shape.position_offset = size_attribute(config, "position_offset", 0, kMaxContext);
    shape.attention_scale = number_attribute(config, "attention_scale");
    shape.embedding_scale = number_attribute(config, "embedding_scale");
    shape.residual_scale = number_attribute(config, "residual_scale");
    shape.logit_scale = number_attribute(config, "logit_scale");
    shape.qkv_clip = cap_attribute(config, "qkv_clip");
    shape.attention_softcap = cap_attribute(config, "attention_softcap");
    shape.logit_softcap = cap_attribute(config, "logit_softcap");
    shape.ropes = ropes.size();
    return shape;
}

}  // namespace paceline
