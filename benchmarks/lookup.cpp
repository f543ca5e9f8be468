// Products by table look-up for one token, for AVX-512BW: T-MAC's scheme (Wei et al., arXiv
// 2407.00088). Weights are planes of bits; the signed sums of each four activations are a table of
// 16 bytes, and four bits of a plane choose one of them. `lookup.py` compiles and runs this.
//
//     lookup BITS GROUP INPUTS MEGABYTES THREADS ROUNDS
//
// Prints weights in a second, in billions, and the error of the outputs relative to their size.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr size_t kRows = 128;  // of a panel: a byte of a plane holds four bits of two rows
constexpr size_t kVector = 64;

struct Tables {
    std::vector<uint8_t> values;  // 16 for each four inputs, 128 above the sum
    std::vector<float> scales;    // of a byte, for each group
    std::vector<float> sums;      // of the activations of each group
};

void make_tables(const std::vector<float>& x, size_t group, Tables& tables) {
    for (size_t g = 0; g < x.size() / group; ++g) {
        float largest = 0, total = 0;
        for (size_t k = g * group; k < (g + 1) * group; k += 4) {
            float sum = 0;
            for (size_t i = k; i < k + 4; ++i) sum += std::fabs(x[i]), total += x[i];
            largest = std::max(largest, sum);
        }
        const float inverse = largest > 0 ? 127 / largest : 0;
        tables.scales[g] = largest / 127;
        tables.sums[g] = total;
        for (size_t k = g * group; k < (g + 1) * group; k += 4)
            for (int bits = 0; bits < 16; ++bits) {
                float sum = 0;
                for (int i = 0; i < 4; ++i) sum += bits >> i & 1 ? x[k + i] : -x[k + i];
                tables.values[k * 4 + bits] = uint8_t(int(std::lrintf(sum * inverse)) + 128);
            }
    }
}

// One panel. A code c of some bits b is sum 2^(p-1) s_p + (2^bits - 1) / 2 with signs s of its bits.
template <int kBits>
void multiply(const uint8_t* codes, const _Float16* scales, const Tables& tables, size_t inputs,
              size_t group, float* out) {
    const __m512i low = _mm512_set1_epi8(15), bytes = _mm512_set1_epi16(255);
    const float centre = ((1 << kBits) - 1) * 0.5f - (1 << (kBits - 1));
    __m512 total[8];
    for (auto& each : total) each = _mm512_setzero_ps();
    for (size_t g = 0; g < inputs / group; ++g, scales += kRows) {
        __m512i sums[kBits][4];  // even and odd bytes, of low and of high halves
        for (auto& plane : sums)
            for (auto& each : plane) each = _mm512_setzero_si512();
        for (size_t k = 0; k < group; k += 4) {
            const uint8_t* from = tables.values.data() + (g * group + k) * 4;
            const __m512i table =
                _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            for (int p = 0; p < kBits; ++p, codes += kVector) {
                const __m512i both = _mm512_loadu_si512(codes);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                const __m512i a = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
                const __m512i b = _mm512_shuffle_epi8(table, high);
                sums[p][0] = _mm512_add_epi16(sums[p][0], _mm512_and_si512(a, bytes));
                sums[p][1] = _mm512_add_epi16(sums[p][1], _mm512_srli_epi16(a, 8));
                sums[p][2] = _mm512_add_epi16(sums[p][2], _mm512_and_si512(b, bytes));
                sums[p][3] = _mm512_add_epi16(sums[p][3], _mm512_srli_epi16(b, 8));
            }
        }
        const __m512i bias = _mm512_set1_epi16(int16_t(128 * (group / 4)));
        const __m512 step = _mm512_set1_ps(tables.scales[g] * 0.5f);
        const __m512 rest = _mm512_set1_ps(centre * tables.sums[g]);
        for (int v = 0; v < 8; ++v) {
            __m512i sum = _mm512_setzero_si512();
            for (int p = 0; p < kBits; ++p) {
                const __m512i each = _mm512_sub_epi16(sums[p][v / 2], bias);
                const __m256i part = v % 2 ? _mm512_extracti64x4_epi64(each, 1)
                                           : _mm512_castsi512_si256(each);
                sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_cvtepi16_epi32(part), p));
            }
            const auto* half = reinterpret_cast<const __m256i*>(scales + v * 16);
            const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, rest);
            total[v] = _mm512_fmadd_ps(value, _mm512_cvtph_ps(_mm256_loadu_si256(half)), total[v]);
        }
    }
    for (int v = 0; v < 8; ++v) _mm512_storeu_ps(out + v * 16, total[v]);
}

