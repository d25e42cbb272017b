// Copies from memory of this process that its owner may free at any moment; checksummed on the way, if wanted.
//
// The kernel gathers (process_vm_writev(2) to ourselves: it checks every page of the sources, and pins those of
// the target, which is cheap where they are huge) into a small buffer that stays in the cache, many small ones
// at once. From there the bytes are checksummed and go on, past the cache, in one pass. So each byte is fetched
// from memory once and goes back once. See docs/notes/2026-11-23-copying-from-memory-that-may-go-away.md and
// 2026-11-26-copying-through-the-cache.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace asyncckpt {

struct HostCopy {
  char* target;
  uint64_t address;
  size_t nbytes;
  std::optional<uint32_t> crc = {};  // CRC-32 of what is at `target`, if checksums are wanted
};

class HostCopies {
 public:
  // For so many threads at a time. Throws std::bad_alloc when the address space cannot be had.
  HostCopies(unsigned threads, bool checksums);
  ~HostCopies();
  HostCopies(const HostCopies&) = delete;
  HostCopies& operator=(const HostCopies&) = delete;

  // Makes copies, none of them empty, in their order. Returns 0; or, with `failed` the number of the one, EFAULT
  // when (part of) its source is no longer mapped. Never faults. Where a sandbox forbids the call, sources are
  // read in place, and is_checked() tells.
  int copy(unsigned thread, std::vector<HostCopy>& copies, size_t* failed);

  static bool is_checked();

 private:
  void hand_on(HostCopy& copy, size_t done, const char* from, size_t nbytes) const;

  const bool checksums_;
  size_t mapping_nbytes_;
  char* mapping_;
  char* buffers_;
};

}  // namespace asyncckpt
