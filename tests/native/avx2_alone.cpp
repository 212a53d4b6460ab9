// In place of native.cpp: the one level AVX2, so that little needs to be compiled.

#include "levels.h"

namespace unspool { const Kernels* chosen = nullptr; }

extern "C" {
int unspool_levels() { return 1; }
const char* unspool_level_name(int) { return "avx2"; }
const char* unspool_level_lacks(int) { return ""; }
void unspool_choose(int) { unspool::chosen = &unspool::avx2::kernels; }
}
