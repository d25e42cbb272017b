#include "arena.h"

#include <errno.h>
#include <sys/mman.h>

#include <algorithm>
#include <new>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels answer EINVAL
#endif

namespace asyncckpt {

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
  if (base_ != nullptr) ::munmap(base_, nbytes());
  base_ = nullptr;
}

void Arena::prefault(const std::atomic<bool>& stop) {
  constexpr size_t kStep = size_t{32} << 20;  // small enough to stop soon
  for (size_t offset = 0; offset < nbytes() && !stop; offset += kStep) {
    const size_t step_nbytes = std::min(kStep, nbytes() - offset);
    // A refusal (old kernel, no memory) is not an error here: the pages come when they are touched.
    if (::madvise(base_ + offset, step_nbytes, MADV_POPULATE_WRITE) != 0) return;
  }
}

}  // namespace asyncckpt
