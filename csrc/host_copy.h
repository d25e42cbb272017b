// Copies from memory of this process that its owner may free at any moment, checksummed on the way.
//
// The kernel copies into a small buffer that stays in the cache (process_vm_writev(2) to ourselves: it checks
// every page of the source, and pins those of the target, which is cheap where they are huge). From there the
// bytes are checksummed and go on, past the cache, in one pass. So each byte is fetched from memory once and
// goes back once; see docs/notes/2026-11-26-copying-through-the-cache.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncckpt {

class HostCopies {
 public:
  // For so many threads at a time. Throws std::bad_alloc when the address space cannot be had.
  explicit HostCopies(unsigned threads);
  ~HostCopies();
  HostCopies(const HostCopies&) = delete;
  HostCopies& operator=(const HostCopies&) = delete;

  // Returns 0, and in `crc` the CRC-32 of the bytes that are at `target`; or EFAULT when (part of) the source
  // is no longer mapped. Never faults. Where a sandbox forbids the call, the source is read in place, and
  // is_checked() tells.
  int copy(unsigned thread, void* target, uint64_t address, size_t nbytes, uint32_t* crc);

  static bool is_checked();

 private:
  char* mapping_;
  size_t mapping_nbytes_;
  char* buffers_;
};

}  // namespace asyncckpt
