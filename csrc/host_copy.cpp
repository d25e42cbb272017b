#include "host_copy.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "crc32.h"
#include "faults.h"

namespace asyncckpt {
namespace {

constexpr size_t kBufferNbytes = size_t{256} << 10;  // half of the smallest second-level cache
constexpr size_t kHugePage = size_t{2} << 20;

std::atomic<bool> unchecked{false};

// As many bytes as were copied; 0 when the source is gone, negative where the call is forbidden.
ssize_t copy_checked(char* to, const char* from, size_t nbytes) {
  // The target plays the remote side, which is pinned page by page; the source is read in place, as
  // write(2) would.
  const iovec local{const_cast<char*>(from), nbytes};
  const iovec remote{to, nbytes};
  for (;;) {
    const ssize_t copied = ::process_vm_writev(::getpid(), &local, 1, &remote, 1, 0);
    if (copied >= 0 || errno == EFAULT) return std::max<ssize_t>(copied, 0);
    if (errno != EINTR) return copied;
  }
}

}  // namespace

HostCopies::HostCopies(unsigned threads)
    : mapping_nbytes_((threads * kBufferNbytes + kHugePage - 1) / kHugePage * kHugePage +
                      kHugePage) {
  void* memory = ::mmap(nullptr, mapping_nbytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  buffers_ = mapping_ + -reinterpret_cast<uintptr_t>(memory) % kHugePage;
  // Small pages make it twice as slow: the kernel pins one for every 4 KiB it copies.
  ::madvise(mapping_, mapping_nbytes_, MADV_HUGEPAGE);
  ::madvise(mapping_, mapping_nbytes_, MADV_DONTFORK);
  ::madvise(mapping_, mapping_nbytes_, MADV_DONTDUMP);
}

HostCopies::~HostCopies() { ::munmap(mapping_, mapping_nbytes_); }

bool HostCopies::is_checked() { return !unchecked.load(std::memory_order_relaxed); }

int HostCopies::copy(unsigned thread, void* target, uint64_t address, size_t nbytes,
                     uint32_t* crc) {
  *crc = 0;
  const faults::Outcome fault = faults::check(faults::Op::copy);
  if (fault.error_number) return fault.error_number;
  auto* to = static_cast<char*>(target);
  const auto* from = reinterpret_cast<const char*>(static_cast<uintptr_t>(address));
  char* const buffer = buffers_ + thread * kBufferNbytes;
  while (nbytes > 0 && is_checked()) {
    const ssize_t copied = copy_checked(buffer, from, std::min(nbytes, kBufferNbytes));
    if (copied == 0) return EFAULT;
    if (copied < 0) {
      if (errno != EPERM && errno != ENOSYS && errno != EACCES && errno != ESRCH) return errno;
      unchecked.store(true);
      break;
    }
    const auto done = static_cast<size_t>(copied);
    *crc = crc32_copy(*crc, to, buffer, done);
    to += done, from += done, nbytes -= done;
  }
  *crc = crc32_copy(*crc, to, from, nbytes);
  return 0;
}

}  // namespace asyncckpt
