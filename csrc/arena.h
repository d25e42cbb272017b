// The staging memory: one mapping, cut into equal page-aligned chunks.
//
// Forked children do not inherit it (MADV_DONTFORK): O_DIRECT from private pages while another
// thread forks is undefined (open(2), NOTES), and DataLoader workers fork.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "device.h"

namespace asyncckpt {

class Arena {
 public:
  // `chunk_nbytes` must be a multiple of 4096 and `chunks` at least 1; throws std::bad_alloc when the
  // address space cannot be had. Pages are not touched yet.
  Arena(size_t chunks, size_t chunk_nbytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  char* chunk(size_t index) const { return base_ + index * chunk_nbytes_; }
  size_t chunks() const { return chunks_; }
  size_t chunk_nbytes() const { return chunk_nbytes_; }
  size_t nbytes() const { return chunks_ * chunk_nbytes_; }

  // Gives the memory back before the end; no chunk may be touched any more, by a device either.
  void release();

  // Leaves the memory mapped and pinned for as long as the process lives: a device may still touch it.
  void abandon();

  // Makes the pages present, so that the first save need not; stops early when `stop` turns true.
  // Safe beside threads that already use the chunks.
  void prefault(const std::atomic<bool>& stop);

  // The same, and pins the pages for the copies of every device, slab by slab, since pinning holds
  // the driver's locks against kernels being launched. Tells how many chunks, from the first, are
  // ready. What a failure leaves unpinned can be used nevertheless; copies there are slow.
  DeviceFailure pin(Device& device, const std::atomic<bool>& stop,
                    const std::function<void(size_t chunks)>& ready);

 private:
  bool populate(size_t offset, size_t nbytes);

  char* base_;
  size_t chunks_;
  size_t chunk_nbytes_;
  Device* pinned_by_ = nullptr;
  std::vector<char*> pinned_slabs_;
};

}  // namespace asyncckpt
