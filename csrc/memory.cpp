#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace dfs_engine {

namespace {

// The C library keeps smaller blocks by itself.
constexpr size_t smallest = size_t{1} << 18;

// The C library gives large blocks back to the system at once, and fresh memory costs a page fault per 4 KiB, in which the
// system clears the page. So freed blocks are kept, as torch does on CUDA. They never make what is held more than half
// as much again as the live tensors were at their peak; who was not wanted for the longest time goes first.
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

  void copy_data(void* target, const void* source, size_t nbytes) const override { default_copy_data(target, source, nbytes); }

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
    const std::lock_guard guard(mutex_);
    shrink_to(0);
    peak_ = live_;
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
    uint64_t freed;  // when, in releases
  };

  static void release(void* data);

  void* take(size_t nbytes) {
    const std::lock_guard guard(mutex_);
    const auto fit = blocks_.lower_bound(nbytes);
    if (fit != blocks_.end() && fit->first <= nbytes + nbytes / 4) {
      // Of equal blocks the one freed last, of which most may still be in the processor's cache.
      const auto block = std::prev(blocks_.upper_bound(fit->first));
      const auto [size, found] = *block;
      blocks_.erase(block);
      cached_ -= size;
      lend(found.data, size);
      return found.data;
    }
    const size_t peak = std::max(peak_, live_ + nbytes), limit = peak + peak / 2;
    shrink_to(limit - (live_ + nbytes));
    void* data = nullptr;
    try {
      data = c10::alloc_cpu(nbytes);
    } catch (const c10::Error&) {
      if (cached_ == 0) throw;
      shrink_to(0);
      data = c10::alloc_cpu(nbytes);
    }
    lend(data, nbytes);
    return data;
  }

  void lend(void* data, size_t size) {
    sizes_[data] = size;
    live_ += size;
    peak_ = std::max(peak_, live_);
  }

  // False: the pointer is none of this allocator's.
  bool take_back(void* data) {
    const std::lock_guard guard(mutex_);
    const auto found = sizes_.find(data);
    if (found == sizes_.end()) return false;
    const size_t size = found->second;
    sizes_.erase(found);
    live_ -= size;
    c10::profiledCPUMemoryReporter().Delete(data);
    if (enabled_) {
      blocks_.emplace(size, Block{data, ++releases_});
      cached_ += size;
    } else {
      c10::free_cpu(data);
    }
    return true;
  }

  void shrink_to(size_t bytes) {
    while (cached_ > bytes) {
      const auto oldest = std::min_element(
          blocks_.begin(), blocks_.end(), [](const auto& a, const auto& b) { return a.second.freed < b.second.freed; });
      c10::free_cpu(oldest->second.data);
      cached_ -= oldest->first;
      blocks_.erase(oldest);
    }
  }

  std::mutex mutex_;
  bool enabled_ = false;
  c10::Allocator* stock_ = nullptr;  // what was registered before
  std::unordered_map<void*, size_t> sizes_;  // of live blocks
  std::multimap<size_t, Block> blocks_;      // cached ones, by size
  size_t live_ = 0, cached_ = 0, peak_ = 0;  // bytes
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
