// exp, tanh, erf and the activations on sixteen lanes. A lane's result depends on its input alone.
#pragma once

#include "kernels/kernels.hpp"
#include "kernels/simd.hpp"

namespace paceline {

namespace {

constexpr float kExpLow = -86.0f;  // below: 0, so that masked scores (-inf) weigh nothing
constexpr float kExpHigh = 88.0f;

// exp(x) = 2^n * exp(r), |r| <= ln(2) / 2, Taylor's series to the 7th power: within 2 ulp.
INLINE F16 exp(F16 x) {
    const F16 clamped = min(max(x, splat(kExpLow)), splat(kExpHigh));
    const F16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F16 n = (clamped * splat(1.44269504f) + magic) - magic;
    F16 r = fma(n, splat(-0.693359375f), clamped);  // ln(2) in two parts, the first one short
    r = fma(n, splat(2.12194440e-4f), r);
    F16 p = splat(1.0f / 5040.0f);
    p = fma(p, r, splat(1.0f / 720.0f));
    p = fma(p, r, splat(1.0f / 120.0f));
    p = fma(p, r, splat(1.0f / 24.0f));
    p = fma(p, r, splat(1.0f / 6.0f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    F16 scaled;
    for (int i = 0; i < kParts; ++i) {
        const Int exponent = __builtin_convertvector(n.part[i], Int) << 23;
        scaled.part[i] = (Reg)((Int)p.part[i] + exponent);
    }
    return where_less(x, splat(kExpLow), splat(0.0f), scaled);
}

INLINE F16 sigmoid(F16 x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

INLINE F16 tanh(F16 x) { return splat(2.0f) * sigmoid(x + x) - splat(1.0f); }

// Abramowitz and Stegun, formula 7.1.26: within 1.5e-7.
INLINE F16 erf(F16 x) {
    const F16 size = max(x, splat(0.0f) - x);
    const F16 t = splat(1.0f) / fma(splat(0.3275911f), size, splat(1.0f));
    F16 p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const F16 y = splat(1.0f) - p * t * exp(splat(0.0f) - size * size);
    return where_less(x, splat(0.0f), splat(0.0f) - y, y);
}

INLINE F16 activate(F16 x, Activation kind) {
    switch (kind) {
        case Activation::silu: return x * sigmoid(x);
        case Activation::gelu:
            return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f)));
        case Activation::gelu_tanh: {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
            const F16 cubic = fma(x * x, splat(0.044715f) * x, x);
            return x * sigmoid(splat(1.59576912f) * cubic);
        }
        case Activation::relu: return max(x, splat(0.0f));
        case Activation::relu2: {
            const F16 positive = max(x, splat(0.0f));
            return positive * positive;
        }
        case Activation::none: break;
    }
    return x;
}

INLINE F16 softcap(F16 x, float cap) { return splat(cap) * tanh(x / splat(cap)); }

}  // namespace

}  // namespace paceline
