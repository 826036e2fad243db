// Blocks of memory that stay mapped between uses, for gradients whose page faults would cost more than their
// arithmetic.
#pragma once

#include <cstddef>

namespace logitless {

struct PoolInfo {
  std::size_t limit_bytes, free_bytes, used_bytes, blocks;
};

void* pool_acquire(std::size_t bytes);  // 2 MB aligned; null when the system has no memory
void pool_release(void* block);
void pool_clear();  // gives the free blocks back to the system
PoolInfo pool_info();

}  // namespace logitless
