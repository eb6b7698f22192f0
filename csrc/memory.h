// A caching allocator for CPU tensors: memory that one training step frees, the next one takes again.
#pragma once

#include <cstdint>

namespace dfs_engine {

// Whether new CPU tensors of this process, of any thread, come from it; returns what it was. Tensors that are there
// already keep their memory.
bool caching_allocator_enable(bool enabled);

// Gives what is cached back to the system, and forgets the peak that bounds it.
void empty_cache();

// Bytes of live tensors that come from it; and with the blocks that are cached.
int64_t memory_allocated();
int64_t memory_reserved();

}  // namespace dfs_engine
