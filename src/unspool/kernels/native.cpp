// What the library is, and which of its levels this processor can run.

#include "levels.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace unspool {

const Kernels* chosen = nullptr;

namespace {

// A level by its name in the environment, what the processor lacks for it ("" nothing), and its kernels.
struct Level {
    const char* name;
    const char* (*lacks)();
    const Kernels* kernels;
};

#if defined(__x86_64__)

struct Processor {
    unsigned basic = 0, b = 0, c = 0, d = 0, more = 0;  // leaf 1 ecx; leaf 7 ebx, ecx, edx; leaf 7, 1 eax
    std::uint64_t saved = 0;                            // registers that the operating system keeps

    Processor() {
        unsigned a = 0, skip = 0, leaves = 0;
        __get_cpuid(1, &a, &skip, &basic, &skip);
        if (__get_cpuid_count(7, 0, &leaves, &b, &c, &d) && leaves >= 1) __get_cpuid_count(7, 1, &more, &skip, &skip, &skip);
        if (!(basic >> 27 & 1)) return;
        unsigned low = 0, high = 0;
        asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        saved = static_cast<std::uint64_t>(high) << 32 | low;
    }
    bool keeps(std::uint64_t registers) const { return (saved & registers) == registers; }
};

const Processor processor;

constexpr bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }
constexpr unsigned bit(int i) { return 1u << i; }

const char* avx2_lacks() {
    return has(processor.basic, bit(12) | bit(28) | bit(29)) && has(processor.b, bit(5)) && processor.keeps(0x6)
               ? "" : "AVX2";
}


const char* avx512_lacks() {
    if (*avx2_lacks()) return avx2_lacks();
    if (!has(processor.b, bit(16) | bit(17) | bit(30) | bit(31)) || !processor.keeps(0xe6)) return "AVX-512";
    return has(processor.c, bit(11)) ? "" : "AVX-512 VNNI";
}

const char* avx512_bf16_lacks() {
    return *avx512_lacks() ? avx512_lacks() : has(processor.more, bit(5)) ? "" : "AVX-512 BF16";
}

#if defined(UNSPOOL_EMULATE)

const char* avx2_vnni_lacks() { return avx512_lacks(); }
const char* amx_lacks() { return *avx512_bf16_lacks() ? avx512_bf16_lacks() : amx::right() ? "" : "AMX that computes right"; }

#else

const char* avx2_vnni_lacks() {
    return *avx2_lacks() ? avx2_lacks() : has(processor.more, bit(4)) ? "" : "AVX-VNNI";
}

// Linux lets a process use the tiles' registers when it asks, once.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
    return false;
#endif
}

const char* amx_lacks() {
    if (*avx512_bf16_lacks()) return avx512_bf16_lacks();
    if (!has(processor.d, bit(22) | bit(24) | bit(25))) return "AMX";
    if (!processor.keeps(0x60000) || !may_use_tiles()) return "the operating system's permission for AMX";
    return amx::right() ? "" : "AMX that computes right";
}

#endif

const Level kLevels[] = {{"avx2", avx2_lacks, &avx2::kernels},
                         {"avx2-vnni", avx2_vnni_lacks, &avx2_vnni::kernels},
                         {"avx512", avx512_lacks, &avx512::kernels},
                         {"avx512-bf16", avx512_bf16_lacks, &avx512_bf16::kernels},
                         {"amx", amx_lacks, &amx::kernels}};
constexpr int kCount = 5;

#elif defined(__aarch64__)

const char* nothing_lacks() { return ""; }

const char* dotprod_lacks() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1 ? "" : "the dot product instructions";
#else
    return "";  // Apple's processors have them
#endif
}

const Level kLevels[] = {{"neon", nothing_lacks, &neon::kernels}, {"dotprod", dotprod_lacks, &dotprod::kernels}};
constexpr int kCount = 2;

#else

const Level kLevels[] = {{nullptr, nullptr, nullptr}};
constexpr int kCount = 0;

#endif

}  // namespace
}  // namespace unspool

extern "C" {

// Counts changes of any C function's arguments; `native.py` loads no library that says another number.
int unspool_interface() { return 8; }

// Levels for this kind of processor, the later the better, from 0.
int unspool_levels() { return unspool::kCount; }
const char* unspool_level_name(int level) { return unspool::kLevels[level].name; }

// What this machine lacks for a level; "" if it can run it.
const char* unspool_level_lacks(int level) { return unspool::kLevels[level].lacks(); }

// To be called before any other function, with a level that nothing lacks.
void unspool_choose(int level) { unspool::chosen = unspool::kLevels[level].kernels; }

}  // extern "C"
