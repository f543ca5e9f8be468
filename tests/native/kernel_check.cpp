// Compares the kernels of instruction sets, bit for bit, over random and hostile inputs. Compiled with
// CHECKED naming the sets, e.g. -D'CHECKED(USE)=USE(portable) USE(neon)'; the first is what the others
// are compared with. Prints how many results agree and a digest of them, which is the same on every
// machine that fuses products and sums. Ends with 1 at the first difference.
#include <cstdio>
#include <string>
#include <vector>

#include "checks.hpp"

namespace paceline {

#define DECLARE(isa) extern const Kernels kernels_##isa; extern const TopRow top_##isa;
CHECKED(DECLARE)
#undef DECLARE

}  // namespace paceline

namespace check {

namespace {

constexpr Check kChecks[] = {
    {"products", check_products, 16},
    {"attention", check_attention, 16},
    {"rows", check_rows, 28},
    {"screen", check_screen, 12},
};

// Whether two sets' records agree; prints the first difference.
bool agree(const Check& check, uint64_t seed, const char* base, const Record& expected,
           const char* isa, const Record& got) {
    if (expected.parts().size() != got.parts().size()) {
        std::printf("%s, seed %llu: %s made other results than %s\n", check.name,
                    static_cast<unsigned long long>(seed), isa, base);
        return false;
    }
    for (size_t i = 0; i < got.parts().size(); ++i) {
        const auto& a = expected.parts()[i];
        const auto& b = got.parts()[i];
        if (a.name == b.name && a.bytes == b.bytes) continue;
        size_t at = 0;
        while (at < a.bytes.size() && at < b.bytes.size() && a.bytes[at] == b.bytes[at]) ++at;
        std::printf("%s, seed %llu, %s: %s differs from %s at byte %zu of %zu\n", check.name,
                    static_cast<unsigned long long>(seed), b.name.c_str(), isa, base, at,
                    a.bytes.size());
        return false;
    }
    return true;
}

// FNV-1a
uint64_t digest(uint64_t so_far, const Record& record) {
    for (const Record::Part& part : record.parts())
        for (const uint8_t byte : part.bytes) so_far = (so_far ^ byte) * 0x100000001b3ULL;
    return so_far;
}

int run(const std::vector<const Tables*>& sets) {
    const Tables& base = *sets.front();
    for (const Check& check : kChecks) {
        uint64_t sum = 0xcbf29ce484222325ULL;
        size_t results = 0;
        for (uint64_t seed = 0; seed < check.seeds; ++seed) {
            Record want;
            check.run(base, seed, want);
            sum = digest(sum, want);
            for (size_t i = 1; i < sets.size(); ++i) {
                Record got;
                check.run(*sets[i], seed, got);
                if (!agree(check, seed, base.isa(), want, sets[i]->isa(), got)) return 1;
                results += got.parts().size();
            }
        }
        std::printf("%s: %zu results agree, digest %016llx\n", check.name, results,
                    static_cast<unsigned long long>(sum));
        std::fflush(stdout);
    }
    return 0;
}

}  // namespace

}  // namespace check

int main() {
    std::vector<const check::Tables*> sets;
#define ADD(isa)                                                                       \
    static const check::Tables isa##_tables{&paceline::kernels_##isa, paceline::top_##isa}; \
    sets.push_back(&isa##_tables);
    CHECKED(ADD)
#undef ADD
    for (const check::Tables* set : sets) std::printf("%s ", set->isa());
    std::printf("\n");
    return check::run(sets);
}
