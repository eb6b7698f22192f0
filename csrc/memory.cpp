#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace dfs_engine {

namespace {

// The C library keeps smaller blocks by itself.
constexpr size_t smallest = size_t{1} << 18;

// The C library gives large blocks back to the system at once, and fresh memory costs a page fault per 4 KiB, in which
// the system clears the page. So freed blocks are kept, as torch does on CUDA. They never make what is held more than
// half as much again as the live tensors were at their peak; who was not wanted for the longest time goes first.
//
// c10::CPUCachingAllocator has the same idea for phones: its header supports it on mobile builds alone, and it finds a
// block by its exact size and keeps every freed one until it is destroyed or an allocation fails.
//
// The lock is for the bookkeeping alone: the system may take milliseconds for a large block, in which other threads
// allocate.
//
// Blocks are plain ones of c10::alloc_cpu, without a header, so that a pointer which one allocator handed out may come
// back to the other after a switch (ATen and oneDNN pass raw pointers through whichever is registered).
class CachingAllocator final : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t nbytes) override {
    if (nbytes < smallest) return c10::GetDefaultCPUAllocator()->allocate(nbytes);
    void* data = take(nbytes);
    c10::profiledCPUMemoryReporter().New(data, nbytes);
    return {data, data, &release, at::Device(at::kCPU)};
  }

  at::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }

  // The registered allocator is process-wide, and so is this.
  bool enable(bool enabled) {
    const std::lock_guard guard(mutex_);
    const bool was = enabled_;
    if (enabled != was) {
      if (enabled) stock_ = c10::GetCPUAllocator();
      c10::SetCPUAllocator(enabled ? this : stock_);
      enabled_ = enabled;
    }
    return was;
  }

  void empty() {
    Blocks evicted;
    {
      const std::lock_guard guard(mutex_);
      evicted = evict_to(0);
      peak_ = live_;
    }
    free(evicted);
  }

  int64_t allocated() {
    const std::lock_guard guard(mutex_);
    return static_cast<int64_t>(live_);
  }

  int64_t reserved() {
    const std::lock_guard guard(mutex_);
    return static_cast<int64_t>(live_ + cached_);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  using Blocks = std::map<uint64_t, Block>;  // by when they were freed, counted in releases

  static void release(void* data);

  static void free(const Blocks& blocks) {
    for (const auto& [freed, block] : blocks) c10::free_cpu(block.data);
  }

  void* take(size_t nbytes) {
    if (void* data = take_cached(nbytes)) return data;
    void* data = allocate_fresh(nbytes);
    Blocks evicted;
    {
      const std::lock_guard guard(mutex_);
      lend({data, nbytes});
      evicted = evict_to(peak_ + peak_ / 2 - live_);
    }
    free(evicted);
    return data;
  }

  // Null: there is none of about this size.
  void* take_cached(size_t nbytes) {
    const std::lock_guard guard(mutex_);
    const auto fit = by_size_.lower_bound({nbytes, 0});
    if (fit == by_size_.end() || fit->first > nbytes + nbytes / 4) return nullptr;
    // Of equal blocks the one freed last, of which most may still be in the processor's cache.
    const auto last = std::prev(by_size_.lower_bound({fit->first + 1, 0}));
    const auto cached = take_out(by_age_.find(last->second));
    lend(cached.mapped());
    return cached.mapped().data;
  }

  void* allocate_fresh(size_t nbytes) {
    try {
      return c10::alloc_cpu(nbytes);
    } catch (const c10::Error&) {
      Blocks evicted;
      {
        const std::lock_guard guard(mutex_);
        evicted = evict_to(0);
      }
      if (evicted.empty()) throw;
      free(evicted);
    }
    return c10::alloc_cpu(nbytes);
  }

  // False: the pointer is none of this allocator's.
  bool take_back(void* data) {
    {
      const std::lock_guard guard(mutex_);
      const auto found = sizes_.find(data);
      if (found == sizes_.end()) return false;
      const size_t size = found->second;
      sizes_.erase(found);
      live_ -= size;
      c10::profiledCPUMemoryReporter().Delete(data);
      if (enabled_) {
        by_age_.emplace_hint(by_age_.end(), ++releases_, Block{data, size});
        by_size_.emplace(size, releases_);
        cached_ += size;
        return true;
      }
    }
    c10::free_cpu(data);
    return true;
  }

  // The rest is called with the lock held.

  void lend(const Block& block) {
    sizes_[block.data] = block.size;
    live_ += block.size;
    peak_ = std::max(peak_, live_);
  }

  Blocks::node_type take_out(Blocks::iterator cached) {
    const auto& [freed, block] = *cached;
    by_size_.erase({block.size, freed});
    cached_ -= block.size;
    return by_age_.extract(cached);
  }

  // Takes blocks out, oldest first, until at most so many bytes are cached; the caller frees them without the lock.
  // Moves them, because there may be no memory for anything new.
  Blocks evict_to(size_t bytes) {
    Blocks evicted;
    while (cached_ > bytes) evicted.insert(evicted.end(), take_out(by_age_.begin()));
    return evicted;
  }

  std::mutex mutex_;
  bool enabled_ = false;
  c10::Allocator* stock_ = nullptr;                // what was registered before
  std::unordered_map<void*, size_t> sizes_;        // of live blocks
  Blocks by_age_;                                  // cached ones
  std::set<std::pair<size_t, uint64_t>> by_size_;  // the same: size, and when it was freed
  size_t live_ = 0, cached_ = 0, peak_ = 0;        // bytes
  uint64_t releases_ = 0;
};

// Never destroyed: tensors of other static objects may be freed later.
CachingAllocator& allocator() {
  static CachingAllocator* instance = [] {
    // A child that is forked while another thread holds the lock would wait for it forever.
    pthread_atfork(
        [] { allocator().mutex().lock(); }, [] { allocator().mutex().unlock(); }, [] { allocator().mutex().unlock(); });
    return new CachingAllocator;
  }();
  return *instance;
}

void CachingAllocator::release(void* data) {
  // Otherwise a raw pointer, of a small block or of before the switch.
  if (!allocator().take_back(data)) c10::GetDefaultCPUAllocator()->raw_deleter()(data);
}

}  // namespace

bool caching_allocator_enable(bool enabled) { return allocator().enable(enabled); }
void empty_cache() { allocator().empty(); }
int64_t memory_allocated() { return allocator().allocated(); }
int64_t memory_reserved() { return allocator().reserved(); }

}  // namespace dfs_engine
