// Prints the instruction sets that run here, the fastest first.
#include <cstdio>

#include "kernels/isa.hpp"

int main() {
    for (const paceline::Kernels* kernels : paceline::runnable()) std::printf("%s ", kernels->isa);
    std::printf("\n");
}
