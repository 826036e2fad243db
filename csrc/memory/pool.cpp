// Free blocks are kept up to a bound (LOGITLESS_POOL_BYTES; by default a quarter of the memory, at most 4 GiB) and the
// least recently freed ones go first. A request takes the smallest free block that wastes at most an eighth of itself.
// Thread-safe; a fork takes the lock, so a child finds the pool whole.
#include "memory/pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>

namespace logitless {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t default_limit() {
  if (const char* text = std::getenv("LOGITLESS_POOL_BYTES")) return std::strtoull(text, nullptr, 10);
  if (const char* text = std::getenv("LOGITLESS_POOL"); text && text[0] == '0' && text[1] == '\0') return 0;
  const std::size_t memory =
      static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t most = std::size_t{4} << 30;
  return memory / 4 < most ? memory / 4 : most;
}

struct Block {
  char* start;
  std::size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::list<Block> free;  // the least recently freed first
  std::unordered_map<void*, std::size_t> used;
  std::size_t limit = default_limit(), free_bytes = 0, used_bytes = 0;
};

Pool& pool() {
  static Pool* const instance = [] {  // never destroyed: tensors may outlive static destructors
    auto* p = new Pool;
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return p;
  }();
  return *instance;
}

// `bytes` mapped, of which `asked` will be written: the last huge page of many is not asked for when that is a part of
// it.
char* map_block(std::size_t bytes, std::size_t asked) {
  const std::size_t padded = bytes + kHugePage;
  void* raw = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(raw);
  const std::size_t skip = (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (skip) munmap(begin, skip);
  if (skip < kHugePage) munmap(begin + skip + bytes, kHugePage - skip);
#if defined(MADV_HUGEPAGE)
  const std::size_t whole = asked < kHugePage ? bytes : asked / kHugePage * kHugePage;
  madvise(begin + skip, whole, MADV_HUGEPAGE);  // advice: refused where huge pages are off, and nothing is lost
#else
  static_cast<void>(asked);
#endif
  return begin + skip;
}

void drop_oldest(Pool& p) {
  const Block block = p.free.front();
  p.free.pop_front();
  p.free_bytes -= block.bytes;
  munmap(block.start, block.bytes);
}

}  // namespace

void* pool_acquire(std::size_t bytes) {
  Pool& p = pool();
  if (bytes > SIZE_MAX - 2 * kHugePage) return nullptr;
  const std::size_t size = bytes ? (bytes + kHugePage - 1) / kHugePage * kHugePage : kHugePage;
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto best = p.free.end();
  for (auto it = p.free.begin(); it != p.free.end(); ++it)
    if (it->bytes >= size && it->bytes - size <= it->bytes / 8 && (best == p.free.end() || it->bytes <= best->bytes))
      best = it;
  Block block{};
  if (best != p.free.end()) {
    block = *best;
    p.free_bytes -= block.bytes;
    p.free.erase(best);
  } else {
    block = {map_block(size, bytes), size};
    while (!block.start && !p.free.empty()) {
      drop_oldest(p);
      block.start = map_block(size, bytes);
    }
    if (!block.start) return nullptr;
  }
  p.used.emplace(block.start, block.bytes);
  p.used_bytes += block.bytes;
  return block.start;
}

void pool_release(void* start) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto it = p.used.find(start);
  if (it == p.used.end()) return;
  const std::size_t bytes = it->second;
  p.used.erase(it);
  p.used_bytes -= bytes;
  p.free.push_back({static_cast<char*>(start), bytes});
  p.free_bytes += bytes;
  while (p.free_bytes > p.limit) drop_oldest(p);
}

void pool_clear() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  while (!p.free.empty()) drop_oldest(p);
}

PoolInfo pool_info() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return {p.limit, p.free_bytes, p.used_bytes, p.free.size() + p.used.size()};
}

}  // namespace logitless
