// Which instruction set runs: the best one that is compiled in and that the processor has, or the one LOGITLESS_ISA
// names.
#if defined(LL_X86)
#include <cpuid.h>
#endif
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace logitless {
namespace {

constexpr const char* kNames[] = {
#if defined(LL_X86)
    "avx512", "avx2",
#endif
    "portable", nullptr};

#define LL_ENTRY(name, Args) LL_CURRENT::name,
const Kernels kTables[] = {
#if defined(LL_X86)
#define LL_CURRENT avx512
    {LL_KERNELS(LL_ENTRY)},
#undef LL_CURRENT
#define LL_CURRENT avx2
    {LL_KERNELS(LL_ENTRY)},
#undef LL_CURRENT
#endif
#define LL_CURRENT portable
    {LL_KERNELS(LL_ENTRY)},
#undef LL_CURRENT
};
#undef LL_ENTRY

int index_of(const std::string& wanted) {
  std::string known;
  for (int i = 0; kNames[i]; ++i) {
    if (wanted == kNames[i]) {
      if (!isa_supported(kNames[i]))
        throw std::runtime_error("instruction set " + wanted + ": this processor does not have it");
      return i;
    }
    known += std::string(i ? ", " : "") + kNames[i];
  }
  throw std::runtime_error("instruction set " + wanted + ": expected one of " + known);
}

int choose() {
  if (const char* wanted = std::getenv("LOGITLESS_ISA"); wanted && *wanted) return index_of(wanted);
  int i = 0;
  while (!isa_supported(kNames[i])) ++i;  // portable is last and always there
  return i;
}

std::atomic<int>& chosen() {
  static std::atomic<int> index{choose()};
  return index;
}

std::atomic<bool> ran_parallel{false};
std::atomic<bool> forked{false};

}  // namespace

bool isa_supported(const char* name) {
#if defined(LL_X86)
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return std::strcmp(name, "portable") == 0;
}

const Kernels& kernels() { return kTables[chosen().load(std::memory_order_relaxed)]; }
const char* isa_name() { return kNames[chosen().load(std::memory_order_relaxed)]; }
const char* const* isa_names() { return kNames; }
void select_isa(const char* name) { chosen().store(index_of(name)); }

#if defined(LL_X86)
namespace {
// Tiles of bfloat16 in hardware, which torch's own products use: ten times as fast as vectors.
bool has_amx_bfloat16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
}  // namespace
#endif

bool product_serves(int dtype) {
  const DType type = static_cast<DType>(dtype);
  if (type == DType::kFloat32) return true;
#if defined(LL_X86)
  static const bool bfloat16 = __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa_name(), "avx512") == 0) return type != DType::kBFloat16 || bfloat16;
#endif
  return false;
}

bool product_is_faster(int dtype) {
#if defined(LL_X86)
  static const bool amx = has_amx_bfloat16();
  if (std::strcmp(isa_name(), "avx512") == 0)
    return product_serves(dtype) && (static_cast<DType>(dtype) != DType::kBFloat16 || !amx);
#endif
  static_cast<void>(dtype);
  return false;
}

bool must_be_serial() { return forked.load(std::memory_order_relaxed); }
void note_parallel_region() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    if (ran_parallel.load()) forked.store(true);
  });
  (void)registered;
  ran_parallel.store(true, std::memory_order_relaxed);
}

}  // namespace logitless
