// Which instruction set runs: the best one that is compiled in and that the processor has, or the one LOGITLESS_ISA
// names.
#if defined(LL_X86)
#include <cpuid.h>
#endif
#include <pthread.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

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
namespace avx512 {
bool processor_tiles_agree();
}
#endif

namespace {

constexpr const char* kTiles[] = {"none", "processor", "emulated"};

#if defined(LL_X86)
// Tiles of bfloat16 in hardware, which torch's own products use: ten times as fast as vectors.
bool has_amx_bfloat16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

// Whether the processor's tiles may be used: it has them, the system keeps them over a change of threads and grants
// them, and they multiply as they should, which another process tries that may fail.
bool processor_tiles_serve() {
#if defined(LL_X86) && defined(__linux__)
  if (const char* asked = std::getenv("LOGITLESS_AMX"); asked && std::strcmp(asked, "0") == 0) return false;
  unsigned a, b, c, d;
  if (!isa_supported("avx512") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // bfloat16, tiles
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
  unsigned kept, high;
  __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
  constexpr unsigned kShapes = 1u << 17, kNumbers = 1u << 18;
  if ((kept & (kShapes | kNumbers)) != (kShapes | kNumbers)) return false;
  constexpr long kAskFor = 0x1023, kTileNumbers = 18;  // ARCH_REQ_XCOMP_PERM, of the state of tiles
  if (syscall(SYS_arch_prctl, kAskFor, kTileNumbers) != 0) return false;
  const pid_t tried = fork();
  if (tried == 0) _exit(avx512::processor_tiles_agree() ? 0 : 1);
  int status = 1;
  return tried > 0 && waitpid(tried, &status, 0) == tried && WIFEXITED(status) && WEXITSTATUS(status) == 0;
#else
  return false;
#endif
}

std::atomic<Tiles>& tiles() {
  static std::atomic<Tiles> in_use{processor_tiles_serve() ? Tiles::kProcessor : Tiles::kNone};
  return in_use;
}

}  // namespace

Tiles tiles_in_use() { return tiles().load(std::memory_order_relaxed); }
const char* tiles_name() { return kTiles[static_cast<int>(tiles_in_use())]; }
void select_tiles(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kTiles[i])) continue;
    if (i == static_cast<int>(Tiles::kProcessor) && !processor_tiles_serve())
      throw std::runtime_error("tiles of the processor: it has none, or they may not be used");
    return tiles().store(static_cast<Tiles>(i));
  }
  throw std::runtime_error(std::string("tiles ") + name + ": expected none, processor or emulated");
}

bool product_serves(int dtype) {
  const DType type = static_cast<DType>(dtype);
  if (type == DType::kFloat32) return true;
#if defined(LL_X86)
  static const bool bfloat16 = __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa_name(), "avx512") == 0)
    return type != DType::kBFloat16 || bfloat16 || tiles_in_use() != Tiles::kNone;
#endif
  return false;
}

bool product_is_faster(int dtype) {
#if defined(LL_X86)
  static const bool amx = has_amx_bfloat16();
  if (std::strcmp(isa_name(), "avx512") == 0)
    return product_serves(dtype) &&
           (static_cast<DType>(dtype) != DType::kBFloat16 || !amx || tiles_in_use() == Tiles::kProcessor);
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
