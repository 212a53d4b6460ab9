// What the library is, and which of its code this processor can run.

extern "C" {

// Counts changes of any C function's arguments; `native.py` loads no library that says another number.
int unspool_interface() { return 3; }

// 0: nothing here runs; 1: AVX-512 (Skylake's set); 2: and AVX-512 BF16.
int unspool_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 0;
    return __builtin_cpu_supports("avx512bf16") ? 2 : 1;
#else
    return 0;
#endif
}

}  // extern "C"
