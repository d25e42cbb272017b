#include "arena.h"

#include <errno.h>
#include <sys/mman.h>

#include <algorithm>
#include <new>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels answer EINVAL
#endif

namespace asyncckpt {
namespace {

constexpr size_t kSlabNbytes = size_t{64} << 20;  // small enough to stop soon

}  // namespace

Arena::Arena(size_t chunks, size_t chunk_nbytes) : chunks_(chunks), chunk_nbytes_(chunk_nbytes) {
  void* memory = ::mmap(nullptr, nbytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  ::madvise(base_, nbytes(), MADV_DONTFORK);
  ::madvise(base_, nbytes(), MADV_HUGEPAGE);  // fewer pages to pin per write; fine if refused
  ::madvise(base_, nbytes(), MADV_DONTDUMP);
}

Arena::~Arena() { release(); }

void Arena::release() {
  for (char* slab : pinned_slabs_) pinned_by_->unregister_memory(slab);
  pinned_slabs_.clear();
  if (base_ != nullptr) ::munmap(base_, nbytes());
  base_ = nullptr;
}

void Arena::abandon() {
  pinned_slabs_.clear();
  base_ = nullptr;
}

bool Arena::populate(size_t offset, size_t slab_nbytes) {
  return ::madvise(base_ + offset, slab_nbytes, MADV_POPULATE_WRITE) == 0;
}

void Arena::prefault(const std::atomic<bool>& stop) {
  for (size_t offset = 0; offset < nbytes() && !stop; offset += kSlabNbytes)
    // A refusal (old kernel, no memory) is not an error here: the pages come when they are touched.
    if (!populate(offset, std::min(kSlabNbytes, nbytes() - offset))) return;
}

DeviceFailure Arena::pin(Device& device, const std::atomic<bool>& stop,
                         const std::function<void(size_t chunks)>& ready) {
  pinned_by_ = &device;
  const size_t slab_chunks = std::max<size_t>(1, kSlabNbytes / chunk_nbytes_);
  for (size_t first = 0; first < chunks_ && !stop; first += slab_chunks) {
    const size_t last = std::min(chunks_, first + slab_chunks);
    const size_t slab_nbytes = (last - first) * chunk_nbytes_;
    populate(first * chunk_nbytes_, slab_nbytes);
    if (DeviceFailure failure = device.register_memory(chunk(first), slab_nbytes)) return failure;
    pinned_slabs_.push_back(chunk(first));
    ready(last);
  }
  return {};
}

}  // namespace asyncckpt
