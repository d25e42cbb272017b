// The file system calls of the engine, and nothing else.
//
// Every call returns 0 or a positive errno; EINTR and short transfers are handled inside. A file is
// opened with O_DIRECT where the file system takes it and falls back to buffered I/O by itself, both
// at open (EINVAL) and at the first transfer that the device refuses.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace asyncckpt {

// Addresses, offsets and sizes of direct transfers are multiples of this. 4096 covers every block
// device in use; the kernel refuses what does not fit and we fall back.
constexpr size_t kDirectAlignment = 4096;

constexpr size_t round_up(size_t nbytes, size_t multiple) {
  return (nbytes + multiple - 1) / multiple * multiple;
}

class File {
 public:
  File() = default;
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // A new file; one that exists is an error (EEXIST), unless it is `shared`: then whoever comes first
  // makes it. Reserves `nbytes` on disk where the file system can, so that a full disk is found before
  // anything is copied.
  // `operation` says what failed. After a failure the file is closed, and may be left behind, empty.
  int create(const std::string& path, uint64_t nbytes, bool shared, bool direct,
             const char** operation);
  int open(const std::string& path, bool direct);
  void close();

  // Transfers exactly `nbytes`. In direct mode address and offset must be aligned, and `padded_nbytes`
  // (a multiple of kDirectAlignment, at least nbytes, of readable memory) may reach the disk.
  // `done` tells how far it came.
  int write(const void* data, size_t nbytes, size_t padded_nbytes, uint64_t offset, size_t* done);
  // Fails with ENODATA when the file ends early.
  int read(void* data, size_t nbytes, size_t padded_nbytes, uint64_t offset);

  int truncate(uint64_t nbytes);
  int sync();
  int size(uint64_t* nbytes) const;

  bool is_open() const { return fd_ >= 0; }
  bool direct() const { return direct_.load(std::memory_order_relaxed); }

 private:
  int allocate(uint64_t nbytes);
  void make_buffered();

  int fd_ = -1;
  std::atomic<bool> direct_{false};
};

}  // namespace asyncckpt
