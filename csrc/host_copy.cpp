#include "host_copy.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <new>

#include "crc32.h"
#include "faults.h"
#include "streaming_copy.h"

namespace asyncckpt {
namespace {

constexpr size_t kBufferNbytes = size_t{256} << 10;  // half of the smallest second-level cache
constexpr size_t kGatheredMax = 512;                 // at once; the kernel takes 1024
constexpr size_t kHugePage = size_t{2} << 20;

std::atomic<bool> unchecked{false};

// Gathers `nbytes` into a buffer. Returns how many, from the first on, were there; 0 when not even the first,
// negative where the call is forbidden.
ssize_t gather(char* to, size_t nbytes, const iovec* from, size_t count) {
  // The target plays the remote side, which is pinned page by page; sources are read in place, as
  // write(2) would.
  const iovec remote{to, nbytes};
  for (;;) {
    const ssize_t copied = ::process_vm_writev(::getpid(), from, count, &remote, 1, 0);
    if (copied >= 0 || errno == EFAULT) return std::max<ssize_t>(copied, 0);
    if (errno != EINTR) return copied;
  }
}

}  // namespace

HostCopies::HostCopies(unsigned threads, bool checksums) : checksums_(checksums) {
  const size_t pages = (threads * kBufferNbytes + kHugePage - 1) / kHugePage;
  mapping_nbytes_ = (pages + 1) * kHugePage;  // so many whole ones lie in it wherever it begins
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

// Bytes [done, done + nbytes) of a copy.
void HostCopies::hand_on(HostCopy& copy, size_t done, const char* from, size_t nbytes) const {
  if (checksums_) copy.crc = crc32_copy(copy.crc.value_or(0), copy.target + done, from, nbytes);
  else streaming_copy(copy.target + done, from, nbytes);
}

int HostCopies::copy(unsigned thread, std::vector<HostCopy>& copies, size_t* failed) {
  char* const buffer = buffers_ + thread * kBufferNbytes;
  std::array<iovec, kGatheredMax> slices;
  size_t first = 0;  // the first copy that is not made yet
  size_t done = 0;   // so many bytes of it are
  while (first < copies.size()) {
    *failed = first;
    if (done == 0) {
      const faults::Outcome fault = faults::check(faults::Op::copy);
      if (fault.error_number) return fault.error_number;
    }
    // Each alone while faults are armed, so that the n-th is what they count.
    const size_t slices_max = faults::armed.load(std::memory_order_relaxed) ? 1 : kGatheredMax;
    size_t count = 0, gathered = 0;
    for (size_t index = first, begin = done;
         index < copies.size() && count < slices_max && gathered < kBufferNbytes;
         ++index, begin = 0) {
      const HostCopy& copy = copies[index];
      const size_t nbytes = std::min(copy.nbytes - begin, kBufferNbytes - gathered);
      slices[count++] = {reinterpret_cast<void*>(static_cast<uintptr_t>(copy.address + begin)),
                         nbytes};
      gathered += nbytes;
    }
    const ssize_t copied = is_checked() ? gather(buffer, gathered, slices.data(), count) : -1;
    if (copied == 0 && gathered > 0) return EFAULT;
    if (copied < 0) {
      if (is_checked() && errno != EPERM && errno != ENOSYS && errno != EACCES && errno != ESRCH)
        return errno;
      unchecked.store(true);
    }
    const char* from = buffer;
    size_t left = copied < 0 ? gathered : static_cast<size_t>(copied);
    for (size_t slice = 0; slice < count; ++slice) {
      HostCopy& copy = copies[first];
      const size_t nbytes = std::min(slices[slice].iov_len, left);
      hand_on(copy, done, copied < 0 ? static_cast<const char*>(slices[slice].iov_base) : from,
              nbytes);
      from += nbytes, left -= nbytes, done += nbytes;
      if (done < copy.nbytes) break;  // the rest is to be had, or not, in the next round
      ++first, done = 0;
    }
  }
  return 0;
}

}  // namespace asyncckpt
