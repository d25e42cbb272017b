#include "device.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "faults.h"

namespace asyncckpt {
namespace {

std::atomic<bool> unchecked{false};

}  // namespace

bool copy_is_checked() { return !unchecked.load(std::memory_order_relaxed); }

int copy_from_host(void* target, uint64_t address, size_t nbytes) {
  const faults::Outcome fault = faults::check(faults::Op::copy);
  if (fault.error_number) return fault.error_number;
  auto* to = static_cast<char*>(target);
  while (nbytes > 0) {
    if (unchecked.load(std::memory_order_relaxed)) {
      std::memcpy(to, reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), nbytes);
      return 0;
    }
    // The target plays the remote side: the kernel pins that side page by page, and the arena has
    // huge pages. The source is then read in place, as write(2) would.
    const iovec local{reinterpret_cast<void*>(static_cast<uintptr_t>(address)), nbytes};
    const iovec remote{to, nbytes};
    const ssize_t copied = ::process_vm_writev(::getpid(), &local, 1, &remote, 1, 0);
    if (copied < 0) {
      if (errno == EINTR) continue;
      if (errno == EPERM || errno == ENOSYS || errno == EACCES || errno == ESRCH) {
        unchecked.store(true);
        continue;
      }
      return errno;
    }
    if (copied == 0) return EFAULT;
    to += copied;
    address += static_cast<uint64_t>(copied);
    nbytes -= static_cast<size_t>(copied);
  }
  return 0;
}

}  // namespace asyncckpt