// The error of the first panel beside products in double precision.
template <int kBits>
double relative_error(const uint8_t* codes, const _Float16* scales, const std::vector<float>& x,
                      size_t group, const float* out) {
    double missed = 0, size = 0;
    for (size_t row = 0; row < kRows; ++row) {
        // Outputs lie as the vectors of sums do: 16 even or odd bytes of a half after another.
        const size_t half = row / 64, odd = row / 32 % 2, byte = row % 32 * 2 + odd;
        double exact = 0;
        for (size_t k = 0; k < x.size(); ++k) {
            int code = 0;
            for (int p = 0; p < kBits; ++p)
                code |= (codes[(k / 4 * kBits + p) * kVector + byte] >> (half * 4 + k % 4) & 1) << p;
            exact += double(x[k]) * (code - (1 << (kBits - 1))) *
                     double(scales[k / group * kRows + row]);
        }
        missed += (exact - out[row]) * (exact - out[row]);
        size += exact * exact;
    }
    return std::sqrt(missed / size);
}

template <int kBits>
void measure(size_t group, size_t inputs, size_t megabytes, size_t threads, size_t rounds) {
    const size_t code_bytes = inputs / 4 * kBits * kVector, groups = inputs / group;
    const size_t panel_bytes = code_bytes + groups * kRows * sizeof(_Float16);
    const size_t panels = std::max<size_t>(1, megabytes * 1000000 / panel_bytes / threads) * threads;
    std::mt19937_64 random(0);
    std::vector<uint8_t> codes(panels * code_bytes);
    for (size_t i = 0; i + 8 <= codes.size(); i += 8) {
        const uint64_t drawn = random();
        std::memcpy(&codes[i], &drawn, 8);
    }
    std::vector<_Float16> scales(panels * groups * kRows);
    for (auto& each : scales) each = _Float16(0.01f + 0.0001f * float(random() % 100));
    std::vector<float> x(inputs), out(panels * kRows);
    std::normal_distribution<float> normal;
    for (auto& each : x) each = normal(random);
    Tables tables{std::vector<uint8_t>(inputs * 4), std::vector<float>(groups),
                  std::vector<float>(groups)};
    const auto work = [&](size_t at) {
        for (size_t p = panels * at / threads; p < panels * (at + 1) / threads; ++p)
            multiply<kBits>(codes.data() + p * code_bytes, scales.data() + p * groups * kRows,
                            tables, inputs, group, out.data() + p * kRows);
    };
    std::vector<double> seconds;
    for (size_t round = 0; round <= rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        make_tables(x, group, tables);
        std::vector<std::thread> others;
        for (size_t i = 1; i < threads; ++i) others.emplace_back(work, i);
        work(0);
        for (auto& each : others) each.join();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        if (round) seconds.push_back(took.count());  // the first warms up
    }
    std::sort(seconds.begin(), seconds.end());
    std::printf("%.3f %.5f\n",
                double(panels) * kRows * inputs / seconds[seconds.size() / 2] / 1e9,
                relative_error<kBits>(codes.data(), scales.data(), x, group, out.data()));
}

}  // namespace

int main(int count, char** words) {
    if (count != 7) return 2;
    const int bits = std::atoi(words[1]);
    const auto number = [&](int at) { return size_t(std::atoll(words[at])); };
    const auto run = bits == 2 ? measure<2> : bits == 3 ? measure<3> : measure<4>;
    run(number(2), number(3), number(4), number(5), number(6));
}
